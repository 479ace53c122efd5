r"""Importance weights for rollouts of another policy $\mu$, and PPO's clipped surrogate (T8)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import Importance
from opdtheory.estimators.base import unmasked
from opdtheory.rollouts import Rollouts

__all__ = ["Importance", "importance_weight", "ppo_surrogate", "prefix_weight", "weighted"]


def importance_weight(rollouts: Rollouts, kind: Importance) -> Float[Tensor, "B T"]:
    r"""The detached weight of each token, from $\rho_n = p(y_n|h_n) / \mu(y_n|h_n)$, which is 1 at masked positions.

    `token`: $\rho_n$; `prefix`: $\prod_{m \le n} \rho_m$; `sequence`: $\prod_m \rho_m$ over the whole rollout.
    """
    log_ratio = _log_ratio(rollouts).detach()
    if kind == "prefix":
        log_ratio = log_ratio.cumsum(-1)
    elif kind == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    return log_ratio.exp()


def prefix_weight(rollouts: Rollouts) -> Float[Tensor, "B T"]:
    r"""The detached weight of each *history*, $\prod_{m < n} \rho_m$, for losses that sum over the next token."""
    log_ratio = _log_ratio(rollouts).detach()
    before = torch.cat([torch.zeros_like(log_ratio[:, :1]), log_ratio[:, :-1]], dim=-1)
    return before.cumsum(-1).exp()


def weighted(values: Float[Tensor, "B T"], weight: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The product, which is zero where the weight is zero even if the value is infinite: p = 0 < mu adds nothing."""
    impossible = weight == 0
    return torch.where(impossible, torch.zeros_like(values), weight * values.masked_fill(impossible, 0.0))


def ppo_surrogate(advantages: Float[Tensor, "B T"], rollouts: Rollouts, clip_range: float) -> Float[Tensor, "B T"]:
    r"""PPO's loss of each token, $-\min(\rho A,\ \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon) A)$ (1707.06347).

    $\rho$ is differentiated. The gradient is $-A\, s$ where $p = \mu$; elsewhere, clipping biases it (T8).
    """
    ratio = _log_ratio(rollouts).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _log_ratio(rollouts: Rollouts) -> Tensor:
    return unmasked(rollouts, rollouts.student_logprobs - rollouts.behavior_logprobs.detach())
