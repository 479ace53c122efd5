"""The loss inside TRL's `DistillationTrainer`, and another one in its place while a step is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from trl.trainer import distillation_trainer

from opdtheory.errors import IntegrationError

__all__ = ["check_loss", "in_place_of_trl_loss"]

Loss = Callable[..., tuple[Tensor, Tensor, Tensor]]

_NAME = "_chunked_divergence_loss"

# What the loss in its place reads; others, such as beta and the size of a chunk, are of no concern to it.
_NEEDED = {
    *("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight"),
    *("student_lm_head_bias", "teacher_lm_head_bias", "student_logit_scale", "teacher_logit_scale"),
    *("student_final_logit_softcapping", "teacher_final_logit_softcapping"),
    *("completion_mask", "num_items_in_batch", "temperature"),
}


def check_loss() -> None:
    """Raise unless TRL's loss takes the arguments that the one in its place reads.

    Raises:
        IntegrationError: it is not there, or takes others.
    """
    missing = sorted(_NEEDED - set(inspect.signature(getattr(distillation_trainer, _NAME, lambda: None)).parameters))
    if missing:
        raise IntegrationError(f"trl: {_NAME} of DistillationTrainer does not take {', '.join(missing)}")


@contextmanager
def in_place_of_trl_loss(loss: Loss) -> Iterator[None]:
    """Let `DistillationTrainer` call another loss: it has no method for it, but looks up a function of its module.

    The module's function is replaced for as long as the context lasts, in the whole process, and put back after it.

    Args:
        loss: takes the arguments of TRL's function by name, since their order differs between versions.
    """
    original = getattr(distillation_trainer, _NAME)
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return loss(**bound.arguments)

    setattr(distillation_trainer, _NAME, call)
    try:
        yield
    finally:
        setattr(distillation_trainer, _NAME, original)
