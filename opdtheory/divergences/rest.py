r"""The weight of all tokens that are not listed, taken as one: a constant that the listed ones suffice for."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences.divergence import Divergence

__all__ = ["LEAST_REST", "rest_log_ratio", "rest_weight"]

# What rounding leaves of a smaller mass says nothing.
LEAST_REST = 1e-9


def rest_weight(
    divergence: Divergence, log_p: Float[Tensor, "*rows k"], log_q: Float[Tensor, "*rows k"]
) -> Float[Tensor, "*rows"]:
    r"""$w_f(u_T)$ with $u_T = (1 - q(S))/(1 - p(S))$, from log-probabilities on S in float64 (T19b).

    It does not depend on the sampled token, so that as a constant of a split it leaves the estimate unbiased. Either
    mass counts as at least `LEAST_REST`.

    Args:
        divergence: the generator $f$.
        log_p: the student's log-probabilities on S, in nats.
        log_q: the teacher's.
    """
    return divergence.weight(rest_log_ratio(log_p, log_q))


def rest_log_ratio(log_p: Float[Tensor, "*rows k"], log_q: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows"]:
    r"""The $\log u_T$ of `rest_weight`."""
    ours, theirs = ((1.0 - kept.exp().sum(-1)).clamp_min(LEAST_REST).log() for kept in (log_p, log_q))
    return theirs - ours
