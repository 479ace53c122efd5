r"""What intervals for a gradient's projections say about it: the scales they allow, the bias they prove or exclude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.auditing.records import Interval, Keyed

__all__ = [
    "Bounds",
    "OnPair",
    "Target",
    "best_scale",
    "certified",
    "certified_scale",
    "certified_whole",
    "excluded",
    "least_bias",
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

    @classmethod
    def unknown(cls, known: Tensor, basis: Tensor) -> Bounds:
        """The bounds before the first look: none."""
        endless = torch.full((len(basis),), math.inf, dtype=basis.dtype)
        return cls(-endless, endless, known, basis @ known, math.inf)

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
        # What is across the target is at least as long as its projections, and at most as long as all dimensions allow.
        least, most = self.across(target)
        return _leg(low, most if low > 0.0 else least), _leg(high, most if high < 0.0 else least)

    def across(self, target: Target) -> tuple[float, float]:
        """The interval of the distance from the nearest multiple of a target that lies along the first direction."""
        least = float(torch.maximum(self.low, -self.high)[1:].clamp_min(0.0).norm())
        middle = float(self.low[0] + self.high[0]) / 2.0 / target.size
        if not math.isfinite(middle):
            return 0.0, math.inf
        return least, max(least, self.distance(middle * target.vector, middle * target.along))


def _leg(along: float, across: float) -> float:
    """The cosine of a vector with these two legs; a vector of length zero may point anywhere."""
    if across == 0.0:
        return math.copysign(1.0, along)
    return along / math.hypot(along, across) if math.isfinite(across) else math.copysign(0.0, along)


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


@dataclass(frozen=True, eq=False)
class OnPair(Keyed):
    """The expected gradient on one pair beside the multiple of the exact gradient that is nearest on that pair.

    Attributes:
        label: name of the student-teacher pair.
        scale: interval of that multiple.
        error: interval of the distance from it, relative to it: the low end from the directions, the high end in all
            dimensions.
        seen: upper bound on the same distance along each direction.
        cosine: interval of the cosine with the exact gradient.
    """

    label: str
    scale: Interval
    error: Interval
    seen: float
    cosine: Interval

    @classmethod
    def of(cls, label: str, bound: Bounds, target: Target) -> OnPair:
        """The record of a pair whose target lies along the first direction."""
        scale = float(bound.low[0]) / target.size, float(bound.high[0]) / target.size
        if scale[0] <= 0.0:  # The nearest multiple may be zero.
            return cls(label, scale, (0.0, math.inf), math.inf, bound.cosine(target))
        shortest, longest = (target.size * end for end in scale)
        least, most = bound.across(target)
        seen = float(torch.maximum(bound.low.abs(), bound.high.abs())[1:].max()) if len(bound.low) > 1 else 0.0
        return cls(label, scale, (least / longest, most / shortest), seen / shortest, bound.cosine(target))


def least_bias(bounds: Sequence[Bounds], targets: Sequence[Target]) -> float:
    """Lower bound on the bias against every common positive multiple of the targets, relative to that multiple.

    With `k` the inverse of the multiple, the bias on a pair is the distance of the target from `k` times the gradient.
    Its lower bound is the distance from `k` times a box, which is convex in `k`; so is its maximum over the pairs.
    """
    from scipy.optimize import minimize_scalar

    def worst(inverse: float) -> float:
        return max(
            float(torch.maximum(inverse * b.low - t.along, t.along - inverse * b.high).clamp_min(0.0).norm()) / t.size
            for b, t in zip(bounds, targets, strict=True)
        )

    if not excluded(bounds, targets):
        return 0.0
    shortest = [float(torch.maximum(b.low, -b.high).clamp_min(0.0).norm()) for b in bounds]
    ends = [2.0 * t.size / size for size, t in zip(shortest, targets, strict=True) if size > 0.0]
    if not ends:
        return 0.0
    # At the end, some pair's gradient is twice as long as its target, so the bias is above that at the other end, one.
    found = minimize_scalar(worst, bounds=(0.0, min(ends)), method="bounded", options={"xatol": 1e-12 * min(ends)})
    return min(1.0, float(found.fun))
