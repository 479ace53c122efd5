"""Least squares over small subsets of a dictionary, and fitted numbers rounded to simple ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from opdtheory.objective import DENOMINATOR, NEAR, simple_ratios

__all__ = [
    "STARTS",
    "Curve",
    "Subset",
    "all_matter",
    "best_subset",
    "fit",
    "fit_parameter",
    "refined",
    "shortest",
    "snap",
]

Array = np.ndarray[Any, np.dtype[np.float64]]

# Below this, the unit columns of a subset are so nearly dependent that coefficients mean nothing.
_INDEPENDENT = 1e-6

# Values of a parameter that are tried before the best one is refined.
STARTS = 41

# A family whose best start misses by more than this has no member that fits.
_HOPELESS = 0.3


@dataclass(frozen=True)
class Curve:
    """A function known at some points, up to an additive constant.

    Attributes:
        points: the points.
        values: the values there.
        scale: the unit of an error at each point.
    """

    points: Array
    values: Array
    scale: Array

    def part(self, keep: np.ndarray[Any, np.dtype[np.intp]]) -> Curve:
        """The function at some of the points."""
        return Curve(self.points[keep], self.values[keep], self.scale[keep])


@dataclass(frozen=True)
class Subset:
    """A combination of columns: their indices and coefficients, the constant and the largest relative error."""

    indices: tuple[int, ...]
    coefficients: Array
    constant: float
    error: float


def fit(curve: Curve, columns: Array) -> tuple[Array, float, float]:
    """The coefficients of `columns` `(points, K)`, the constant, and the largest error in units of the scale."""
    design = np.column_stack([columns, np.ones(len(curve.points))]) / curve.scale[:, None]
    sizes = np.linalg.norm(design, axis=0)
    sizes[sizes == 0] = 1.0
    solution = np.linalg.lstsq(design / sizes, curve.values / curve.scale, rcond=None)[0] / sizes
    error = float(np.abs(design @ solution - curve.values / curve.scale).max())
    return solution[:-1], float(solution[-1]), error


def best_subset(curve: Curve, columns: Array, size: int) -> Subset | None:
    """The `size` columns whose combination with a constant is nearest in least squares; None if all are dependent."""
    chosen = np.array(list(itertools.combinations(range(columns.shape[1]), size)))
    scaled, ones = columns / curve.scale[:, None], 1.0 / curve.scale
    target = curve.values / curve.scale
    # The constant is projected out once, and each column is scaled to unit length.
    direction = ones / np.linalg.norm(ones)
    scaled = scaled - np.outer(direction, direction @ scaled)
    target = target - direction * (direction @ target)
    lengths = np.linalg.norm(scaled, axis=0)
    scaled = scaled / np.where(lengths > 0, lengths, 1.0)
    q, r = np.linalg.qr(scaled[:, chosen].transpose(1, 0, 2))
    left = target - np.einsum("smk,sk->sm", q, np.einsum("smk,m->sk", q, target))
    misfit = np.linalg.norm(left, axis=1)
    misfit[np.abs(np.diagonal(r, axis1=1, axis2=2)).min(1) < _INDEPENDENT] = np.inf
    best = int(misfit.argmin())
    if not np.isfinite(misfit[best]):
        return None
    indices = tuple(int(i) for i in chosen[best])
    return Subset(indices, *fit(curve, columns[:, indices]))


def all_matter(curve: Curve, columns: Array, coefficients: Array, limit: float) -> bool:
    """Whether every term is large enough to be needed for the fit."""
    moved = np.abs(coefficients * (columns - columns.mean(0))) / curve.scale[:, None]
    return bool((moved.max(0) > 100.0 * limit).all())


def fit_parameter(
    curve: Curve, column: Callable[[float], Array], low: float, high: float, beside: Array, limit: float
) -> tuple[float, int | None] | None:
    """The parameter at which `column(parameter)`, alone or with one of the given columns, is nearest to the curve.

    Args:
        curve: the curve to fit.
        column: values at the curve's points, by parameter.
        low: lower end of the parameter's interval.
        high: upper end of the parameter's interval.
        beside: columns `(points, K)`, one of which is added; with K = 0 the column is fitted alone.
        limit: largest error of a fit; the parameter is rounded to a short decimal within it.

    Returns:
        The parameter and the index of the added column, or None if nothing comes near.
    """
    starts = np.linspace(low, high, STARTS + 2)[1:-1]
    grid = np.stack([column(float(value)) for value in starts])
    count = beside.shape[1]
    designs = np.repeat(grid[:, None, :, None], max(count, 1), axis=1)
    if count:
        others = np.broadcast_to(beside.T[None, :, :, None], (len(starts), count, len(curve.points), 1))
        designs = np.concatenate([designs, others], axis=-1)
    misfit = _misfits(curve, designs)
    start, other = np.unravel_index(int(misfit.argmin()), misfit.shape)
    if misfit[start, other] > _HOPELESS:
        return None
    extra = beside[:, other : other + 1]

    def residual(value: float) -> Array:
        columns = np.column_stack([column(value), extra])
        coefficients, constant, _ = fit(curve, columns)
        return (columns @ coefficients + constant - curve.values) / curve.scale

    value = refined(residual, float(starts[start]), low, high)
    return shortest(value, lambda v: float(np.abs(residual(v)).max()), limit), int(other) if count else None


def _misfits(curve: Curve, designs: Array) -> Array:
    """The misfit of each design `(..., points, K)` with a constant, relative to the size of the curve."""
    ones = np.ones((*designs.shape[:-1], 1))
    design = np.concatenate([designs, ones], axis=-1) / curve.scale[:, None]
    lengths = np.linalg.norm(design, axis=-2, keepdims=True)
    q, _ = np.linalg.qr(design / np.where(lengths > 0, lengths, 1.0))
    target = curve.values / curve.scale
    left = target - np.einsum("...mk,...k->...m", q, np.einsum("...mk,m->...k", q, target))
    size = float(np.linalg.norm(target - target.mean())) or 1.0
    return np.asarray(np.linalg.norm(left, axis=-1) / size)


def refined(residual: Callable[[float], Array], start: float, low: float = -np.inf, high: float = np.inf) -> float:
    """The number with the smallest sum of squared residuals, from a start."""
    from scipy.optimize import least_squares

    solution = least_squares(
        lambda x: residual(float(x[0])), [start], bounds=([low], [high]), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    return float(solution.x[0])


def shortest(value: float, error: Callable[[float], float], limit: float) -> float:
    """The shortest decimal near a fitted value that fits as well, or to within a thousandth of the limit."""
    most = max(10.0 * error(value), 1e-3 * limit)
    for digits in range(1, 8):
        short = round(value, digits) + 0.0  # no negative zero
        if abs(short - value) < 1e-6 and error(short) <= most:
            return short
    return value


def snap(curve: Curve, columns: Array, subset: Subset, limit: float) -> Subset:
    """The same subset with coefficients of simple ratios, and simple sizes, if that fits as well."""
    most = max(10.0 * subset.error, 1e-3 * limit)
    chosen = columns[:, list(subset.indices)]
    simple = simple_ratios(subset.coefficients.tolist())
    if simple is None:
        return subset
    direction = chosen @ np.array([float(f) for f in simple])
    (scale,), constant, error = fit(curve, direction[:, None])
    if error > most:
        return subset
    best = Subset(subset.indices, scale * np.array([float(f) for f in simple]), constant, error)
    short = float(Fraction(float(scale)).limit_denominator(DENOMINATOR))
    if short == 0.0 or abs(short - scale) > NEAR * abs(scale):
        return best
    left = curve.values - short * direction
    constant = float(np.average(left, weights=curve.scale**-2.0))
    error = float(np.abs((left - constant) / curve.scale).max())
    return best if error > most else Subset(subset.indices, short * best.coefficients / scale, constant, error)
