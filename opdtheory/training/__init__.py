"""Small language models, tasks with exact verifiers, and the reference trainer."""

from __future__ import annotations

from typing import Any

# Where each public name lives; modules load at the first use of one of their names (PEP 562).
_NAMES = {
    "models.huggingface": ("HuggingFaceModel", "smollm2"),
    "models.language_model": ("LanguageModel", "response_logits", "rollouts"),
    "models.samples": ("Environment", "Samples"),
    "models.transformer": ("Transformer", "TransformerConfig"),
    "models.variants": ("drop_layer", "perturb"),
    "models.vocabulary": ("CharacterVocabulary", "Vocabulary"),
    "pairs": ("load_pair",),
    "tasks": ("TASKS", "Example", "Task", "task"),
}
_HOMES = {name: f"opdtheory.training.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'opdtheory.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
