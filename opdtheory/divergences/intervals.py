"""Enclosures of an expression in `u` over many intervals of `log u` at once, by interval arithmetic in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from opdtheory.divergences.custom import number, symbol

if TYPE_CHECKING:
    import sympy

__all__ = ["Enclosure", "enclosures"]

# What each operation may have lost to rounding, relative to the size of its terms.
_ROUNDING = 1e-14

Enclosure = tuple[np.ndarray, np.ndarray, np.ndarray]


def enclosures(expression: sympy.Expr, low: np.ndarray, high: np.ndarray) -> Enclosure | None:
    """Bounds of an expression for `log u` between `low` and `high`, and the size of its terms, an array each.

    None where the expression holds a function that is not enclosed here. A bound that cannot be told is infinite.
    """
    with np.errstate(all="ignore"):
        try:
            found = _enclose(expression, np.asarray(low, dtype=float), np.asarray(high, dtype=float))
        except _UnknownError:
            return None
        size = np.maximum(np.abs(found[2]), np.finfo(float).tiny)
        return found[0], found[1], np.where(np.isfinite(size), size, np.finfo(float).max)


class _UnknownError(Exception):
    pass


def _enclose(node: sympy.Expr, low: np.ndarray, high: np.ndarray) -> Enclosure:
    import sympy

    u = symbol()
    if node == u:
        return _outward(np.exp(low), np.exp(high), np.exp(high))
    if u not in node.free_symbols:
        value = np.full_like(low, number(node))
        return _outward(value, value, np.abs(value))
    if isinstance(node, sympy.Add):
        parts = [_enclose(argument, low, high) for argument in node.args]
        bounds = (sum(part[k] for part in parts) for k in range(3))
        return _outward(*bounds)
    if isinstance(node, sympy.Mul):
        product = _enclose(node.args[0], low, high)
        for argument in node.args[1:]:
            product = _times(product, _enclose(argument, low, high))
        return product
    if isinstance(node, sympy.log):
        if node.args[0] == u:
            return _outward(low, high, np.maximum(np.abs(low), np.abs(high)))
        inner = _enclose(node.args[0], low, high)
        bottom = np.where(inner[0] > 0, np.log(np.maximum(inner[0], 5e-324)), -np.inf)
        top = np.where(inner[1] > 0, np.log(np.maximum(inner[1], 5e-324)), np.inf)
        # An error relative to the argument is one relative to one.
        return _outward(bottom, top, np.maximum(np.abs(bottom), np.abs(top)) + 1.0)
    if isinstance(node, sympy.exp):
        inner = _enclose(node.args[0], low, high)
        slack = 1.0 + inner[2] * _ROUNDING
        return _outward(np.exp(inner[0]) / slack, np.exp(inner[1]) * slack, np.exp(inner[1]) * slack)
    if isinstance(node, sympy.Pow) and u not in node.exp.free_symbols:
        return _power(node, low, high)
    raise _UnknownError


def _power(node: Any, low: np.ndarray, high: np.ndarray) -> Enclosure:
    exponent = number(node.exp)
    if node.base == symbol():
        ends = np.exp(exponent * low), np.exp(exponent * high)
        # The exponent of a large power carries the rounding error of the product.
        slack = 1.0 + np.abs(exponent) * np.maximum(np.abs(low), np.abs(high)) * _ROUNDING
        return _outward(np.minimum(*ends) / slack, np.maximum(*ends) * slack, np.maximum(*ends) * slack)
    base = _enclose(node.base, low, high)
    ends = base[0] ** exponent, base[1] ** exponent
    bottom, top = np.minimum(*ends), np.maximum(*ends)
    mixed = (base[0] <= 0) & (base[1] >= 0)
    if exponent == int(exponent):
        even = int(exponent) % 2 == 0
        if exponent > 0:
            bottom = np.where(mixed & even, 0.0, bottom)
        else:
            bottom, top = np.where(mixed, 0.0 if even else -np.inf, bottom), np.where(mixed, np.inf, top)
    else:
        # The base is not negative where the function is real.
        bottom = np.where(base[0] <= 0, 0.0, bottom)
        top = np.where(base[0] <= 0, np.inf if exponent < 0 else np.maximum(base[1], 0.0) ** exponent, top)
    return _outward(bottom, top, np.maximum(np.abs(bottom), np.abs(top)))


def _times(a: Enclosure, b: Enclosure) -> Enclosure:
    products = np.stack([a[i] * b[j] for i in (0, 1) for j in (0, 1)])
    # Zero times an unbounded factor: the interval holds zero, and may hold anything.
    unknown = np.isnan(products).any(0)
    bottom = np.where(unknown, -np.inf, np.nan_to_num(products, nan=0.0, posinf=np.inf, neginf=-np.inf).min(0))
    top = np.where(unknown, np.inf, np.nan_to_num(products, nan=0.0, posinf=np.inf, neginf=-np.inf).max(0))
    return _outward(bottom, top, a[2] * b[2])


def _outward(bottom: Any, top: Any, size: Any) -> Enclosure:
    """The bounds moved apart by what rounding may have taken, except from an exact zero."""
    slack = np.where(np.isfinite(size), size, 0.0) * _ROUNDING
    lower = np.where(bottom == 0, 0.0, bottom - slack)
    # A bound of known sign keeps it.
    lower = np.where((bottom > 0) & (slack < bottom), lower, np.where(bottom > 0, np.minimum(lower, 0.0), lower))
    return np.where(np.isnan(lower), -np.inf, lower), np.where(np.isnan(top), np.inf, top + slack), np.asarray(size)
