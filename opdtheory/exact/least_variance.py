r"""How little variance an unbiased estimate of one token's $\nabla D_f$ can have, by what the loss holds (T19).

A row has a student $p$ and a teacher $q$; scores are those of the logits, $s_a = e_a - p$. $S$ is the set of the $k$
tokens whose probabilities are known beside those of the sampled token, $T$ the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import check_integer
from opdtheory.exact.sampled_tail import RowScores, row_scores

__all__ = ["Estimate", "LeastVariance", "least_variance"]


class Estimate(NamedTuple):
    """One unbiased estimate, row by row.

    Attributes:
        variance: the trace of the covariance in the logits, `(N,)`.
        constant: the constant that the weight is less, `(N,)`.
    """

    variance: Float[Tensor, " N"]
    constant: Float[Tensor, " N"]


@dataclass(frozen=True)
class LeastVariance:
    r"""What each holding of data leaves to chance. The whole of both distributions leaves nothing.

    The constants of `centred` and `split_level` are known from the data that the estimate uses. Those of the others
    are the best ones, which take both whole distributions: their variances are bounds for any constant.

    Attributes:
        centred: the sampled token with $c = w_f(1)$.
        sampled: the sampled token with its best constant. No loss of its two log-probabilities has less (T19).
        split_level: T13's split with $c = w_f(q(T)/p(T))$, the weight of the rest as one token.
        split: T13's split with its best constant.
        event: the mean over $S$ if the sampled token is in $S$, its own term if not; best constant. Never above
            `sampled`.
        floor: the least that a constant and known vectors can reach together (T19b). Never above the three before.
        leave_one_out: the mean of `group` sampled tokens with leave-one-out baselines, times `group`: variances at
            equal cost (T19c). Its constant is what it tends to, the mean weight.
        squared_gradient: the squared length of the exact gradient, `(N,)`.
    """

    centred: Estimate
    sampled: Estimate
    split_level: Estimate
    split: Estimate
    event: Estimate
    floor: Estimate
    leave_one_out: Estimate
    squared_gradient: Float[Tensor, " N"]


def least_variance(
    student: Float[Tensor, "N V"],
    teacher: Float[Tensor, "N V"],
    divergence: str | Divergence,
    k: int = 1,
    support: str = "teacher",
    group: int = 2,
) -> LeastVariance:
    r"""The variance of unbiased estimates of $\nabla D_f$ on each row, and their constants, in closed form (T19).

    Args:
        student: logits or log-probabilities of the student.
        teacher: those of the teacher.
        divergence: an object or a catalogue name.
        k: the number of tokens that are known beside the sampled one.
        support: whose likeliest tokens these are, `teacher` or `student`.
        group: the number of rollouts of one prompt, for the leave-one-out baseline.

    Raises:
        InvalidArgumentError: shapes differ, a row holds a probability of zero, or an argument is out of range.

    Example:
        >>> rows = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> found = least_variance(*rows, "forward_kl", k=1)
        >>> bool(found.floor.variance < found.sampled.variance < found.leave_one_out.variance)
        True
    """
    check_integer("group", group, 2)
    rows = row_scores(student, teacher, divergence, k, support)
    alone = row_scores(student, teacher, divergence, 0)
    gradient = rows.p * (rows.weight - rows.mean_weight)
    squared = gradient.square().sum(-1)

    parabolas = {"sampled": _split(alone), "split": _split(rows), "event": _event(rows), "floor": _floor(rows)}
    best = {name: found.lowest() for name, found in parabolas.items()}
    at_one = rows.divergence.weight(torch.zeros_like(squared))
    mean = rows.mean_weight.squeeze(-1)
    spread = (rows.p * (rows.weight - rows.mean_weight).square()).sum(-1)
    apart = (spread * (1 - rows.square) + squared) / (group - 1)
    return LeastVariance(
        centred=parabolas["sampled"].at(at_one),
        split_level=parabolas["split"].at(rows.level_weight()),
        leave_one_out=Estimate(parabolas["sampled"].at(mean).variance + apart, mean),
        squared_gradient=squared,
        **best,
    )


class _Parabola(NamedTuple):
    r"""$\mathrm{tr\,Var}(c) = a - 2bc + dc^2$ of an estimate that is affine in its constant."""

    a: Float[Tensor, " N"]
    b: Float[Tensor, " N"]
    d: Float[Tensor, " N"]

    def at(self, c: Tensor) -> Estimate:
        return Estimate((self.a - 2 * self.b * c + self.d * c * c).clamp_min(0.0), c)

    def lowest(self) -> Estimate:
        """The constant of least variance; 0 where every constant is as good."""
        some = self.d > torch.finfo(self.d.dtype).tiny
        return self.at(torch.where(some, self.b / torch.where(some, self.d, 1.0), 0.0))


def _split(rows: RowScores) -> _Parabola:
    """The set's part is the same whatever is sampled."""
    w, one = rows.weight, torch.ones_like(rows.p)
    return _Parabola(*(rows.tail_covariance(x, y) for x, y in ((w, w), (w, one), (one, one))))


def _event(rows: RowScores) -> _Parabola:
    r"""$1_S\,g_S/p(S) + 1_T\,(w - c)\,s$: covariances of its values at two weights."""
    on_set = rows.p * (1 - rows.rest)
    chance = on_set.sum(-1)
    some = chance > 0

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        kept = rows.dot(on_set * x, on_set * y) / torch.where(some, chance, 1.0)
        return rows.tail_moment(x, y) + torch.where(some, kept, 0.0) - rows.dot(rows.p * x, rows.p * y)

    w, one = rows.weight, torch.ones_like(rows.p)
    return _Parabola(covariance(w, w), covariance(w, one), covariance(one, one))


def _floor(rows: RowScores) -> _Parabola:
    r"""The vector of least variance beside each constant: $g_T/p(T)$, projected on the scores of $S$."""
    chosen = rows.chosen
    drawn = rows.p * rows.rest
    chance = drawn.sum(-1)
    some = chance > 0
    on_set = rows.p.gather(-1, chosen)
    size = chosen.shape[-1]
    square = rows.square[:, None, None]
    gram = (
        torch.eye(size, dtype=on_set.dtype, device=on_set.device) - on_set.unsqueeze(-1) - on_set.unsqueeze(-2) + square
    )
    factor = torch.linalg.pinv(gram, hermitian=True)

    def along(x: Tensor) -> Tensor:
        """The tail's vector times each score of the set."""
        pushed = drawn * x
        total, pulled = pushed.sum(-1, keepdim=True), (pushed * rows.p).sum(-1, keepdim=True)
        return pushed.gather(-1, chosen) - on_set * total - pulled + total * rows.square.unsqueeze(-1)

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        both = rows.dot(drawn * x, drawn * y)
        seen = torch.einsum("ni,nij,nj->n", along(x), factor, along(y))
        safe = torch.where(some, chance, 1.0)
        left = rows.tail_moment(x, y) - both / safe + (1 - chance) / safe * (both - seen)
        return torch.where(some, left, 0.0)

    w, one = rows.weight, torch.ones_like(rows.p)
    return _Parabola(covariance(w, w), covariance(w, one), covariance(one, one))
