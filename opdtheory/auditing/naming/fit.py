"""How well the gradients of a loss agree with a positive multiple of an objective's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.choices import Verdict

__all__ = ["FLOOR", "Fit", "fit_scale", "flat"]

# Lengths below this are not divided by: a zero gradient then resembles no other.
FLOOR = 1e-100


@dataclass(frozen=True)
class Fit:
    """How well the gradients of a loss agree, pair by pair, with a common positive multiple of an objective's.

    Attributes:
        scale: the multiple with the smallest errors, all pairs weighted equally.
        relative_bias: `|actual - exact| / |exact|` per pair, at scale one.
        errors: `|actual - scale * exact| / |actual|` per pair.
        cosine: cosine per pair; 0 for a zero gradient.
    """

    scale: float
    relative_bias: list[float]
    errors: list[float]
    cosine: list[float]

    @property
    def worst_error(self) -> float:
        """The largest error at the best scale; inf unless the scale is positive."""
        return max(self.errors) if self.scale > 0 else float("inf")

    def verdict(self, tolerance: float) -> Verdict:
        """`exact`, `exact_up_to_scale` or `biased`; errors up to the tolerance count as rounding."""
        if max(self.relative_bias) <= tolerance:
            return "exact"
        return "exact_up_to_scale" if self.worst_error <= tolerance else "biased"

    @property
    def typical_error(self) -> float:
        """Root mean square of the errors at the best scale, at most 1; inf unless the scale is positive."""
        return (sum(e * e for e in self.errors) / len(self.errors)) ** 0.5 if self.scale > 0 else float("inf")


def fit_scale(actual: list[Tensor], exact: list[Tensor]) -> Fit:
    """Compare two lists of flat gradients, one per pair, up to one common positive scale."""
    sizes = [max(float(a.norm()), FLOOR) for a in actual]
    norms = [max(float(g.norm()), FLOOR) for g in exact]
    dots = [float(a @ g) for a, g in zip(actual, exact, strict=True)]
    # Least squares over all pairs, in units of the loss's own gradient on each.
    scale = sum(d / s**2 for d, s in zip(dots, sizes, strict=True)) / sum(
        (n / s) ** 2 for n, s in zip(norms, sizes, strict=True)
    )
    return Fit(
        scale=scale,
        relative_bias=[float((a - g).norm()) / n for a, g, n in zip(actual, exact, norms, strict=True)],
        errors=[float((a - scale * g).norm()) / s for a, g, s in zip(actual, exact, sizes, strict=True)],
        cosine=[d / (s * n) for d, s, n in zip(dots, sizes, norms, strict=True)],
    )


def flat(levels: list[Tensor]) -> Tensor:
    """A gradient by level, as one vector."""
    return torch.cat([level.flatten() for level in levels])
