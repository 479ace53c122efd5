"""Gradients as lists of tensors, one per parameter, and how they relate to the exact one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["difference", "dot", "norm", "relations"]


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The inner product, in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def norm(vector: Sequence[Tensor]) -> float:
    """The Euclidean length."""
    return math.sqrt(dot(vector, vector))


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """The first minus the second."""
    return [a - b for a, b in zip(one, other, strict=True)]


def relations(exact: Sequence[Tensor], predicted: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of a `Validation` that compare the exact, the predicted and the expected gradient."""
    size, found, foreseen = norm(exact), norm(expected), norm(predicted)
    unit = size if size > 0 else 1.0
    return {
        "exact_norm": size,
        "bias": norm(difference(expected, exact)) / unit,
        "predicted_bias": norm(difference(predicted, exact)) / unit,
        "discrepancy": norm(difference(expected, predicted)) / max(size, found, foreseen, 1e-300),
        "cosine": dot(exact, expected) / (size * found) if min(size, found) > 1e-9 * max(size, found) else None,
    }
