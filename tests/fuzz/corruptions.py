"""What can be done to an argument: harmless things, after which the call must be right, and harmful ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.calls import chosen

__all__ = ["FLOATS", "JUNK", "NOT_POSITIVE", "harmed", "rearranged", "strange"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# In the place of a tensor, and of a number.
JUNK = (None, "x", 1.0, [[0.0, 1.0]], (), {}, np.zeros((2, 3)), object)
NOT_POSITIVE = (0, -1, -1.0, float("nan"), float("inf"), float("-inf"), True, False, "1", [1.0], None, 1j)


def rearranged(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in another place: transposed, strided, offset or wrapped."""
    how = rng.randrange(6)
    if how == 0 and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 1 and tensor.ndim > 0:
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if how == 2 and tensor.ndim > 0:
        return torch.cat([tensor[:1], tensor])[1:] if tensor.shape[0] else tensor
    if how == 3 and tensor.is_floating_point():
        return torch.nn.Parameter(tensor, requires_grad=False)
    if how == 4 and tensor.ndim > 1 and tensor.shape[0] > 1 and torch.equal(tensor, tensor[:1].expand_as(tensor)):
        return tensor[:1].expand_as(tensor)
    return tensor


def strange(rng: random.Random, tensor: Tensor) -> Any:
    """Something that is not a tensor, or a tensor of a wrong dtype, rank, size or device."""
    ways: list[Callable[[], Any]] = [
        lambda: chosen(rng, *JUNK),
        lambda: torch.zeros(tensor.shape, dtype=torch.complex64),
        lambda: tensor.unsqueeze(0),
        lambda: tensor.to("meta"),
        lambda: tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 1)) if tensor.ndim else tensor.unsqueeze(0),
    ]
    return chosen(rng, *ways)()


def harmed(rng: random.Random, logits: Tensor, row: tuple[int, ...]) -> Any:
    """Logits with one row, not a skipped one, that is not a distribution; or something else altogether."""
    if rng.random() < 0.5:
        return strange(rng, logits)
    if rng.random() < 0.3:
        return logits.to(chosen(rng, torch.int64, torch.int32, torch.bool, torch.uint8))
    spoilt = logits.clone()
    how = rng.randrange(3)
    if how == 2:
        spoilt[row] = -torch.inf
    else:
        spoilt[(*row, rng.randrange(logits.shape[-1]))] = (torch.nan, torch.inf)[how]
    return spoilt
