"""A loss under audit: its calls are counted, and its dtype says which errors are rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = ["INSISTS", "BlackBox", "name_of"]

# What a loss that insists on its batch size may raise at another one.
INSISTS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)

# Relative error that rounding can leave in an exact expectation, by the dtype that the loss returns.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 2e-2


class BlackBox:
    """A loss that counts its calls and remembers the dtype of its value."""

    def __init__(self, loss: Loss, tolerance: float | None = None) -> None:
        self.loss = loss
        self.stated = tolerance
        self.calls = 0
        self._dtype = torch.float64

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """The loss's value."""
        self.calls += 1
        value = self.loss(rollouts)
        if isinstance(value, Tensor):
            self._dtype = value.dtype
        return value

    @property
    def tolerance(self) -> float:
        """Relative error that counts as rounding: the stated one, else by the dtype of the last value."""
        if self.stated is not None:
            return self.stated
        return _TOLERANCE.get(self._dtype, _COARSE)


def name_of(loss: Loss) -> str:
    """The name of a loss: its `name`, its `__name__`, or its repr."""
    return str(getattr(loss, "name", None) or getattr(loss, "__name__", None) or repr(loss))
