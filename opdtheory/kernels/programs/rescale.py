"""Gradients of rows times factors, without asking the device what the factors are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["rescale"]

# Tokens that a program does, and those that it does together.
_SHARE, _BLOCK = 2**15, 2**12


def rescale(source: Tensor, factors: Tensor, target: Tensor) -> None:
    """Write rows of a matrix times factors, `(N,)`; a row of factor one is left alone where it is in place."""
    rows, words = source.shape
    _rescale_program[(rows, -(-words // _SHARE))](
        source,
        factors,
        target,
        *factors.stride(),
        *source.stride(),
        *target.stride(),
        words,
        INPLACE=source is target,
        SHARE=_SHARE,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@triton.jit
def _rescale_program(
    source,
    factors,
    target,
    factors_row,
    source_row,
    source_word,
    target_row,
    target_word,
    words,
    INPLACE: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row * factors_row).to(tl.float32)
    wanted = True
    if INPLACE:
        wanted = factor != 1.0
    if wanted:
        first = tl.program_id(1).to(tl.int64) * SHARE
        for start in range(0, SHARE, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            found = tl.load(source + row * source_row + at * source_word, mask=at < words, other=0.0)
            tl.store(target + row * target_row + at * target_word, found.to(tl.float32) * factor, mask=at < words)
