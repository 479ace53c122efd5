r"""Bias and variance of an estimator at each history, in closed form over the vocabulary.

A row is a history with its student $p$ and teacher $q$; scores are those of the logits, $s_a = e_a - p$. An estimator
that weighs the sampled token by $A - c$ has the bias $E_p[(w_f - A)\,s]$ and the variance
$E_p[(A - c)^2|s|^2] - |E_p[A s]|^2$; one that sums has a bias alone (T7, T9); T13's split has a variance alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.exact.sampled_tail import RowScores, row_scores
from opdtheory.monitoring.advice.candidates import Candidate
from opdtheory.monitoring.weights import weight_of

__all__ = ["Groups", "Histories", "RowMoments", "Sizes"]

# Bins of the logarithm of an outcome's size, in nats.
_STEP, _EDGE = 0.05, 800.0


@dataclass(frozen=True)
class RowMoments:
    r"""What one sampled token's gradient is at each history.

    Attributes:
        bias: the expected gradient less the exact one, in the logits, `(N, V)`; None where it is zero for certain.
        variance: the trace of the covariance, `(N,)`; of a group, what its rollouts have in common is in `pairs`.
        pairs: the product of the noise of two tokens of a group is $J_{ij}$ times the product of their gradients; the
            factor, `(N,)`, or None.
    """

    bias: Float[Tensor, "N V"] | None
    variance: Float[Tensor, " N"]
    pairs: Float[Tensor, " N"] | None = None


@dataclass(frozen=True)
class Groups:
    """Which rows a group baseline compares: those of one prompt's rollouts at one position.

    Attributes:
        number: of the set that a row is in, `(N,)`.
        sizes: the number of rows in that set, `(N,)`.
        group: rollouts of a prompt: the largest size.
    """

    number: Int64[Tensor, " N"]
    sizes: Float[Tensor, " N"]
    group: int

    @classmethod
    def of(cls, number: Int64[Tensor, " N"], group: int) -> Groups:
        """From the number of each row's set."""
        _, inverse, counts = number.unique(return_inverse=True, return_counts=True)
        return cls(inverse, counts[inverse].double(), group)

    def others(self, values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """The sum over the other rows of the set."""
        total = torch.zeros(int(self.number.max()) + 1, dtype=values.dtype).index_add(0, self.number, values)
        return total[self.number] - values


@dataclass(frozen=True)
class Histories:
    """Rows of one target divergence.

    Attributes:
        divergence: the target.
        student: log-probabilities or logits, `(N, V)`.
        teacher: likewise.
        groups: sets of rows that a group baseline compares; None without groups.
    """

    divergence: Divergence
    student: Float[Tensor, "N V"]
    teacher: Float[Tensor, "N V"]
    groups: Groups | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {})

    def rows(self, k: int) -> RowScores:
        """The rows with the teacher's `k` likeliest tokens apart."""
        kept: dict[int, RowScores] = self.__dict__["_rows"]
        if k not in kept:
            kept[k] = row_scores(self.student, self.teacher, self.divergence, k)
        return kept[k]

    def gradient(self) -> Float[Tensor, "N V"]:
        r"""The exact gradient in the logits, $-p_a (w_a - E_p w)$ (T1)."""
        rows = self.rows(0)
        return -_score_mean(rows.p, rows.weight)

    def moments(self, candidate: Candidate, largest: float = math.inf) -> RowMoments:
        """Bias and variance at each row, of outcomes that are no larger than that, see `Sizes`."""
        name = candidate.loss.name
        zero = torch.zeros(len(self.student), dtype=torch.float64)
        if name == "full_vocab":
            return RowMoments(None, zero)
        if name in _COARSE:
            rows = self.rows(candidate.k)
            return RowMoments(_score_mean(rows.p, rows.weight - _COARSE[name](rows)), zero)
        drawn = self._drawn(candidate)
        rows, bias = drawn.rows, None
        if name != "topk_tail_sampled":
            bias = _score_mean(rows.p, rows.weight - drawn.advantage)
        if largest < math.inf:
            seen = (drawn.sizes() <= largest).double()
            lost = rows.p * rows.rest * (1 - seen) * drawn.centred
            lost = lost - rows.p * lost.sum(-1, keepdim=True)
            bias = lost if bias is None else bias + lost
            drawn = drawn._replace(rows=replace(rows, rest=rows.rest * seen))
        if candidate.grouped:
            assert bias is not None
            return self._grouped(candidate, drawn, bias)
        return RowMoments(bias, drawn.spread())

    def add_sizes(self, candidate: Candidate, sizes: Sizes) -> None:
        """Count how likely outcomes of every size are at these rows."""
        if candidate.loss.name != "full_vocab" and candidate.loss.name not in _COARSE:
            drawn = self._drawn(candidate)
            sizes.add(drawn.sizes(), drawn.rows.p * drawn.rows.rest)

    def parabola(self, candidate: Candidate) -> tuple[float, float]:
        """The two sums whose ratio is the constant of least variance for all rows together (T19)."""
        rows = self.rows(candidate.k)
        ones = torch.ones_like(rows.p)
        return float(rows.tail_covariance(rows.weight, ones).sum()), float(rows.tail_covariance(ones, ones).sum())

    def _drawn(self, candidate: Candidate) -> _Drawn:
        """What the sampled token is multiplied with at each row, without what is summed."""
        rows, split = self.rows(candidate.k), candidate.loss.name == "topk_tail_sampled"
        advantage = rows.weight if split else weight_of(candidate.loss)(rows.log_u.flatten()).view_as(rows.log_u)
        return _Drawn(rows, advantage, self._constant(candidate, rows, advantage))

    def _constant(self, candidate: Candidate, rows: RowScores, advantage: Tensor) -> Tensor:
        """What is taken off the weight of each row's token, `(N,)`; of a group, its expectation."""
        baseline = candidate.loss.settings.get("baseline")
        mean = (rows.p * advantage).sum(-1)
        if baseline == "vocabulary":
            return mean
        if candidate.grouped:
            assert self.groups is not None
            return self.groups.others(mean) / (self.groups.sizes - 1).clamp_min(1.0)
        if baseline == "rest":
            return rows.level_weight()
        if baseline == "optimal":
            ones = torch.ones_like(rows.p)
            top, bottom = rows.tail_covariance(advantage, ones), rows.tail_covariance(ones, ones)
            some = bottom > torch.finfo(bottom.dtype).tiny
            return torch.where(some, top / torch.where(some, bottom, 1.0), 0.0)
        value = candidate.loss.settings.get("baseline_value", 0.0) if baseline == "constant" else 0.0
        return torch.full_like(mean, float(value))

    def _grouped(self, candidate: Candidate, drawn: _Drawn, bias: Tensor) -> RowMoments:
        r"""The mean of the $m - 1$ others is a constant that is drawn: $\mathrm{Var}(c)\,E|s|^2$ is added (T19c)."""
        assert self.groups is not None
        rows, advantage = drawn.rows, drawn.advantage
        others = (self.groups.sizes - 1).clamp_min(1.0)
        seen = rows.p * rows.rest
        mean = (seen * advantage).sum(-1, keepdim=True)
        apart = (seen * (advantage - mean).square()).sum(-1)
        variance = drawn.spread() + self.groups.others(apart) / others.square() * (1 - rows.square)
        pairs = torch.where(self.groups.sizes > 1, others.pow(-2), 0.0)
        if candidate.loss.settings["baseline"] == "leave_one_out":
            return RowMoments(bias, variance, pairs)
        # A mean that holds the rollout itself is the same times (m - 1)/m (T7e), of which (G - 1)/G is but a scale.
        share = (1 - 1 / self.groups.sizes) / (1 - 1 / self.groups.group)
        short = (self.gradient() + bias) * (share - 1).unsqueeze(-1)
        return RowMoments(bias + short, variance * share.square(), pairs)


class _Drawn(NamedTuple):
    r"""The sampled part $-1[y\notin S]\,(A_y - c)\,s_y$ of each row."""

    rows: RowScores
    advantage: Float[Tensor, "N V"]
    constant: Float[Tensor, " N"]

    @property
    def centred(self) -> Float[Tensor, "N V"]:
        return self.advantage - self.constant.unsqueeze(-1)

    def spread(self) -> Float[Tensor, " N"]:
        """The trace of its covariance."""
        return self.rows.tail_covariance(self.centred, self.centred).clamp_min(0.0)

    def sizes(self) -> Float[Tensor, "N V"]:
        """The length of the gradient that each token makes, in the logits."""
        norms = (1 - 2 * self.rows.p + self.rows.square.unsqueeze(-1)).clamp_min(0.0)
        return self.centred.abs() * norms.sqrt()


class Sizes:
    """How likely outcomes of every size are, summed over rows: outcomes too rare for a run are told by their size."""

    def __init__(self) -> None:
        self.table = torch.zeros(round(2 * _EDGE / _STEP), dtype=torch.float64)

    def add(self, sizes: Float[Tensor, "N V"], chance: Float[Tensor, "N V"]) -> None:
        """Add outcomes with their probabilities."""
        place = ((sizes.clamp_min(1e-300).log() + _EDGE) / _STEP).long().clamp(0, len(self.table) - 1)
        self.table += torch.bincount(place.flatten(), chance.flatten(), len(self.table))

    def largest(self, chance: float) -> float:
        """The size above which all outcomes together have at most this probability."""
        above = self.table.flip(0).cumsum(0).flip(0)
        few = (above <= chance).nonzero()
        return math.exp(int(few[0]) * _STEP - _EDGE) if len(few) and int(few[0]) * _STEP - _EDGE < 700 else math.inf


def _score_mean(p: Tensor, values: Tensor) -> Tensor:
    r"""$E_p[x s]$ in the logits."""
    return p * (values - (p * values).sum(-1, keepdim=True))


def _truncated(rows: RowScores) -> Tensor:
    return rows.weight * (1 - rows.rest)


def _tail(rows: RowScores) -> Tensor:
    return torch.where(rows.rest > 0, rows.level_weight().unsqueeze(-1), rows.weight)


def _renormalised(rows: RowScores) -> Tensor:
    on_set = rows.p * (1 - rows.rest)
    ours, theirs = on_set.sum(-1, keepdim=True), (on_set * rows.log_u.exp()).sum(-1, keepdim=True)
    weight = rows.divergence.weight(rows.log_u + (ours / theirs).log()) * (1 - rows.rest)
    conditional = on_set / ours
    return (weight - (conditional * weight).sum(-1, keepdim=True)) / ours * (1 - rows.rest)


# The weight of each token whose expectation is the gradient of a coarser divergence (T9).
_COARSE = {"topk_truncated": _truncated, "topk_tail": _tail, "topk_renormalised": _renormalised}
