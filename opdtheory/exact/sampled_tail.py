r"""The variance of one token's gradient: some tokens summed exactly, the sampled one standing for the rest (T7a, T13).

A row has a student $p$ and a teacher $q$, a set $S$ of tokens that are summed and a constant $c$. In the logits, with
scores $s_a = e_a - p$, the estimate is $-\sum_{a\in S} p_a (w_a - c)\,s_a - 1[y\notin S]\,(w_y - c)\,s_y$, whose first
part is known. An empty $S$ is OPD+ with the baseline $c$.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError, check_integer

__all__ = ["TailMoments", "tail_moments"]


@dataclass(frozen=True)
class TailMoments:
    """What a split of the vocabulary leaves to chance, row by row.

    Attributes:
        variance: the trace of the covariance in the logits with the given constant, `(N,)`.
        constant: the constant of least variance, `(N,)`; 0 where every constant is as good.
        least: the variance with that constant, `(N,)`.
        rest: the variance with the weight of the other tokens as one for a constant (T19b), `(N,)`.
        squared_gradient: the squared length of the exact gradient, `(N,)`.
    """

    variance: Float[Tensor, " N"]
    constant: Float[Tensor, " N"]
    least: Float[Tensor, " N"]
    rest: Float[Tensor, " N"]
    squared_gradient: Float[Tensor, " N"]

    @property
    def relative(self) -> float:
        """The variance of the given constant over all rows, relative to their squared gradients."""
        return float(self.variance.sum() / self.squared_gradient.sum())

    @property
    def least_relative(self) -> float:
        """The variance of each row's best constant, likewise."""
        return float(self.least.sum() / self.squared_gradient.sum())

    @property
    def rest_relative(self) -> float:
        """The variance of the weight of the rest, likewise."""
        return float(self.rest.sum() / self.squared_gradient.sum())


def tail_moments(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    divergence: str | Divergence,
    k: int = 0,
    support: str = "teacher",
    constant: float = 0.0,
) -> TailMoments:
    r"""The variance of the split estimate of $\nabla D_f$ on each row, in closed form (T13).

    With $T$ the tokens outside $S$, $\mathrm{tr\,Var} = E_p[1_T (w - c)^2|s|^2] - |E_p[1_T (w - c)\,s]|^2$, a parabola
    in $c$.

    Args:
        student: logits or log-probabilities of the student.
        teacher: those of the teacher.
        divergence: an object or a catalogue name.
        k: the number of tokens that are summed; 0 for the sampled token alone.
        support: whose likeliest tokens these are, `teacher` or `student`.
        constant: the constant $c$, in the unit of the weight.

    Raises:
        InvalidArgumentError: shapes differ, a row holds a probability of zero, or an argument is out of range.

    Example:
        >>> rows = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> found = tail_moments(*rows, "forward_kl", k=1)
        >>> bool(found.variance > found.least) and bool(found.least > 0)
        True
    """
    rows = row_scores(student, teacher, divergence, k, support)
    weight, ones = rows.weight, torch.ones_like(rows.p)
    top, bottom = rows.tail_covariance(weight, ones), rows.tail_covariance(ones, ones)
    some = bottom > torch.finfo(bottom.dtype).tiny
    best = torch.where(some, top / torch.where(some, bottom, 1.0), 0.0)

    def spread(c: Tensor) -> Tensor:
        centred = weight - c.unsqueeze(-1)
        return rows.tail_covariance(centred, centred).clamp_min(0.0)

    gradient = rows.p * (weight - rows.mean_weight)
    squared = gradient.square().sum(-1)
    given, level = torch.full_like(best, constant), rows.level_weight()
    return TailMoments(spread(given), best, spread(best), spread(level), squared)


@dataclass(frozen=True)
class RowScores:
    """Rows of weights and the inner products of their scores.

    Attributes:
        divergence: whose weight it is.
        p: the student's probabilities, `(N, V)`.
        log_u: the log-ratios, `(N, V)`.
        weight: the weight of each token, `(N, V)`.
        chosen: the tokens that are summed, `(N, k)`.
        rest: one on the other tokens, zero on these, `(N, V)`.
    """

    divergence: Divergence
    p: Float[Tensor, "N V"]
    log_u: Float[Tensor, "N V"]
    weight: Float[Tensor, "N V"]
    chosen: Tensor
    rest: Float[Tensor, "N V"]

    @property
    def square(self) -> Float[Tensor, " N"]:
        """$|p|^2$."""
        return self.p.square().sum(-1)

    @property
    def mean_weight(self) -> Float[Tensor, "N 1"]:
        """$E_p[w]$."""
        return (self.p * self.weight).sum(-1, keepdim=True)

    def level_weight(self) -> Float[Tensor, " N"]:
        """The weight of all tokens that are not summed, taken as one; that of ratio one if there are none."""
        drawn = self.p * self.rest
        mass, other = drawn.sum(-1), (drawn * self.log_u.exp()).sum(-1)
        some = mass > 0
        ratio = torch.where(some, other, 1.0) / torch.where(some, mass, 1.0)
        return self.divergence.weight(ratio.log())

    def dot(self, left: Tensor, right: Tensor) -> Float[Tensor, " N"]:
        r"""$\sum_a x_a s_a \cdot \sum_b y_b s_b$."""
        one, other = left.sum(-1), right.sum(-1)
        along = (left * right).sum(-1) - one * (right * self.p).sum(-1) - other * (left * self.p).sum(-1)
        return along + one * other * self.square

    def tail_moment(self, left: Tensor, right: Tensor) -> Float[Tensor, " N"]:
        r"""$E_p[1_T x y |s|^2]$."""
        norms = 1 - 2 * self.p + self.square.unsqueeze(-1)
        return (self.p * self.rest * left * right * norms).sum(-1)

    def tail_covariance(self, left: Tensor, right: Tensor) -> Float[Tensor, " N"]:
        r"""$E_p[1_T x y |s|^2] - E_p[1_T x s] \cdot E_p[1_T y s]$."""
        drawn = self.p * self.rest
        return self.tail_moment(left, right) - self.dot(drawn * left, drawn * right)


def row_scores(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    divergence: str | Divergence,
    k: int = 0,
    support: str = "teacher",
) -> RowScores:
    """The rows that `tail_moments` and `least_variance` take; arguments and errors as there."""
    divergence = as_divergence(divergence)
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise InvalidArgumentError("teacher", f"must have the student's shape, (N, V), got {shapes}")
    check_integer("k", k, 0, student.shape[-1])
    if support not in ("teacher", "student"):
        raise InvalidArgumentError("support", f"must be teacher or student, got {support!r}")
    log_p, log_q = (x.detach().double().log_softmax(-1) for x in (student, teacher))
    for name, values in (("student", log_p), ("teacher", log_q)):
        if not bool(torch.isfinite(values).all()):
            raise InvalidArgumentError(name, "must give every token a positive probability")
    chosen = (log_q if support == "teacher" else log_p).topk(k, -1).indices
    rest = torch.ones_like(log_p).scatter(-1, chosen, 0.0)
    return RowScores(divergence, log_p.exp(), log_q - log_p, divergence.weight(log_q - log_p), chosen, rest)
