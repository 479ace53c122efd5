r"""Importance weights for rollouts of another policy $\mu$, truncated and masked ones, PPO's surrogate (T8, T14)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import Importance
from opdtheory.estimators.base import unmasked
from opdtheory.rollouts import Rollouts

__all__ = ["CAP", "KEEP_RANGE", "Importance", "importance_weight", "ppo_surrogate", "prefix_weight", "weighted"]

# Where a ratio is cut, and between which bounds a mask keeps it, unless told otherwise.
CAP = 2.0
KEEP_RANGE = (0.5, 5.0)


def importance_weight(
    rollouts: Rollouts, kind: Importance, cap: float = CAP, keep_range: tuple[float, float] = KEEP_RANGE
) -> Float[Tensor, "B T"]:
    r"""The detached weight of each token, from $\rho_n = p(y_n|h_n) / \mu(y_n|h_n)$, which is 1 at masked positions.

    With $R = \prod_m \rho_m$ over the whole rollout and $L$ its number of unmasked tokens:

    | kind | weight of token n |
    |---|---|
    | `token` | $\rho_n$ |
    | `prefix` | $\prod_{m \le n} \rho_m$ |
    | `sequence` | $R$ |
    | `tis` | $\min(\rho_n, C)$, truncated (T14) |
    | `mask` | $\rho_n$ if it lies in the range kept, else 0 (IcePop, MIS; T14) |
    | `sequence_mask` | $\rho_n$ if $R$ lies in the range kept, else 0 (T14b) |
    | `gspo` | $R^{1/L}$ (2507.18071; T14b) |

    Args:
        rollouts: the batch.
        kind: one of the above.
        cap: the bound $C$ of `tis`.
        keep_range: the ends of the range that a mask keeps, both included.
    """
    log_ratio = _log_ratio(rollouts).detach()
    whole = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    if kind == "prefix":
        log_ratio = log_ratio.cumsum(-1)
    elif kind == "sequence":
        log_ratio = whole
    elif kind == "gspo":
        log_ratio = whole / rollouts.mask.sum(-1, keepdim=True).clamp_min(1)
    elif kind == "tis":
        log_ratio = log_ratio.clamp(max=math.log(cap))
    ratio = log_ratio.exp()
    if kind in ("mask", "sequence_mask"):
        judged = (whole if kind == "sequence_mask" else log_ratio).exp()
        ratio = torch.where((judged >= keep_range[0]) & (judged <= keep_range[1]), ratio, torch.zeros_like(ratio))
    return ratio


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
