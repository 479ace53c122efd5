r"""What the sums say of a weight: where it falls, what it pulls towards, how loud it is; each with an interval.

A measure is a function of the points of $\log u$ and the tables of `Sums.occupied`, `(K, C, X)`, with one value for
each of the `K` tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.monitoring.sums import COLUMNS, Number, Sums, number_of
from opdtheory.monitoring.weights import Weight

__all__ = ["Measured", "measured", "moment", "quantiles", "tail_index"]

Table = Float[Tensor, "K C X"]
Measure = Callable[[Tensor, Tensor], Tensor]

_TOKENS, _, _LENGTH, _SQUARE, _APART = range(len(COLUMNS))

# A slope below this share of the largest one is rounding.
_FLAT = 1e-9

# The square of rounding, over that of a weight.
_ROUNDING = 1e-24

# The tail is the largest hundredth of the tokens, if that is some.
_TAIL, _FEWEST_IN_TAIL = 0.01, 50


@dataclass(frozen=True)
class Measured:
    r"""A weight $A(\log u)$ on a run's tokens; scores $s$ are those of the logits.

    Attributes:
        name: of the estimator.
        falls: the share of tokens where $A$ falls (T4): the divergence that it descends is not convex there.
        rises: the share of tokens where it rises.
        slope: $E[A'|s|^2]/E[|s|^2]$, the mean slope where the scores are: negative if the teacher repels on average.
        at_one: $A$ at $u = 1$.
        pull: $dA/d\log u$ at $u = 1$: the teacher attracts if it is positive (T5).
        towards: $E[(A - \bar A)(q - p)]$, in the logits the product of the expected step with the one straight to the
            teacher: negative if the step leads away from it.
        signal: that product over the lengths of the straight step and of the noise: signal to noise of one token.
        carried: the effective share of the tokens that carries the step: $E[|A-c||s|]^2 / E[(A-c)^2|s|^2]$.
        tail: Hill's index of $|A-c||s|$ with c the weight at the median of log u, which no tail moves; None if there
            are too few tokens.
        noise: $E[(A-c)^2|s|^2]$ at the best constant c: the second moment of one token's gradient.
        best_constant: that c (T7a).
        saving: the share of $E[A^2|s|^2]$ that this constant saves.
    """

    name: str
    falls: Number
    rises: Number
    slope: Number
    at_one: float
    pull: float
    towards: Number
    signal: Number
    carried: Number
    tail: Number | None
    noise: Number
    best_constant: Number
    saving: Number

    @property
    def is_constant(self) -> bool:
        """Whether the weight is level where the tokens lie and the same for all, to rounding; a step is level alone."""
        level = self.rises.value == self.falls.value == 0
        return level and self.noise.value <= _ROUNDING * self.best_constant.value**2


def measured(weight: Weight, sums: Sums, confidence: float = 0.99) -> Measured:
    """A weight on the tokens of the sums."""
    points, tables = sums.occupied()
    a, slope = weight(points), weight.slope(points)
    n, length, square, apart = (tables[:, column] for column in (_TOKENS, _LENGTH, _SQUARE, _APART))
    tokens, squares = n.sum(-1), square.sum(-1)

    level = _FLAT * max(float(slope.abs().max()), float(a.abs().max()), 1e-300)
    mean = (n * a).sum(-1) / tokens
    best = (square * a).sum(-1) / squares
    centred = a - best.unsqueeze(-1)
    noise = (square * centred.square()).sum(-1) / tokens
    whole = (square * a.square()).sum(-1) / tokens
    towards = (apart * (a - mean.unsqueeze(-1))).sum(-1) / tokens
    straight = (apart * points.expm1()).sum(-1) / tokens
    loud = (straight * noise).clamp_min(0).sqrt()
    carried = ((length * centred.abs()).sum(-1) / tokens).square() / noise

    def number(values: Tensor) -> Number:
        return number_of(values, confidence)

    at_one, pull = weight.at_teacher()
    return Measured(
        name=weight.name,
        falls=number((n * (slope < -level)).sum(-1) / tokens).within(0.0, 1.0),
        rises=number((n * (slope > level)).sum(-1) / tokens).within(0.0, 1.0),
        slope=number((square * slope).sum(-1) / squares),
        at_one=at_one,
        pull=pull,
        towards=number(towards),
        signal=number(_ratio(towards, loud)),
        tail=tail_index((a - a[_median(n[0])]).abs() * length[0] / n[0], n),
        carried=number(_ratio(carried, torch.ones_like(carried))).within(0.0, 1.0),
        noise=number(noise),
        best_constant=number(best),
        saving=number(_ratio(whole - noise, whole)).within(0.0, 1.0),
    )


def moment(function: Callable[[Tensor], Tensor], column: str = "tokens") -> Measure:
    """The mean of a function of log u, weighted by a column."""
    index = COLUMNS.index(column)

    def mean(points: Tensor, tables: Tensor) -> Tensor:
        weights = tables[:, index]
        return (weights * function(points)).sum(-1) / weights.sum(-1)

    return mean


def quantiles(sums: Sums, shares: Float[Tensor, " Q"]) -> Float[Tensor, " Q"]:
    """Quantiles of log u, to the width of a bin."""
    points, tables = sums.occupied()
    below = tables[0, 0].cumsum(0)
    return points[torch.searchsorted(below, shares.double() * below[-1]).clamp(max=len(points) - 1)]


def tail_index(sizes: Float[Tensor, " X"], counts: Float[Tensor, "K X"]) -> Number | None:
    r"""Hill's index $\alpha$ of the largest hundredth of the sizes, $P(\text{size} > t) \sim t^{-\alpha}$.

    Below 2 their variance is not finite. None if that hundredth holds too few tokens.

    Args:
        sizes: the size of a token in each bin, at least 0.
        counts: tokens in each bin, of all tokens first and then without each group.
    """
    order = torch.argsort(sizes, stable=True)
    sizes, counts = sizes[order], counts[:, order]
    above = counts[0].flip(0).cumsum(0).flip(0) <= _TAIL * counts[0].sum()
    if float((counts[0] * above).sum()) < _FEWEST_IN_TAIL or int(above.sum()) < 2 or float(sizes[above][0]) <= 0:
        return None
    excess = torch.where(above, sizes / sizes[above][0], 1.0).log()
    means = (counts * excess).sum(-1) / (counts * above).sum(-1)
    return number_of(1 / means) if float(means.min()) > 0 else None


def _median(counts: Float[Tensor, " X"]) -> int:
    """The bin of the median."""
    below = counts.cumsum(0)
    return int(torch.searchsorted(below, below[-1] / 2).clamp(max=len(counts) - 1))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """A ratio, 0 where there is nothing to divide: a weight that is constant makes no noise."""
    safe = below > 0
    found = torch.where(safe, above / torch.where(safe, below, 1.0), 0.0)
    return torch.nan_to_num(found, nan=0.0)
