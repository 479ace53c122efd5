r"""Baselines and the z-score: what is subtracted from an advantage before it multiplies the score (T7)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.estimators.base import teacher_distribution, unmasked
from opdtheory.rollouts import Rollouts

__all__ = ["group_mean", "leave_one_out", "optimal", "vocabulary_mean", "z_score"]


def group_mean(advantages: Float[Tensor, "B T"], rollouts: Rollouts) -> Float[Tensor, "1 T"]:
    r"""The mean over all rollouts that are unmasked at a position.

    $$b_n = \frac{\sum_b m_{bn} A_{bn}}{\sum_b m_{bn}}$$

    As it includes the rollout itself, it scales the expected gradient by $(G-1)/G$ if all $G$ rollouts have one length
    (T7e).
    """
    alive = rollouts.mask.sum(0, keepdim=True).clamp_min(1)
    return unmasked(rollouts, advantages).sum(0, keepdim=True) / alive


def leave_one_out(advantages: Float[Tensor, "B T"], rollouts: Rollouts) -> Float[Tensor, "B T"]:
    r"""The mean over the *other* rollouts that are unmasked at a position, zero if there is none.

    $$b_{in} = \frac{\sum_{j \ne i} m_{jn} A_{jn}}{\sum_{j \ne i} m_{jn}}$$

    It does not depend on rollout $i$, so it never biases (T7e; RLOO, 2402.14740).
    """
    own = unmasked(rollouts, advantages)
    others = rollouts.mask.sum(0, keepdim=True) - rollouts.mask
    total = own.sum(0, keepdim=True) - own
    return torch.where(others > 0, total / others.clamp_min(1), torch.zeros_like(own))


def vocabulary_mean(advantage_at: Callable[[Tensor, Tensor], Tensor], rollouts: Rollouts) -> Float[Tensor, "B T"]:
    r"""The expected advantage given the history, $b_n = \sum_a p(a|h_n)\, A(p_a, q_a)$, from the logits (T7b, vOPD).

    Tokens of (nearly) zero probability, or with an advantage that is not finite, are left out of the sum: any function
    of the history is an unbiased baseline.

    Args:
        advantage_at: maps `log p` and `log q`, both `(B, T, V)`, to the advantage of each token.
        rollouts: the batch.
    """
    with torch.no_grad():
        p, advantages = _whole(advantage_at, rollouts)
        return (p * advantages).sum(-1)


def optimal(advantage_at: Callable[[Tensor, Tensor], Tensor], rollouts: Rollouts) -> Float[Tensor, "B T"]:
    r"""The baseline of least variance given the history, from the logits (T7a).

    $$b_n = \frac{\sum_a p_a A_a |s_a|^2}{\sum_a p_a |s_a|^2},\qquad |s_a|^2 = 1 - 2 p_a + |p|^2,$$

    least in the student's logits. Tokens are left out as in `vocabulary_mean`.

    Args:
        advantage_at: as in `vocabulary_mean`.
        rollouts: the batch.
    """
    with torch.no_grad():
        p, advantages = _whole(advantage_at, rollouts)
        norms = p * (1 - 2 * p + p.square().sum(-1, keepdim=True))
        # One certain token has a score of zero: any baseline will do.
        return (norms * advantages).sum(-1) / norms.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)


def _whole(advantage_at: Callable[[Tensor, Tensor], Tensor], rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Probabilities and advantages of every token; both zero where a token is left out."""
    log_p = torch.log_softmax(unmasked(rollouts, rollouts.student_logits), dim=-1)
    log_q = torch.log_softmax(teacher_distribution(rollouts, "this baseline"), dim=-1)
    zero = torch.zeros_like(log_p)
    usable = log_p > math.log(torch.finfo(log_p.dtype).tiny)
    advantages = advantage_at(torch.where(usable, log_p, zero), torch.where(usable, log_q, zero))
    usable = usable & torch.isfinite(advantages)
    return torch.where(usable, log_p.exp(), zero), torch.where(usable, advantages, zero)


def z_score(advantages: Float[Tensor, "B T"], rollouts: Rollouts, eps: float) -> Float[Tensor, "B T"]:
    r"""Advantages centred and scaled within the group at each position (GRPO, 2402.03300): a biased direction (T7e).

    $$\frac{A_{bn} - \bar A_n}{\sigma_n + \epsilon},\qquad
      \sigma_n^2 = \frac{\sum_b m_{bn}(A_{bn} - \bar A_n)^2}{\max(1, \sum_b m_{bn} - 1)}$$
    """
    centred = unmasked(rollouts, advantages - group_mean(advantages, rollouts))
    degrees = (rollouts.mask.sum(0, keepdim=True) - 1).clamp_min(1)
    return centred / ((centred.square().sum(0, keepdim=True) / degrees).sqrt() + eps)
