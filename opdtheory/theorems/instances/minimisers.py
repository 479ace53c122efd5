r"""Minimisers found by descent on logits, and the ratio at which a truncated divergence stops pulling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from opdtheory.divergences import Divergence

__all__ = ["TEACHER", "critical_ratio", "minimise"]

# The teacher of the checks of top-k losses.
TEACHER = (0.4, 0.25, 0.2, 0.15)

# Directions whose curvature is below this are flat: they are left where they are.
_FLAT = 1e-14
_STEPS = 120


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Damped Newton steps with the Hessian's eigenvalues made positive, never uphill; the logits where it ends."""
    z = start.clone()
    for _ in range(_STEPS):
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf)
        if float(slope.abs().max()) < _FLAT:
            break
        curvature, directions = torch.linalg.eigh(torch.autograd.functional.hessian(loss, z))
        usable = curvature.abs() > _FLAT
        step = directions @ torch.where(usable, directions.T @ slope / curvature.abs().clamp_min(_FLAT), 0.0)
        step = step / max(1.0, float(step.abs().max()) / 2)
        here, fraction = float(loss(z)), 1.0
        while float(loss(z - fraction * step)) > here + 1e-16 and fraction > 1e-6:
            fraction /= 2
        z = z - fraction * step
    return z


@functools.cache
def critical_ratio(divergence: Divergence) -> float:
    r"""The root $u_0$ of the non-decreasing weight $w_f$, by bisection in $\log u$; 0 if $w_f > 0$ throughout."""
    low, high = -40.0, 40.0

    def weight(log_u: float) -> float:
        return float(divergence.weight(torch.tensor([log_u], dtype=torch.float64)))

    if weight(low) > 0:
        return 0.0
    if weight(high) < 0:
        return math.inf
    for _ in range(120):
        middle = (low + high) / 2
        low, high = (low, middle) if weight(middle) >= 0 else (middle, high)
    return math.exp((low + high) / 2)
