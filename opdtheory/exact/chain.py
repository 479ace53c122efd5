r"""Dynamic programming for a pair of Markov policies, at horizons that nobody can enumerate.

The token objectives need how often each row is visited and what is still to come from each token.
The sequence objective factors along the chain only for some generators: $\log U$ adds, so the KL
divergences are sums over rows; $U^\alpha$ multiplies, so the power divergences are products of
matrices. Every other generator is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact.policies import MarkovPolicy
from opdtheory.exact.tree import pointwise, row_gradient

__all__ = ["gradient", "value"]

# Generators that are a multiple of a Cressie-Read one up to gauge: name -> (alpha, factor).
_POWERS = {"chi2": (2.0, 2.0), "neyman_chi2": (-1.0, 2.0), "hellinger": (0.5, 0.5)}


def value(student: MarkovPolicy, teacher: MarkovPolicy, divergence: Divergence, objective: str, gamma: float) -> Tensor:
    """The objective's value; arguments as `exact_value`, which checks them."""
    log_p, log_q = _rows(student), _rows(teacher)
    if objective == "sequence":
        return _sum([factor * part for factor, part, _ in _sequence_parts(student, log_p, log_q, divergence)])
    discount = gamma if objective == "token_return" else 1.0
    visits = _discounted(_occupancy(log_p, student.horizon, student.eos), discount).sum(0)
    rows = pointwise(divergence, log_p, log_q).sum(-1)
    return torch.where(visits > 0, visits * rows, 0.0).sum()


def gradient(
    student: MarkovPolicy, teacher: MarkovPolicy, divergence: Divergence, objective: str, gamma: float
) -> list[Tensor]:
    """The gradient in `[initial, transition]`; arguments as `exact_gradient`, which checks them."""
    log_p, log_q = _rows(student), _rows(teacher)
    if objective == "sequence":
        rows = _sum([factor * part for factor, _, part in _sequence_parts(student, log_p, log_q, divergence)])
    else:
        discount = gamma if objective == "token_return" else 1.0
        occupancy = _discounted(_occupancy(log_p, student.horizon, student.eos), discount)
        visits = occupancy.sum(0).unsqueeze(-1)
        rows = torch.where(visits > 0, visits * row_gradient(divergence, log_p, log_q), 0.0)
        if objective == "token_return":
            rows += _later_rows(student, divergence, log_p, log_q, occupancy, gamma)
    return [rows[0], rows[1:]]


def _later_rows(
    student: MarkovPolicy, divergence: Divergence, log_p: Tensor, log_q: Tensor, occupancy: Tensor, gamma: float
) -> Tensor:
    """The part of `token_return`'s gradient by which a token answers for the rows that follow it."""
    own = torch.where(occupancy.sum(0) > 0, pointwise(divergence, log_p, log_q).sum(-1), 0.0)[1:]
    p, horizon = log_p.exp(), student.horizon
    to_come = torch.zeros(horizon, student.vocab_size, dtype=torch.float64)
    for n in reversed(range(horizon - 1)):
        to_come[n] = own + gamma * (p[1:] @ to_come[n + 1])
        if student.eos is not None:
            to_come[n, student.eos] = 0.0
    expected = gamma * occupancy.T @ to_come
    return p * (expected - (p * expected).sum(-1, keepdim=True))


def _sequence_parts(
    student: MarkovPolicy, log_p: Tensor, log_q: Tensor, divergence: Divergence
) -> list[tuple[float, Tensor, Tensor]]:
    """`(factor, value, gradient)` of the factoring divergences that add up to this one."""
    name, horizon, eos = divergence.name, student.horizon, student.eos
    if name == "reverse_kl":
        return [(1.0, *_reverse(log_p, log_q, horizon, eos))]
    if name == "forward_kl":
        return [(1.0, *_forward(log_p, log_q, horizon, eos))]
    if name == "jeffreys":
        return [(1.0, *_forward(log_p, log_q, horizon, eos)), (1.0, *_reverse(log_p, log_q, horizon, eos))]
    if name == "alpha":
        alpha, factor = divergence.parameters["alpha"], 1.0
    elif name in _POWERS:
        alpha, factor = _POWERS[name]
    else:
        raise InvalidArgumentError(
            "divergence",
            f"{divergence.label} between whole sequences does not factor along a Markov chain; "
            f"use a KL, jeffreys, alpha, {', '.join(_POWERS)}, or tabulate() a short chain",
        )
    if alpha == 0.0:
        return [(factor, *_reverse(log_p, log_q, horizon, eos))]
    if alpha == 1.0:
        return [(factor, *_forward(log_p, log_q, horizon, eos))]
    return [(factor, *_power(log_p, log_q, horizon, eos, alpha))]


def _reverse(log_p: Tensor, log_q: Tensor, horizon: int, eos: int | None) -> tuple[Tensor, Tensor]:
    r"""$KL(P\|Q) = E_P \sum_n -\log u_n$ and its gradient, by the chain rule."""
    occupancy = _occupancy(log_p, horizon, eos)
    unseen = torch.isneginf(log_p) | (occupancy.sum(0) == 0).unsqueeze(-1)
    p, cost = log_p.exp(), torch.where(unseen, 0.0, log_p - log_q)
    rows = (p * cost).sum(-1)
    to_come = torch.zeros(horizon, p.shape[-1], dtype=torch.float64)
    for n in reversed(range(horizon - 1)):
        to_come[n] = rows[1:] + p[1:] @ to_come[n + 1]
        if eos is not None:
            to_come[n, eos] = 0.0
    visits = occupancy.sum(0)
    expected = visits.unsqueeze(-1) * cost + occupancy.T @ to_come
    return (visits * rows).sum(), p * (expected - (p * expected).sum(-1, keepdim=True))


def _forward(log_p: Tensor, log_q: Tensor, horizon: int, eos: int | None) -> tuple[Tensor, Tensor]:
    r"""$KL(Q\|P) = E_Q \sum_n \log u_n$ and its gradient: the rows weighted by the teacher's visits."""
    q = log_q.exp()
    visits = _occupancy(log_q, horizon, eos).sum(0).unsqueeze(-1)
    terms = torch.where(torch.isneginf(log_q) | (visits == 0), 0.0, q * (log_q - log_p))
    return (visits * terms).sum(), torch.where(torch.isinf(terms), torch.inf, visits * (log_p.exp() - q))


def _power(log_p: Tensor, log_q: Tensor, horizon: int, eos: int | None, alpha: float) -> tuple[Tensor, Tensor]:
    r"""$(E_P U^\alpha - 1)/(\alpha(\alpha-1))$ and its gradient $-\frac1\alpha E_P[U^\alpha s]$, in log space."""
    log_k = (1.0 - alpha) * log_p + alpha * log_q
    both_zero = torch.isneginf(log_p) & torch.isneginf(log_q)
    log_k = torch.where(both_zero, -torch.inf, log_k)
    vocab_size = log_p.shape[-1]
    after = torch.zeros(horizon, vocab_size, dtype=torch.float64)  # log E[U^alpha of the rest | last token]
    for n in reversed(range(horizon - 1)):
        after[n] = torch.logsumexp(_log_product(log_k[1:], after[n + 1]), dim=-1)
        if eos is not None:
            after[n, eos] = 0.0
    before = torch.full((horizon, vocab_size + 1), -torch.inf, dtype=torch.float64)
    before[0, 0] = 0.0
    for n in range(1, horizon):
        before[n, 1:] = torch.logsumexp(_log_product(before[n - 1].unsqueeze(-1), log_k), dim=0)
        if eos is not None:
            before[n, 1 + eos] = -torch.inf
    # E_P[U^alpha; row s, token a], one position at a time in log space: the factors alone may overflow.
    through = torch.logsumexp(_log_product(before.unsqueeze(-1), after.unsqueeze(1)), dim=0)
    mass = _log_product(log_k, through).exp()
    log_total = torch.logsumexp(_log_product(log_k[0], after[0]), dim=-1)
    gradient = -(mass - log_p.exp() * mass.sum(-1, keepdim=True)) / alpha
    return torch.expm1(log_total) / (alpha * (alpha - 1.0)), gradient


def _log_product(left: Tensor, right: Tensor) -> Tensor:
    """Sum of two logarithms; a factor of zero wins over an infinite one, as what is never reached counts nothing."""
    return torch.where(torch.isneginf(left) | torch.isneginf(right), -torch.inf, left + right)


def _rows(policy: MarkovPolicy) -> Tensor:
    """Log-probabilities of all rows, `(V+1, V)`: the first token's, then one row per last token."""
    return torch.log_softmax(torch.cat([policy.initial.unsqueeze(0), policy.transition]), dim=-1)


def _occupancy(log_p: Tensor, horizon: int, eos: int | None) -> Tensor:
    """Probability that position `n` reads row `s`, `(T, V+1)`."""
    p = log_p.exp()
    occupancy = torch.zeros(horizon, p.shape[0], dtype=torch.float64)
    occupancy[0, 0] = 1.0
    for n in range(1, horizon):
        occupancy[n, 1:] = occupancy[n - 1] @ p
        if eos is not None:
            occupancy[n, 1 + eos] = 0.0
    return occupancy


def _discounted(occupancy: Tensor, gamma: float) -> Tensor:
    return occupancy * gamma ** torch.arange(len(occupancy), dtype=torch.float64).unsqueeze(-1)


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
