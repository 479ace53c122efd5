r"""Dynamic programming for two finite-state policies, at horizons that cannot be enumerated.

The rows are pairs of states. The token objectives need the number of visits of each row and what is still to come
from it. The sequence objective factors along the chain only for some generators: $\log U$ adds, so the KL divergences
are sums over rows; $U^\alpha$ multiplies, so the power divergences are products over rows. Every other generator
raises an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact.finite_state import FiniteStatePolicy
from opdtheory.exact.ratios import log_ratio
from opdtheory.exact.tree import pointwise, row_gradient

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["Chain", "gradient", "value"]

# Generators that are a multiple of a Cressie-Read generator up to gauge: name -> (alpha, factor).
_POWERS = {"chi2": (2.0, 2.0), "neyman_chi2": (-1.0, 2.0), "hellinger": (0.5, 0.5)}

# Numbers that one sweep may keep, the visits of every row at every position: 1 GB.
_KEPT = 2**27


@dataclass(frozen=True)
class Chain:
    """Both policies' conditional log-probabilities on the pairs of states that can occur together.

    Attributes:
        log_p: the student's, `(S, V)`; row 0 is the start.
        log_q: the teacher's.
        log_u: their log-ratios, with more digits than `log_q - log_p` has where they are nearly equal.
        successors: the row that follows a row and a token, `(S, V)`; `S` where the sequence has ended.
        student_states: the student's state of each row, `(S,)`.
        horizon: length cap `T`.
    """

    log_p: Tensor
    log_q: Tensor
    log_u: Tensor
    successors: Tensor
    student_states: Tensor
    horizon: int

    @classmethod
    def build(cls, student: FiniteStatePolicy, teacher: FiniteStatePolicy) -> Chain:
        """The chain of a pair that `check_pair` accepts."""
        ours, theirs, successors = _pairs(student, teacher)
        if student.eos is not None:
            successors[:, student.eos] = len(ours)
        logits = student.state_logits.detach()[ours], teacher.state_logits.detach()[theirs]
        log_p, log_q = (torch.log_softmax(rows, -1) for rows in logits)
        return cls(log_p, log_q, log_ratio(*logits, log_p), successors, ours, student.horizon)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.log_p)

    def visits(self, log_distribution: Tensor) -> Iterator[Tensor]:
        """The probability that a position reads each row under a distribution, `(S,)`, for each position in turn."""
        forward = self._steps(log_distribution).T.tocsr()
        visits = np.zeros(self.rows)
        visits[0] = 1.0
        for _ in range(self.horizon):
            yield torch.from_numpy(visits)
            visits = (forward @ visits)[:-1]

    def to_come(self, own: Tensor, gamma: float) -> Iterator[np.ndarray]:
        """The discounted sum of the rows' costs from the next row on, `(S + 1,)`, the last position first."""
        backward, costs = self._steps(self.log_p), own.numpy()
        after = np.zeros(self.rows + 1)
        for _ in range(self.horizon):
            yield after
            after = np.append(costs + gamma * (backward @ after), 0.0)

    def _steps(self, log_distribution: Tensor) -> csr_array:
        """The probabilities of going from each row to each row and to the end, `(S, S + 1)`."""
        from scipy.sparse import csr_array

        distribution, size = log_distribution.exp().numpy(), log_distribution.shape[-1]
        # Tokens that lead to the same row add up.
        where = (np.repeat(np.arange(self.rows), size), self.successors.numpy().ravel())
        return csr_array((distribution.ravel(), where), shape=(self.rows, self.rows + 1))

    def kept_visits(self, log_distribution: Tensor) -> Tensor:
        """`visits` of all positions, `(T, S)`, within a budget."""
        size = self.horizon * self.rows
        if size > _KEPT:
            what = f"keeping the visits of {self.rows} rows at {self.horizon} positions"
            raise BudgetExceededError(what, size, _KEPT, "lower the horizon or the number of states")
        return torch.stack(list(self.visits(log_distribution)))

    def by_state(self, rows: Tensor, states: int) -> Tensor:
        """Sums over the rows that share a state of the student."""
        total = torch.zeros(states, rows.shape[-1], dtype=torch.float64)
        return total.index_add_(0, self.student_states, rows)


def value(
    student: FiniteStatePolicy, teacher: FiniteStatePolicy, divergence: Divergence, objective: str, gamma: float
) -> Tensor:
    """The objective's value; arguments as `exact_value`, which checks them."""
    chain = Chain.build(student, teacher)
    if objective == "sequence":
        return _sum([factor * part for factor, part, _ in _sequence_parts(chain, divergence)])
    return _value(chain, divergence, gamma if objective == "token_return" else 1.0)


def gradient(
    student: FiniteStatePolicy, teacher: FiniteStatePolicy, divergence: Divergence, objective: str, gamma: float
) -> list[Tensor]:
    """The gradient in `student.parameters()`; arguments as `exact_gradient`, which checks them."""
    chain = Chain.build(student, teacher)
    if objective == "sequence":
        rows = _sum([factor * part for factor, _, part in _sequence_parts(chain, divergence)])
    else:
        rows = _gradient(chain, divergence, objective, gamma)
    return student.by_parameter(chain.by_state(rows, len(student.successors)))


def _pairs(student: FiniteStatePolicy, teacher: FiniteStatePolicy) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of states that can occur together, the start first, and the pair that follows each pair and token."""
    if student.start == teacher.start == 0 and torch.equal(student.successors, teacher.successors):
        states = torch.arange(len(student.successors))
        return states, states, student.successors.clone()
    width = len(teacher.successors)
    found = torch.tensor([student.start * width + teacher.start])
    edge = found
    while len(edge):
        ours, theirs = student.successors[edge // width], teacher.successors[edge % width]
        after = (ours * width + theirs).unique()
        edge = after[~torch.isin(after, found)]
        found = torch.cat([found, edge])
    ordered, position = found.sort()
    after = student.successors[found // width] * width + teacher.successors[found % width]
    return found // width, found % width, position[torch.searchsorted(ordered, after)]


def _discounted_visits(chain: Chain, gamma: float) -> tuple[Tensor, Tensor]:
    """The discounted sum of the visits of each row, and whether it counts, which a discount that underflows hides."""
    total, met = torch.zeros(chain.rows, dtype=torch.float64), torch.zeros(chain.rows, dtype=torch.bool)
    discount = 1.0
    for visits in chain.visits(chain.log_p):
        total += discount * visits
        met |= visits > 0
        discount *= gamma
        if gamma == 0.0:
            break
    return total, met


def _rows(chain: Chain, divergence: Divergence, met: Tensor) -> Tensor:
    """The divergence of each row that counts."""
    values = pointwise(divergence, chain.log_p, chain.log_q, log_u=chain.log_u).sum(-1)
    return torch.where(met, values, 0.0)


def _value(chain: Chain, divergence: Divergence, gamma: float) -> Tensor:
    visits, met = _discounted_visits(chain, gamma)
    rows = _rows(chain, divergence, met)
    # A divergence that is infinite stays so, however small its factor.
    return torch.where(torch.isinf(rows), rows, visits * rows).sum()


def _gradient(chain: Chain, divergence: Divergence, objective: str, gamma: float) -> Tensor:
    kept = chain.kept_visits(chain.log_p) if objective == "token_return" else None
    if kept is None:
        visits, met = _discounted_visits(chain, 1.0)
    else:
        visits = gamma ** torch.arange(chain.horizon, dtype=torch.float64) @ kept
        met = (kept[:1] if gamma == 0.0 else kept).amax(0) > 0
    rows = row_gradient(divergence, chain.log_p, chain.log_q, log_u=chain.log_u)
    rows = torch.where(met.unsqueeze(-1), visits.unsqueeze(-1) * rows, 0.0)
    if kept is not None and gamma != 0.0:
        rows += _later_rows(chain, _rows(chain, divergence, met), gamma, kept.numpy())
    return rows


def _later_rows(chain: Chain, own: Tensor, gamma: float, visits: np.ndarray) -> Tensor:
    """The part of the gradient of `token_return` that credits a token with the rows that follow it."""
    successors = chain.successors.numpy()
    sums, terms = np.zeros(successors.shape), np.empty(successors.shape)
    # An infinite cost leaves NaN, for which `exact_gradient` raises.
    with np.errstate(invalid="ignore"):
        for n, after in zip(reversed(range(chain.horizon)), chain.to_come(own, gamma), strict=True):
            np.take(after, successors, out=terms, mode="clip")
            terms *= gamma ** (n + 1) * visits[n][:, np.newaxis]
            sums += terms
    p, expected = chain.log_p.exp(), torch.from_numpy(sums)
    return p * (expected - (p * expected).sum(-1, keepdim=True))


def _sequence_parts(chain: Chain, divergence: Divergence) -> list[tuple[float, Tensor, Tensor]]:
    """`(factor, value, gradient by row)` of the factoring divergences that add up to this one."""
    name = divergence.name
    if name == "reverse_kl":
        return [(1.0, *_reverse(chain))]
    if name == "forward_kl":
        return [(1.0, *_forward(chain))]
    if name == "jeffreys":
        return [(1.0, *_forward(chain)), (1.0, *_reverse(chain))]
    if name == "alpha":
        alpha, factor = divergence.parameters["alpha"], 1.0
    elif name in _POWERS:
        alpha, factor = _POWERS[name]
    else:
        raise InvalidArgumentError(
            "divergence",
            f"must factor along a chain for whole sequences, got {divergence.label}; "
            f"use a KL, jeffreys, alpha, {', '.join(_POWERS)}, or tabulate() a short chain",
        )
    return [(factor, *_power(chain, as_divergence("alpha", alpha=alpha)))]


def _reverse(chain: Chain) -> tuple[Tensor, Tensor]:
    r"""$KL(P\|Q) = E_P \sum_n -\log u_n$ by the chain rule: the undiscounted return of the rows."""
    reverse_kl = as_divergence("reverse_kl")
    return _value(chain, reverse_kl, 1.0), _gradient(chain, reverse_kl, "token_return", 1.0)


def _forward(chain: Chain) -> tuple[Tensor, Tensor]:
    r"""$KL(Q\|P) = E_Q \sum_n \log u_n$ and its gradient: the rows weighted by the teacher's visits."""
    forward_kl = as_divergence("forward_kl")
    visits = _sum(chain.visits(chain.log_q))
    met = (visits > 0).unsqueeze(-1)
    terms = pointwise(forward_kl, chain.log_p, chain.log_q, log_u=chain.log_u)
    rows = row_gradient(forward_kl, chain.log_p, chain.log_q, log_u=chain.log_u)
    weights = visits.unsqueeze(-1)
    return torch.where(met, weights * terms, 0.0).sum(), torch.where(met, weights * rows, 0.0)


def _power(chain: Chain, member: Divergence) -> tuple[Tensor, Tensor]:
    r"""The Cressie-Read divergence of whole sequences and its gradient, at every $\alpha$.

    With $k_a = p_a u_a^\alpha$, and the divergence $D$ of what follows a row,

    $$D(s) = D_f(s) + \sum_a k_a D(s_a), \qquad
      c_a = p_a \frac{u_a^\alpha - 1}\alpha + (\alpha - 1)\, k_a D(s_a),$$

    and the gradient is $-K(s) (c_a - p_a \sum_b c_b)$, where $K$ sums $E_P[U_{<n}^\alpha]$ over the visits of the
    row. No term is negative in the sum for $D$, so that nothing cancels between nearly equal chains or near
    $\alpha = 0$ and $1$, which are the two KL divergences.
    """
    alpha, p = member.parameters["alpha"], chain.log_p.exp()
    log_k = _log_factors(chain, alpha)
    own = pointwise(member, chain.log_p, chain.log_q, p, chain.log_u).sum(-1)
    # Logarithms, as the factors alone may overflow; on the scale of the rows, so that they have few digits to lose.
    positive = own[torch.isfinite(own) & (own > 0)]
    log_scale = positive.max().log() if len(positive) else torch.zeros((), dtype=torch.float64)
    log_own = own.log() - log_scale
    weight = torch.where(p > 0, p * member.centred_weight(torch.where(p > 0, chain.log_u, 0.0)), 0.0)
    if alpha != 0.0:
        weight = torch.where(p == 0, log_k.exp() / alpha, weight)  # of a probability that underflows
    weight = torch.where(torch.isinf(own).unsqueeze(-1), torch.inf, weight)
    sign, log_weight = weight.sign(), weight.abs().log()
    before = _power_visits(chain, log_k)
    rows = torch.zeros_like(log_k)
    after = torch.full((chain.rows + 1,), -torch.inf, dtype=torch.float64)  # log D of the rest, on the scale
    mass = torch.zeros(chain.rows + 1, dtype=torch.float64)  # log E[U^alpha of the rest | row]
    for n in reversed(range(chain.horizon)):
        later = _log_product(log_k, after[chain.successors])
        through = _log_product(log_k, mass[chain.successors])
        after[:-1] = torch.logaddexp(log_own, torch.logsumexp(later, -1))
        mass[:-1] = torch.logsumexp(through, -1)
        # The terms c_a, or c_a + p_a / alpha, which gives the same gradient, where little is left of that constant.
        little = (mass[:-1] < -0.5).unsqueeze(-1)
        visits = before[n].unsqueeze(-1)
        terms = _log_product(visits, later + log_scale).exp() * (alpha - 1.0)
        terms += sign * _log_product(visits, log_weight).exp()
        if bool(little.any()):
            terms = torch.where(little, _log_product(visits, through).exp() / alpha, terms)
        rows -= terms - p * terms.sum(-1, keepdim=True)
    return (after[0] + log_scale).exp(), rows


def _log_factors(chain: Chain, alpha: float) -> Tensor:
    r"""$\log k_a = \log p_a + \alpha \log u_a$, with its limits where one policy lacks the token."""
    absent, missed = torch.isneginf(chain.log_p), torch.isneginf(chain.log_q)
    both = ~absent & ~missed
    log_k = torch.where(both, chain.log_p + alpha * torch.where(both, chain.log_u, 0.0), -torch.inf)
    at_zero = chain.log_p if alpha == 0.0 else torch.full_like(log_k, torch.inf if alpha < 0.0 else -torch.inf)
    at_infinity = chain.log_q if alpha == 1.0 else torch.full_like(log_k, torch.inf if alpha > 1.0 else -torch.inf)
    return torch.where(missed & ~absent, at_zero, torch.where(absent & ~missed, at_infinity, log_k))


def _power_visits(chain: Chain, log_k: Tensor) -> Tensor:
    r"""$\log E_P[U^\alpha$ so far; position `n` reads row `s`$]$, `(T, S)`."""
    if chain.horizon * chain.rows > _KEPT:
        what = f"keeping the powers of {chain.rows} rows at {chain.horizon} positions"
        raise BudgetExceededError(what, chain.horizon * chain.rows, _KEPT, "lower the horizon or the number of states")
    before = torch.full((chain.horizon, chain.rows + 1), -torch.inf, dtype=torch.float64)
    before[0, 0] = 0.0
    successors = chain.successors.flatten()
    for n in range(1, chain.horizon):
        terms = _log_product(before[n - 1, :-1].unsqueeze(-1), log_k).flatten()
        largest = before[n].scatter_reduce(0, successors, terms, "amax")
        # A row that no sequence of positive weight reaches stays at -inf, and one infinite term wins.
        shift = torch.where(torch.isfinite(largest), largest, 0.0)
        sums = torch.zeros_like(largest).index_add_(0, successors, (terms - shift[successors]).exp())
        before[n] = shift + sums.log()
    return before[:, :-1]


def _log_product(left: Tensor, right: Tensor) -> Tensor:
    """The sum of two logarithms; a factor of zero wins over an infinite one, as it is never reached."""
    return torch.where(torch.isneginf(left) | torch.isneginf(right), -torch.inf, left + right)


def _sum(parts: Iterator[Tensor] | list[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part.clone() if total is None else total + part
    assert total is not None
    return total
