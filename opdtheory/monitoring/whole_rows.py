r"""What both whole distributions say of a weight at each history: its expected step and its noise, without a proxy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.monitoring.sums import EDGE, GROUPS
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.monitoring.weights import Weight

__all__ = ["COLUMNS", "row_sums"]

# What is summed over histories: their number, |E g|^2 and tr Var g of one token's gradient, and the product of the
# expected step with the one straight to the teacher. All in the logits; the noise at each history's best baseline.
COLUMNS = ("histories", "signal", "noise", "towards")

# Rows at a time, so that a few of the size of the vocabulary are in memory at once.
_ROWS = 4096


def row_sums(
    tokens: SampledTokens, weights: Iterable[Weight], group: Int64[Tensor, " N"]
) -> dict[str, Float[Tensor, "G M"]]:
    """The sums of each weight by group; tokens that came with both distributions only."""
    assert tokens.student_logits is not None and tokens.teacher_logits is not None
    weights = tuple(weights)
    found = {weight.name: torch.zeros(GROUPS, len(COLUMNS), dtype=torch.float64) for weight in weights}
    for start in range(0, len(tokens), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p, log_q = (
            torch.log_softmax(z[rows], -1) for z in (tokens.student_logits.double(), tokens.teacher_logits.double())
        )
        p, q = log_p.exp(), log_q.exp()
        # Tokens of probability zero under the student count nothing.
        log_u = torch.where(p > 0, log_q - log_p, 0.0).clamp(-EDGE, EDGE)
        length = (1 - 2 * p + p.square().sum(-1, keepdim=True)).clamp_min(0.0)
        for weight in weights:
            a = weight(log_u)
            step = p * (a - (p * a).sum(-1, keepdim=True))
            best = (p * length * a).sum(-1, keepdim=True) / (p * length).sum(-1, keepdim=True).clamp_min(1e-300)
            signal = step.square().sum(-1)
            noise = ((p * length * (a - best).square()).sum(-1) - signal).clamp_min(0)
            columns = torch.stack([torch.ones_like(signal), signal, noise, (step * (q - p)).sum(-1)], -1)
            found[weight.name].index_add_(0, group[rows], columns)
    return found
