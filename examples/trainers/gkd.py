"""TRL's `GKDTrainer`, whose interface all versions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from opdtheory.end_to_end import TrainerPair

__all__ = ["gkd"]


def gkd(**settings: Any) -> Callable[[TrainerPair], Trainer]:
    """`GKDTrainer`, on the student's own answers."""

    def build(pair: TrainerPair) -> Trainer:
        args = GKDConfig(**pair.arguments, max_new_tokens=pair.horizon, **{"lmbda": 1.0, **settings})
        return GKDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=args,
            train_dataset=pair.dataset,
            processing_class=pair.tokenizer,
        )

    return build
