r"""What intervals for a gradient's projections say about it: the scales they allow, the bias they prove or exclude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Bounds",
    "Target",
    "best_scale",
    "certified",
    "certified_scale",
    "certified_whole",
    "excluded",
    "relative_bias",
    "scale_range",
]

# A projection this small relative to the vector is zero, to rounding.
_NONE = 1e-12


@dataclass(frozen=True)
class Target:
    """An exact gradient that a loss may follow.

    Attributes:
        vector: the gradient in the stacked table, flat.
        along: its projections on the directions, `(K,)`.
        size: its length.
    """

    vector: Tensor
    along: Tensor
    size: float

    @classmethod
    def of(cls, vector: Tensor, basis: Tensor) -> Target:
        """The target with its projections on the orthonormal rows of `basis`."""
        return cls(vector, basis @ vector, float(vector.norm()))


@dataclass(frozen=True)
class Bounds:
    """Where a loss's expected gradient lies on one pair.

    Attributes:
        low: lower bounds on its projections, `(K,)`.
        high: upper bounds on its projections, `(K,)`.
        known: a vector near it.
        along: the projections of `known`.
        unseen: upper bound on its distance from `known`, in all dimensions.
    """

    low: Tensor
    high: Tensor
    known: Tensor
    along: Tensor
    unseen: float

    def distance(self, vector: Tensor, along: Tensor) -> float:
        r"""Upper bound on the distance from a vector with projections `along`, in all dimensions.

        With $\delta$ the vector from `known` to the expected gradient and $r$ the one from the given vector to `known`,
        $|\delta + r|^2 = |\delta|^2 + 2\langle\delta, r\rangle + |r|^2$. The directions bound the product.
        """
        if not math.isfinite(self.unseen):
            return math.inf
        gap, seen = self.known - vector, self.along - along
        off = math.sqrt(max(float(gap @ gap) - float(seen @ seen), 0.0))
        product = torch.maximum(seen * (self.low - self.along), seen * (self.high - self.along)).sum()
        squared = self.unseen**2 + 2.0 * (float(product) + off * self.unseen) + float(gap @ gap)
        return min(math.sqrt(max(squared, 0.0)), float(gap.norm()) + self.unseen)

    def largest(self) -> float:
        """Upper bound on the size of every projection."""
        return float(torch.maximum(self.low.abs(), self.high.abs()).max())

    def cosine(self, target: Target) -> tuple[float, float]:
        """The interval of the cosine with a target that lies along the first direction."""
        low, high = float(self.low[0]), float(self.high[0])
        if not math.isfinite(low):
            return -1.0, 1.0
        # The gradient is at least as long as its other projections, and at most as long as all dimensions allow.
        others = float(torch.maximum(self.low, -self.high)[1:].clamp_min(0.0).norm())
        longest = self.distance(torch.zeros_like(self.known), torch.zeros_like(self.along))
        least = low / longest if low > 0.0 else _leg(low, others)
        most = high / longest if high < 0.0 else _leg(high, others)
        return max(-1.0, least), min(1.0, most)


def _leg(along: float, across: float) -> float:
    return along / math.hypot(along, across) if across > 0.0 else math.copysign(1.0, along)


def scale_range(bounds: Sequence[Bounds], targets: Sequence[Target]) -> tuple[float, float] | None:
    """The interval of common multiples of the targets that no projection on any pair excludes, or None."""
    low, high = -math.inf, math.inf
    for bound, target in zip(bounds, targets, strict=True):
        absent = target.along.abs() <= _NONE * target.size
        if bool(((bound.low > 0.0) | (bound.high < 0.0))[absent].any()):
            return None
        if bool(absent.all()):
            continue
        ends = torch.stack([bound.low, bound.high])[:, ~absent] / target.along[~absent]
        low = max(low, float(ends.amin(0).max()))
        high = min(high, float(ends.amax(0).min()))
    return (low, high) if low <= high else None


def excluded(bounds: Sequence[Bounds], targets: Sequence[Target]) -> bool:
    """Whether some projection excludes every positive multiple of the targets."""
    allowed = scale_range(bounds, targets)
    return allowed is None or allowed[1] <= 0.0


def best_scale(allowed: tuple[float, float]) -> float:
    """The scale 1 if it is allowed, else the middle of those that are."""
    return 1.0 if allowed[0] <= 1.0 <= allowed[1] else sum(allowed) / 2.0


def certified_scale(bounds: Sequence[Bounds], targets: Sequence[Target]) -> tuple[float, float] | None:
    """The best scale and the bias certified at it; None unless all allowed scales are positive and bounded."""
    allowed = scale_range(bounds, targets)
    if allowed is None or allowed[0] <= 0.0 or not math.isfinite(allowed[1]):
        return None
    scale = best_scale(allowed)
    return scale, certified(bounds, targets, scale)


def certified(bounds: Sequence[Bounds], targets: Sequence[Target], scale: float) -> float:
    """Upper bound on the bias against `scale` times the targets in every direction, relative to that multiple."""
    worst = 0.0
    for bound, target in zip(bounds, targets, strict=True):
        aim = scale * target.along
        off = torch.maximum((bound.low - aim).abs(), (bound.high - aim).abs())
        worst = max(worst, float(off.max()) / (abs(scale) * target.size))
    return worst


def certified_whole(bounds: Sequence[Bounds], targets: Sequence[Target], scale: float) -> float:
    """Upper bound on the length of that bias in all dimensions, relative to the same multiple."""
    return max(
        bound.distance(scale * target.vector, scale * target.along) / (abs(scale) * target.size)
        for bound, target in zip(bounds, targets, strict=True)
    )


def relative_bias(bound: Bounds, target: Target) -> tuple[float, float]:
    """The interval of the length of the bias at scale one, relative to the target's."""
    beyond = torch.maximum(bound.low - target.along, target.along - bound.high).clamp_min(0.0)
    return float(beyond.norm()) / target.size, bound.distance(target.vector, target.along) / target.size
