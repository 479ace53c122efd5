"""Products of hidden states with an output layer, summed in float32 where these are of lower precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    *("CHUNK_BYTES", "add_product", "autocast_dtype", "chunk_rows", "product", "product_dtype", "products_of"),
    "wide_dtype",
]

# Memory for two tensors of logits of a chunk of positions: with 151,936 words, 220 rows in float32. With fewer, a CPU
# waits for the output layer to be read, and casts it more often.
CHUNK_BYTES = 2**28

# Entries of an output layer of low precision that are held in float32 at a time.
_UPCAST = 2**22


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of sums of gradients, given that of the factors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(words: int, dtype: torch.dtype) -> int:
    """The default number of positions in a chunk, given the dtype of logits."""
    return max(1, CHUNK_BYTES // (2 * words * dtype.itemsize))


def products_of(states: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """The products of hidden states with the rows of a head, in the dtype of `out`."""
    if head.dtype == out.dtype:
        return torch.mm(states, head.T, out=out)
    if _accumulates_wide(head):
        return out.copy_(_wide_product(states, head.T))
    states = states.to(out.dtype)
    for place, block in _upcast(head, out.dtype):
        torch.mm(states, block.T, out=out[:, place])
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in the dtype of the left factor, whose digits all count; the right one may be narrower."""
    if left.dtype == right.dtype:
        return torch.mm(left, right)
    if _accumulates_wide(right):
        # Two factors of eight bits each, whose products are summed in float32.
        high = left.to(right.dtype)
        low = (left - high).to(right.dtype)
        return _wide_product(high, right) + _wide_product(low, right)
    total = left.new_zeros(left.shape[0], right.shape[1])
    for place, block in _upcast(right, left.dtype):
        total.addmm_(left[:, place], block)
    return total


def add_product(total: Tensor, left: Tensor, states: Tensor) -> None:
    """Add the product of a gradient with hidden states to a total."""
    if _accumulates_wide(states):
        total += product(left, states)
    else:
        total.addmm_(left, states.to(total.dtype))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two bfloat16 matrices in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _upcast(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a matrix at a time in a wider dtype."""
    rows = max(1, _UPCAST // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        place = slice(start, start + rows)
        yield place, matrix[place].to(dtype)


def _accumulates_wide(matrix: Tensor) -> bool:
    """Whether the device multiplies bfloat16 into float32; float16 would lose small gradients to underflow."""
    return matrix.is_cuda and matrix.dtype == torch.bfloat16 and "dtype" in torch.ops.aten.mm.overloads()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device, None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def product_dtype(head: Tensor) -> torch.dtype:
    """The dtype in which a head is multiplied: that of autocast where it is on, else its own."""
    return autocast_dtype(head.device.type) or head.dtype
