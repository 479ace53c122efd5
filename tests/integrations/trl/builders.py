"""Trainers of the plug-in, and twins of theirs with one fault each, on the exactly known pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from trl import DistillationConfig, GRPOConfig

from opdtheory.end_to_end.pair import TrainerPair
from opdtheory.integrations.trl import OPDPlusTrainer, OPDTrainer

# What transformers and TRL say of their own settings.
quiet = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:When using `'luspo'`")

Build = Callable[[TrainerPair], Any]


def whole(trainer: type = OPDTrainer, settings: dict[str, Any] | None = None, **options: Any) -> Build:
    """Builds the trainer over the whole vocabulary."""

    def build(pair: TrainerPair) -> Any:
        args = DistillationConfig(**pair.arguments, max_completion_length=pair.horizon, **(settings or {}))
        return trainer(
            pair.student,
            pair.teacher,
            args=args,
            train_dataset=pair.dataset,
            processing_class=pair.tokenizer,
            **options,
        )

    return build


def sampled(trainer: type = OPDPlusTrainer, settings: dict[str, Any] | None = None, **options: Any) -> Build:
    """Builds the trainer on sampled tokens."""

    def build(pair: TrainerPair) -> Any:
        given = {"loss_type": "dr_grpo", "num_generations": 2, **(settings or {})}
        return trainer(
            pair.student,
            pair.teacher,
            args=GRPOConfig(**pair.arguments, max_completion_length=pair.horizon, **given),
            train_dataset=pair.dataset,
            processing_class=pair.tokenizer,
            **options,
        )

    return build
