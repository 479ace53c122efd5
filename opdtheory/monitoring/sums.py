r"""What is kept of the tokens: weighted histograms of $\log u$, which add up over batches, steps and files.

Every quantity of a diagnosis is a function of these sums, so a run of any length takes the same memory, and the
weight of an estimator that is asked about later can still be laid over them. A bin is 0.02 nats wide and its tokens
count at their mean, so a smooth weight such as $u$ is off by a share of at most $2\cdot10^{-5}$, and $\log u$ itself by
rounding only. The sums are kept apart for 32 groups of rollouts, from which intervals follow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from scipy import stats
from torch import Tensor

__all__ = ["COLUMNS", "EDGE", "GROUPS", "WIDTH", "Number", "Sums", "group_of", "number_of"]

# Bins of log u, in nats; tokens beyond the edge count in the last bin, at the edge.
EDGE, WIDTH = 40.0, 0.02
_BINS = round(2 * EDGE / WIDTH)

# Groups of rollouts, left out one at a time for intervals, and how few of them still give one.
GROUPS, _FEWEST = 32, 8

# What is summed in a bin: tokens; log u; the length of the score and its square; the distance q - p.
COLUMNS = ("tokens", "log_u", "length", "square", "apart")


class Number(NamedTuple):
    """An estimate with its interval, which is None where there are too few rollouts for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        shown = f"{self.value:.3g}"
        return shown if self.low is None else f"{shown} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def within(self, lowest: float, highest: float) -> Number:
        """The interval cut to the values that are possible."""
        if self.low is None or self.high is None:
            return self
        return Number(self.value, max(self.low, lowest), min(self.high, highest))


def group_of(rollout: Int64[Tensor, " N"], first: int = 0, together: int = 1) -> Int64[Tensor, " N"]:
    """The group of each token: that of its rollout, `together` rollouts of one prompt in one group."""
    return torch.div(rollout + first, together, rounding_mode="floor") % GROUPS


@dataclass
class Sums:
    r"""Sums over tokens by bin of $\log u$ and group of rollouts, each token with a weight of its own.

    Attributes:
        table: `(len(COLUMNS), GROUPS, bins)`, float64.
    """

    table: Float[Tensor, "C G X"]

    @classmethod
    def empty(cls) -> Sums:
        """No token."""
        return cls(torch.zeros(len(COLUMNS), GROUPS, _BINS, dtype=torch.float64))

    def add(
        self,
        log_u: Float[Tensor, " N"],
        student: Float[Tensor, " N"],
        group: Int64[Tensor, " N"],
        weight: Float[Tensor, " N"] | None = None,
        square: Float[Tensor, " N"] | None = None,
    ) -> None:
        r"""Add tokens.

        Args:
            log_u: log-ratios in nats; `-inf` counts at the edge.
            student: $\log p$ of the tokens.
            group: of each token, from `group_of`.
            weight: what each token counts, such as $p/\mu$; 1 by default.
            square: $|s|^2$ of the score in the logits; by default $(1-p)^2$, its part at the sampled token.
        """
        if not len(log_u):
            return
        x = log_u.clamp(-EDGE, EDGE)
        p = student.exp()
        length = 1 - p if square is None else square.sqrt()
        bins = ((x + EDGE) / WIDTH).long().clamp_(0, _BINS - 1)
        place = group * _BINS + bins
        columns = {
            "tokens": torch.ones_like(x) if weight is None else weight,
            "log_u": x,
            "length": length,
            "square": length.square() if square is None else square,
            "apart": (student + x).exp() - p,
        }
        for number, name in enumerate(COLUMNS):
            value = columns[name] if weight is None or name == "tokens" else columns[name] * weight
            self.table[number].view(-1).scatter_add_(0, place, value)

    @property
    def count(self) -> float:
        """The sum of the weights: the number of tokens where they are 1."""
        return float(self.table[0].sum())

    @property
    def total(self) -> Float[Tensor, "C X"]:
        """The sums over all groups."""
        return self.table.sum(1)

    def occupied(self) -> tuple[Float[Tensor, " X"], Float[Tensor, "K C X"]]:
        """Where the tokens of each occupied bin lie, in nats, and the tables of all tokens and of all but each group.

        The first of the `K` tables is of all tokens; each further one leaves out a group that has tokens.
        """
        total = self.total
        some = total[0] > 0
        total = total[:, some]
        groups = self.table[:, self.table[0].sum(-1) > 0][:, :, some].transpose(0, 1)
        return total[1] / total[0], torch.cat([total.unsqueeze(0), total - groups])

    def number(self, function: Callable[[Tensor, Tensor], Tensor], confidence: float = 0.99) -> Number:
        """A function of the points and the tables, with its interval from leaving out one group at a time."""
        return number_of(function(*self.occupied()), confidence)


def number_of(values: Float[Tensor, " K"], confidence: float = 0.99) -> Number:
    """The first value, with the jackknife's interval of Student's t from the others."""
    found, others = float(values[0]), values[1:]
    groups = len(others)
    if groups < _FEWEST or not bool(torch.isfinite(values).all()):
        return Number(found)
    spread = float(((groups - 1) * (others - others.mean()).square().mean()).sqrt())
    reach = spread * _quantile(confidence, groups - 1)
    return Number(found, found - reach, found + reach)


@functools.cache
def _quantile(confidence: float, freedom: int) -> float:
    """Where Student's t ends the two-sided interval; asked for at every step of a run."""
    return float(stats.t.ppf((1 + confidence) / 2, freedom))
