"""f-divergences of the ratio teacher over student: a catalogue, and the calculus of generators and weights."""

from __future__ import annotations

from typing import Any

from opdtheory.divergences.catalogue import (
    alpha,
    chi2,
    forward_kl,
    hellinger,
    jeffreys,
    jsd,
    le_cam,
    neyman_chi2,
    reverse_kl,
    skew_forward_kl,
    skew_jsd,
    skew_reverse_kl,
    total_variation,
)
from opdtheory.divergences.convexity import is_convex
from opdtheory.divergences.divergence import Divergence
from opdtheory.divergences.quadrature import implied_generator_values
from opdtheory.divergences.registry import divergence, entries, families, names
from opdtheory.divergences.transform import (
    implied_generator,
    same_divergence,
    same_up_to_scale,
    symbol,
    weight_of,
)

__all__ = [
    "Divergence",
    "alpha",
    "chi2",
    "divergence",
    "families",
    "forward_kl",
    "hellinger",
    "implied_generator",
    "implied_generator_values",
    "is_convex",
    "jeffreys",
    "jsd",
    "le_cam",
    "names",
    "neyman_chi2",
    "reverse_kl",
    "same_divergence",
    "same_up_to_scale",
    "skew_forward_kl",
    "skew_jsd",
    "skew_reverse_kl",
    "symbol",
    "total_variation",
    "u",
    "weight_of",
]


def __getattr__(name: str) -> Any:
    if name == "u":
        return symbol()
    found = {each.name: each for each in entries()}
    if name in found:
        return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
