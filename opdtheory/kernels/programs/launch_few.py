"""Sums of exponentials of all rows of a batch, and shares of a number for each row, by programs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from opdtheory.kernels.pieces import matrices
from opdtheory.kernels.programs.few_tokens import shares_program, sums_program

__all__ = ["BLOCK", "WARPS", "Split", "row_sums", "split_of", "write_shares"]

# Tokens that a program processes together, its warps, and how many blocks it reads at once.
BLOCK, WARPS, _AT_ONCE = 1024, 4, 4
# Programs of this size that a processor runs at once, and how many to count on where they are interpreted.
_PER_PROCESSOR, _INTERPRETED = 8, 8


class Split(NamedTuple):
    """How many programs share a row, and how many tokens each has at most."""

    parts: int
    span: int


def split_of(rows: int, words: int, device: torch.device) -> Split:
    """Rows as they are if there are enough to fill the device, and else in parts; the same for every call."""
    step = BLOCK * _AT_ONCE
    capacity = (
        _INTERPRETED
        if device.type == "cpu"
        else _PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    )
    steps = -(-words // step)
    parts = min(steps, -(-capacity // max(rows, 1)))
    span = step * -(-steps // parts)
    return Split(-(-words // span), span)


def _options(device: torch.device) -> dict[str, object]:
    options: dict[str, object] = {"BLOCK": BLOCK, "num_warps": WARPS}
    return options if device.type == "cpu" else options | {"enable_fp_fusion": False}


def row_sums(logits: Tensor, ids: Tensor, weights: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    r"""The largest logit $m$ of each row and $\sum_a e^{s (z_a - m)}$, over all tokens but those listed.

    Args:
        logits: `(..., V)`, float32 or narrower.
        ids: the tokens to leave out, `(..., k)`, in ascending order.
        weights: `(...)`, contiguous, or None; of rows of weight zero nothing is read, and they get zero and one.
        scale: the inverse temperature $s$.

    Returns:
        Both in float64, `(..., 1)`. A row without such tokens has the sum zero, one with NaN or +inf among them NaN.
    """
    batch, words = logits.shape[:-1], logits.shape[-1]
    split = split_of(batch.numel(), words, logits.device)
    tops = torch.empty(*batch, split.parts, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(tops, dtype=torch.float64)
    wide = [logits, tops, sums, ids.contiguous()]
    for (rows, highest, total, listed), weight in matrices(wide, [] if weights is None else [weights]):
        count = listed.shape[-1]
        sums_program[(rows.shape[0], split.parts)](
            rows,
            listed,
            weight[0] if weight else rows,
            highest,
            total,
            *rows.stride(),
            words,
            count,
            split.span,
            scale,
            WEIGHED=weights is not None,
            SLOTS=triton.next_power_of_2(count),
            **_options(logits.device),
        )
    tops = tops.double()
    highest = tops.amax(-1, keepdim=True)
    return highest, (sums * torch.exp(scale * (tops - highest))).sum(-1, keepdim=True)


def write_shares(logits: Tensor, gradient: Tensor, tops: Tensor, factors: Tensor, scale: float) -> None:
    r"""Fill a gradient with $c\,e^{s (z_a - m)}$, rounded once, with $m$ and $c$ of each row.

    Args:
        logits: `(..., V)`, float32 or narrower.
        gradient: of that shape, overwritten.
        tops: $m$, `(..., 1)`.
        factors: $c$, `(..., 1)`; where it is zero, logits are not read.
        scale: the inverse temperature $s$.
    """
    split = split_of(logits.shape[:-1].numel(), logits.shape[-1], logits.device)
    narrow = [each.squeeze(-1).float().contiguous() for each in (tops, factors)]
    for (rows, slopes), (highest, share) in matrices([logits, gradient], narrow):
        shares_program[(rows.shape[0], split.parts)](
            rows,
            slopes,
            highest,
            share,
            *rows.stride(),
            *slopes.stride(),
            rows.shape[-1],
            split.span,
            scale,
            **_options(logits.device),
        )
