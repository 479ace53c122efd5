"""Small language models, tasks with exact verifiers, and the reference trainer."""

from __future__ import annotations

from typing import Any

# Where each public name lives; modules load at the first use of one of their names (PEP 562).
_HOMES = {
    "CharacterVocabulary": "opdtheory.training.models.vocabulary",
    "Environment": "opdtheory.training.models.samples",
    "Example": "opdtheory.training.tasks",
    "HuggingFaceModel": "opdtheory.training.models.huggingface",
    "LanguageModel": "opdtheory.training.models.language_model",
    "Samples": "opdtheory.training.models.samples",
    "TASKS": "opdtheory.training.tasks",
    "Task": "opdtheory.training.tasks",
    "Transformer": "opdtheory.training.models.transformer",
    "TransformerConfig": "opdtheory.training.models.transformer",
    "Vocabulary": "opdtheory.training.models.vocabulary",
    "drop_layer": "opdtheory.training.models.variants",
    "load_pair": "opdtheory.training.pairs",
    "perturb": "opdtheory.training.models.variants",
    "response_logits": "opdtheory.training.models.language_model",
    "rollouts": "opdtheory.training.models.language_model",
    "smollm2": "opdtheory.training.models.huggingface",
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
