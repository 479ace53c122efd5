"""The prefix tree of a pair of policies, level by level, and the recursions that run over it.

Level `n` holds the `V**n` prefixes of length `n` in the order of the tables' rows, so that the children of prefix `h`
are the rows `h * V + a` of the next level. All work is done on whole levels. A tree may also begin at several prefixes
of one length, side by side, and end before its sequences do: in this way `opdtheory.exact.subtrees` goes through trees
that are too large for memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact.policies import Policy
from opdtheory.exact.ratios import log_ratio

__all__ = ["LEAF_BUDGET", "Roots", "Tree", "check_leaves", "check_pair", "pointwise", "row_gradient"]

# Sequences that one tree may hold: about 1 GB of float64 for the handful of arrays per level.
LEAF_BUDGET = 2**24

# Two tables of one environment differ by rounding only.
_SAME_DISTRIBUTION = 1e-12


def check_pair(student: Policy, other: Policy, name: str = "teacher") -> None:
    """Raise unless two policies range over the same sequences in the same environment.

    Args:
        student: the policy that is trained.
        other: the policy that goes with it.
        name: the other policy's name in the message.

    Raises:
        InvalidArgumentError: vocabulary, horizon, end-of-sequence token, or what the environment writes differ.
    """
    for argument, policy in (("student", student), (name, other)):
        if not isinstance(policy, Policy):
            raise InvalidArgumentError(argument, f"must be a Policy, got {type(policy).__name__}")
    for field in ("vocab_size", "horizon", "eos", "environment"):
        ours, theirs = getattr(student, field), getattr(other, field)
        if ours != theirs:
            raise InvalidArgumentError(name, f"must have the student's {field}={ours}, got {field}={theirs}")
    if student.environment:
        _check_environment(student, other, name)


def _check_environment(student: Policy, other: Policy, name: str) -> None:
    """Raise unless both policies have the same distribution where the environment writes."""
    ours, theirs = student.tables(), other.tables()
    for n in student.environment:
        gap = float((ours[n].detach().softmax(-1) - theirs[n].detach().softmax(-1)).abs().max())
        if gap > _SAME_DISTRIBUTION:
            raise InvalidArgumentError(
                name,
                f"must have the student's distribution at the environment's position {n}, which differs by {gap:.3g}",
            )


def check_leaves(student: Policy, budget: int) -> None:
    """Raise if a tree has more sequences than a budget.

    Raises:
        BudgetExceededError: with both counts.
    """
    leaves = student.vocab_size**student.horizon
    if leaves > budget:
        raise BudgetExceededError(
            f"the prefix tree of V={student.vocab_size}, T={student.horizon}",
            leaves,
            budget,
            "lower the horizon, use a FiniteStatePolicy, or raise budget",
        )


def _positive(log_p: Tensor) -> bool:
    """Whether the student lacks no token. Where the teacher does, `u = 0` is a ratio like any other."""
    return math.isfinite(log_p.detach().sum())


# Sums of exponentials whose logarithm loses no digits, so that the largest logit need not be subtracted.
_MODERATE = 1e-9, 1e9


def pointwise(
    divergence: Divergence, log_p: Tensor, log_q: Tensor, p: Tensor | None = None, log_u: Tensor | None = None
) -> Tensor:
    r"""The terms of $D_f(q\|p)$ in the gauge of slope zero at one (T3), $p\,f(q/p) - f'(1)(q - p) \ge 0$.

    They are $q (f'(\infty) - f'(1))$ where $p = 0 < q$ and 0 where both vanish (T10), and add up to the divergence of
    two distributions without cancelling. Here and below, `p` saves its exponentials, and `log_u` is the difference
    of `log_q` and `log_p` unless it is given with more digits.
    """
    p = log_p.exp() if p is None else p
    log_u = log_q - log_p if log_u is None else log_u
    if _positive(log_p):
        return p * divergence.remainder(log_u)
    both_zero = torch.isneginf(log_p) & torch.isneginf(log_q)
    only_q = torch.isneginf(log_p) & ~torch.isneginf(log_q)
    terms = p * divergence.remainder(torch.where(both_zero | only_q, 0.0, log_u))
    if only_q.any():
        terms = torch.where(only_q, log_q.exp() * (divergence.slope_at_infinity - divergence.slope_at_one), terms)
    return torch.where(both_zero, 0.0, terms)


def row_gradient(
    divergence: Divergence, log_p: Tensor, log_q: Tensor, p: Tensor | None = None, log_u: Tensor | None = None
) -> Tensor:
    r"""Gradient of $D_f(q\|p)$ in the logits of each row: $-p_a (w(u_a) - E_p w)$ (T1); infinite where $D_f$ is."""
    p = log_p.exp() if p is None else p
    log_u = log_q - log_p if log_u is None else log_u
    if _positive(log_p):
        weight = divergence.centred_weight(log_u)
        return -p * (weight - (p * weight).sum(-1, keepdim=True))
    absent = torch.isneginf(log_p)
    weight = divergence.centred_weight(torch.where(absent, 0.0, log_u))
    gradient = -p * (weight - (p * weight).sum(-1, keepdim=True))
    if math.isinf(divergence.slope_at_infinity):
        # The term q f'(inf) of an absent token is a constant in p, but an infinite one.
        gradient = torch.where(absent & ~torch.isneginf(log_q), torch.inf, gradient)
    return gradient


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of many short rows, for which torch's own function takes four times as long."""
    total = logits.exp().sum(-1, keepdim=True)
    if logits.numel() and _MODERATE[0] < total.detach().min() and total.detach().max() < _MODERATE[1]:
        return logits - total.log()
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


class Roots(NamedTuple):
    """The prefixes at which a tree begins: log-probabilities, log-ratio, whether they can be extended, `(R,)` each."""

    log_p: Tensor
    log_q: Tensor
    log_u: Tensor
    live: Tensor

    @classmethod
    def empty(cls) -> Roots:
        """The empty prefix alone."""
        return cls(torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1, dtype=torch.bool))


@dataclass(frozen=True)
class Tree:
    """Both policies' conditional log-probabilities and the log-probability of each prefix.

    Attributes:
        eos: the token that ends a sequence, or None.
        log_p: the student's, level `n` of shape `(V**n, V)`.
        log_q: the teacher's.
        log_u: their log-ratios, with more digits than `log_q - log_p` has where they are nearly equal.
        prefix_log_p: the student's log-probability of each live prefix, `-inf` where it has ended, level `n` of shape
            `(V**n,)`, with one more level for the complete sequences.
        prefix_log_q: the teacher's.
        prefix_log_u: the log-ratio of each prefix.
        live: whether a prefix can still be extended, level `n` of shape `(V**n,)`.
        environment: the levels whose tokens the environment writes; `log_p` and `log_q` both hold its distribution.
        first: the length of the prefixes at which the tree begins, which counts for the discount.
        cut: whether sequences go on below the last level.
    """

    eos: int | None
    log_p: list[Tensor]
    log_q: list[Tensor]
    log_u: list[Tensor]
    prefix_log_p: list[Tensor]
    prefix_log_q: list[Tensor]
    prefix_log_u: list[Tensor]
    live: list[Tensor]
    environment: tuple[int, ...] = ()
    first: int = 0
    cut: bool = False

    @classmethod
    def build(cls, student: Policy, teacher: Policy, budget: int = LEAF_BUDGET) -> Tree:
        """The tree of a pair.

        Raises:
            InvalidArgumentError: the policies do not match.
            BudgetExceededError: more than `budget` sequences.
        """
        check_pair(student, teacher)
        check_leaves(student, budget)
        return cls.grown(student.tables(), teacher.tables(), Roots.empty(), student.eos, student.environment)

    @classmethod
    def grown(
        cls,
        student: list[Tensor],
        teacher: list[Tensor],
        roots: Roots,
        eos: int | None,
        environment: tuple[int, ...] = (),
        first: int = 0,
        cut: bool = False,
    ) -> Tree:
        """The tree of two tables' rows below some prefixes, with the environment's levels counted from there."""
        log_p, log_q = [_log_softmax(z) for z in student], [_log_softmax(z) for z in teacher]
        log_u = [log_ratio(ours, theirs, p) for ours, theirs, p in zip(student, teacher, log_p, strict=True)]
        for n in environment:
            # The same distribution for both, to the last bit, so that the ratio is exactly one.
            log_p[n] = log_q[n] = log_p[n].detach()
            log_u[n] = torch.zeros_like(log_p[n])
        prefix_log_p, prefix_log_q = [roots.log_p.double()], [roots.log_q.double()]
        prefix_log_u, live = [roots.log_u.double()], [roots.live]
        prefixes = (prefix_log_p, prefix_log_q, prefix_log_u)
        for n, p in enumerate(log_p):
            for found, rows in zip(prefixes, (p, log_q[n], log_u[n]), strict=True):
                found.append((found[-1].unsqueeze(-1) + rows).flatten())
            children = live[-1].unsqueeze(-1).expand_as(p).clone()
            if eos is not None and n not in environment:
                children[:, eos] = False
            live.append(children.flatten())
        return cls(eos, log_p, log_q, log_u, *prefixes, live, environment, first, cut)

    @property
    def horizon(self) -> int:
        """The number of levels with rows."""
        return len(self.log_p)

    def reach(self, level: int) -> Tensor:
        """The probability that the student visits each prefix of a level and must choose a token there."""
        if level in self.environment:
            return torch.zeros_like(self.prefix_log_p[level])
        return torch.where(self.live[level], self.prefix_log_p[level].exp(), 0.0)

    def ends(self, level: int) -> Tensor:
        """Whether the child of a level's prefix completes a sequence, `(V**level, V)`."""
        shape = self.log_p[level].shape
        live = self.live[level].unsqueeze(-1)
        if level + 1 == self.horizon and not self.cut:
            return live.expand(shape)
        return live & ~self.live[level + 1].view(shape)

    def rows_divergence(self, divergence: Divergence, level: int, p: Tensor | None = None) -> Tensor:
        """$D_f$ of each row of a level, zero for prefixes that the student cannot reach."""
        values = pointwise(divergence, self.log_p[level], self.log_q[level], p, self.log_u[level]).sum(-1)
        return torch.where(self.reach(level) > 0, values, 0.0)
