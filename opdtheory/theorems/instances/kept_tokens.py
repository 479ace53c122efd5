r"""Top-k distributions that the checks of T9 share: rational pairs with a set S, and the library's losses on it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import expected_gradient
from opdtheory.theorems.instances.cases import Distribution, Pair, rational_distributions

__all__ = ["TEACHER", "in_logits", "kept", "topk_gradient", "zeros"]

TEACHER = (0.4, 0.25, 0.2, 0.15)


def kept() -> Iterator[tuple[Distribution, Distribution, int]]:
    """Rational pairs `(p, q)` with the number of leading atoms that make up S."""
    for student, teacher in rational_distributions():
        for k in range(1, len(student)):
            yield student, teacher, k


def in_logits(distribution: Any, slopes: Any) -> list[Any]:
    r"""$\partial/\partial z_a = p_a (\partial_a - \sum_b p_b \partial_b)$ from the derivatives in the probabilities."""
    mean = sum(p * slope for p, slope in zip(distribution, slopes, strict=True))
    return [p * (slope - mean) for p, slope in zip(distribution, slopes, strict=True)]


def zeros(count: int) -> list[Fraction]:
    """Exact zeros."""
    return [Fraction(0)] * count


@functools.cache
def topk_gradient(name: str, divergence: Divergence, pair: Pair, k: int) -> list[Tensor]:
    """Expected gradient of a top-k estimator run as a black box; kept, as every twin needs it again."""
    return expected_gradient(estimator(name, divergence, k=k), *pair)
