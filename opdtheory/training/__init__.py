"""Small language models, tasks with exact verifiers, and the reference trainer."""

from __future__ import annotations

from typing import Any

# Where each public name lives; modules load at the first use of one of their names (PEP 562).
_HOMES = {
    "CharacterVocabulary": "opdtheory.training.vocabulary",
    "Environment": "opdtheory.training.models",
    "Example": "opdtheory.training.tasks",
    "HuggingFaceModel": "opdtheory.training.huggingface",
    "LanguageModel": "opdtheory.training.models",
    "Samples": "opdtheory.training.models",
    "TASKS": "opdtheory.training.tasks",
    "Task": "opdtheory.training.tasks",
    "Transformer": "opdtheory.training.transformer",
    "TransformerConfig": "opdtheory.training.transformer",
    "Vocabulary": "opdtheory.training.vocabulary",
    "drop_layer": "opdtheory.training.variants",
    "load_pair": "opdtheory.training.supervised",
    "perturb": "opdtheory.training.variants",
    "response_logits": "opdtheory.training.models",
    "rollouts": "opdtheory.training.models",
    "smollm2": "opdtheory.training.huggingface",
    "task": "opdtheory.training.tasks",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'opdtheory.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
