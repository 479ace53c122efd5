"""Products of hidden states with an output layer, summed in float32 where these are of lower precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CHUNK_BYTES",
    "DEVICE_CHUNK_BYTES",
    "Halves",
    "accumulates_wide",
    "add_product",
    "autocast_dtype",
    "chunk_rows",
    "product",
    "product_dtype",
    "products_of",
    "wide_dtype",
]

# Memory for two tensors of logits of a chunk of positions: with 151,936 words, 220 rows in float32. With fewer, a CPU
# waits for the output layer to be read, and casts it more often. A GPU multiplies tiles of 128 rows: 512 of them.
CHUNK_BYTES, DEVICE_CHUNK_BYTES = 2**28, 5 * 2**27
_TILE = 128

# Entries of an output layer of low precision that are held in float32 at a time.
_UPCAST = 2**22


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of sums of gradients, given that of the factors."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(words: int, dtype: torch.dtype, device: torch.device) -> int:
    """The default number of positions in a chunk, given the dtype of logits."""
    held = CHUNK_BYTES if device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(1, held // (2 * words * dtype.itemsize))
    return rows if device.type == "cpu" or rows < _TILE else rows // _TILE * _TILE


class Halves(NamedTuple):
    """A matrix of float32 as one of bfloat16, in which each row is followed by what its rounding took."""

    rows: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Halves:
        """In the memory of a contiguous matrix `(N, V)` of float32, whose rows then hold `V` numbers and their rest."""
        return cls(matrix.view(torch.bfloat16).view(-1, matrix.shape[1]))

    @classmethod
    def split(cls, matrix: Tensor, spare: Tensor | None = None) -> Halves:
        """Of a matrix, in the memory of a contiguous one of its shape and dtype, or in new memory."""
        halves = cls.of(torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device) if spare is None else spare)
        high, low = halves.rows.unflatten(0, (-1, 2)).unbind(1)
        high.copy_(matrix)
        torch.sub(matrix, high, out=low)
        return halves

    def column_sums(self) -> Tensor:
        """The sum of each column, in float32."""
        return self.rows.sum(0, dtype=torch.float32)


def products_of(states: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """The products of hidden states with the rows of a head, in the dtype of `out`."""
    if head.dtype == out.dtype:
        return torch.mm(states, head.T, out=out)
    if accumulates_wide(head):
        return _wide_product(states, head.T, out)
    states = states.to(out.dtype)
    for place, block in _upcast(head, out.dtype):
        torch.mm(states, block.T, out=out[:, place])
    return out


def product(left: Tensor | Halves, right: Tensor) -> Tensor:
    """The matrix product in float32, or wider, with all digits of the left factor; the right one may be narrower."""
    if isinstance(left, Tensor):
        if left.dtype == right.dtype:
            return torch.mm(left, right)
        if not accumulates_wide(right):
            total = left.new_zeros(left.shape[0], right.shape[1])
            for place, block in _upcast(right, left.dtype):
                total.addmm_(left[:, place], block)
            return total
        left = Halves.split(left)
    out = torch.empty(len(left.rows), right.shape[1], dtype=torch.float32, device=right.device)
    return _wide_product(left.rows, right, out).unflatten(0, (-1, 2)).sum(1)


def add_product(total: Tensor, gradient: Tensor | Halves, states: Tensor) -> None:
    """Add the product of a gradient, transposed, with hidden states to a total."""
    if isinstance(gradient, Tensor):
        if not accumulates_wide(states):
            total.addmm_(gradient.T, states.to(total.dtype))
            return
        gradient = Halves.split(gradient)
    _add_wide_product(total, gradient.rows.T, states.repeat_interleave(2, 0))


def _wide_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of two bfloat16 matrices, written to one of float32."""
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_wide_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product of two bfloat16 matrices to one of float32, where the product is summed."""
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _upcast(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a matrix at a time in a wider dtype."""
    rows = max(1, _UPCAST // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        place = slice(start, start + rows)
        yield place, matrix[place].to(dtype)


def accumulates_wide(matrix: Tensor) -> bool:
    """Whether the device multiplies bfloat16 into float32; float16 would lose small gradients to underflow."""
    return matrix.is_cuda and matrix.dtype == torch.bfloat16 and "dtype" in torch.ops.aten.mm.overloads()


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a kind of device, None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def product_dtype(head: Tensor) -> torch.dtype:
    """The dtype in which a head is multiplied: that of autocast where it is on, else its own."""
    return autocast_dtype(head.device.type) or head.dtype
