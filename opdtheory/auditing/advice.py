"""Which setting makes a loss finite that is NaN on some batch, found by trying."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opdtheory.errors import NotFiniteError
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = ["advised"]

# Tokens by which rollouts are lengthened to learn whether a loss is finite on longer ones.
_FURTHER = 3

_LONGER = (
    "it is finite on longer rollouts: if it shifts logits and labels itself, pass it through "
    "opdtheory.from_logits(..., shifted=True)"
)
_MORE = "it is finite on {count} rollouts: if it compares the rollouts of a batch, audit it with batch_size={count}"


@contextmanager
def advised(loss: Loss) -> Iterator[None]:
    """Add to the error of a loss that is not finite which setting would help, if one does.

    Raises:
        NotFiniteError: the loss is not finite on some batch.
    """
    try:
        yield
    except NotFiniteError as error:
        advice = _advice(loss, error.shape)
        raise NotFiniteError(f"{error}; {advice}" if advice else str(error), error.shape) from None


def _advice(loss: Loss, shape: tuple[int, ...]) -> str | None:
    batch_size, horizon, vocab_size = shape
    if _is_finite(loss, batch_size, horizon, vocab_size):
        return None  # the size of the batch is not the cause
    longer = [_LONGER] if _is_finite(loss, batch_size, horizon + _FURTHER, vocab_size) else []
    counts = (count for count in (2, 3, 4) if count > batch_size and _is_finite(loss, count, horizon, vocab_size))
    # A loss that shifts has no token left in any number of rollouts of one step; a standard deviation has.
    more = [_MORE.format(count=count) for count in itertools.islice(counts, 1)]
    return "; ".join([*longer, *more]) or None


def _is_finite(loss: Loss, batch_size: int, horizon: int, vocab_size: int) -> bool:
    """Whether the loss and its gradient are finite on a random batch of this size."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch_size, horizon, vocab_size)
    student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocab_size, shape[1:3], generator=generator)
    with torch.enable_grad():
        try:
            value = loss(Rollouts.from_logits(tokens, student.requires_grad_(), teacher))
            (gradient,) = torch.autograd.grad(value, student)
        # The loss is known to fail; how it does elsewhere only decides what to advise.
        except Exception:
            return False
    return math.isfinite(value.detach()) and bool(torch.isfinite(gradient).all())
