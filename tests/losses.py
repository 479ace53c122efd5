"""Schulman's estimators of the KL divergence as losses, by hand."""

from __future__ import annotations

from torch import Tensor

from opdtheory.rollouts import Rollouts


def k1(r: Rollouts) -> Tensor:
    return r.token_sum(-r.log_u)


def k2(r: Rollouts) -> Tensor:
    return r.token_sum(r.log_u.square() / 2)


def k3(r: Rollouts) -> Tensor:
    return r.token_sum(r.log_u.expm1() - r.log_u)
