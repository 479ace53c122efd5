"""Gradients as lists of tensors, one per parameter, and an estimator's name."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["difference", "dot", "norm"]


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The inner product, in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def norm(vector: Sequence[Tensor]) -> float:
    """The Euclidean length."""
    return math.sqrt(dot(vector, vector))


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """The first less the second."""
    return [a - b for a, b in zip(one, other, strict=True)]
