r"""The search for a formula: the fewest terms of the catalogue or of a dictionary that fit a recovered weight."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from opdtheory import divergences
from opdtheory.auditing.naming.atoms import PARAMETRIC, Atom, as_number, catalogue_atom, catalogue_atoms, fixed_atoms
from opdtheory.auditing.naming.sparse import Curve, Subset, all_matter, best_subset, fit, fit_parameter, snap
from opdtheory.divergences.registry import Family, parametric, summands
from opdtheory.objective import label_of_terms

if TYPE_CHECKING:
    import sympy

__all__ = [
    "Formula",
    "Kind",
    "columns_of",
    "expressions",
    "find_clamped",
    "find_formula",
    "find_window",
    "label_of",
    "most_terms",
]

# What a weight turned out to be.
Kind = Literal["zero", "catalogue", "combination", "expression", "numeric"]

Array = np.ndarray[Any, np.dtype[np.float64]]

# Log-ratios this close are reported as one.
_NARROW = 1e-3

# With coarser rounding than this, three terms fit almost anything.
_SHARP = 1e-6


@dataclass(frozen=True)
class Formula:
    """Terms with coefficients, of a log-ratio that may be clamped."""

    kind: Kind
    atoms: tuple[Atom, ...]
    coefficients: Array
    error: float
    clamp: tuple[float, float] | None = None

    def values(self, log_u: Array) -> Array:
        """The weight, up to a constant, elementwise."""
        return np.asarray(sum(self._terms(log_u)))

    def size(self, log_u: Array) -> Array:
        """The sum of the sizes of the terms, to which rounding is relative."""
        return np.asarray(sum(map(abs, self._terms(log_u))))

    def _terms(self, log_u: Array) -> list[Array]:
        t = log_u if self.clamp is None else np.clip(log_u, *self.clamp)
        return [c * atom.values(t) for c, atom in zip(self.coefficients, self.atoms, strict=True)]


def most_terms(curve: Curve, tolerance: float) -> int:
    """The number of terms that a fit cannot have by chance: with the constant, at most half the number of points."""
    most = min(3, (len(curve.points) - 1) // 2 - 1)
    return most if tolerance <= _SHARP else min(most, 2)


def find_formula(curve: Curve, tolerance: float) -> Formula | None:
    """The formula with the fewest terms that fits to the tolerance."""
    most = most_terms(curve, tolerance)
    sharp = tolerance <= _SHARP
    steps: list[tuple[int, Callable[[], Formula | None]]] = [
        (1, lambda: _single(curve, tolerance)),
        (1, lambda: _combined(curve, _independent(), "combination", 1, tolerance)),
        (2, lambda: _family(curve, tolerance)),
        (1, lambda: _combined(curve, fixed_atoms(), "expression", 1, tolerance)),
        (2, lambda: _parametric(curve, PARAMETRIC, (), tolerance)),
        (2, lambda: _combined(curve, _independent(), "combination", 2, tolerance)),
    ]
    if sharp:
        steps += [
            (2, lambda: _combined(curve, fixed_atoms(), "expression", 2, tolerance)),
            (3, lambda: _combined(curve, _independent(), "combination", 3, tolerance)),
            (3, lambda: _combined(curve, fixed_atoms(), "expression", 3, tolerance)),
            (3, lambda: _parametric(curve, PARAMETRIC, fixed_atoms(), tolerance)),
        ]
    return next((found for terms, step in steps if terms <= most and (found := step()) is not None), None)


def _independent() -> tuple[Atom, ...]:
    """The catalogue's weights that sums are written in."""
    labels = {entry.label for entry in summands()}
    return tuple(atom for atom in catalogue_atoms() if atom.label in labels)


def columns_of(atoms: tuple[Atom, ...], points: Array) -> Array:
    """The values of the atoms as columns, `(points, atoms)`."""
    return np.column_stack([atom.values(points) for atom in atoms]) if atoms else np.empty((len(points), 0))


def _single(curve: Curve, tolerance: float) -> Formula | None:
    """A positive multiple of one catalogue weight without a parameter."""
    best: Formula | None = None
    for atom in catalogue_atoms():
        columns = columns_of((atom,), curve.points)
        coefficients, constant, error = fit(curve, columns)
        if coefficients[0] > 0 and error <= tolerance and (best is None or error < best.error):
            subset = snap(curve, columns, Subset((0,), coefficients, constant, error), tolerance)
            best = Formula("catalogue", (atom,), subset.coefficients, subset.error)
    return best


def _members() -> dict[str, tuple[Callable[[float], Atom], float, float]]:
    """The weights of the catalogue's families, by parameter."""
    return {each.name: (_maker(each), *each.sought) for each in parametric()}


@functools.cache
def _maker(family: Family) -> Callable[[float], Atom]:
    return lambda value: catalogue_atom(family(value))


@functools.lru_cache(maxsize=4096)
def _tabulated(make: Callable[[float], Atom], value: float, points: tuple[float, ...]) -> Array:
    """The values of a member of a family, cached: every audit starts from the same members on the same grid."""
    return make(value).values(np.array(points))


def _family(curve: Curve, tolerance: float) -> Formula | None:
    found = _parametric(curve, _members(), (), tolerance)
    if found is None:
        return None
    return replace(found, kind="catalogue" if found.coefficients[0] > 0 else "combination")


def _parametric(
    curve: Curve,
    makers: dict[str, tuple[Callable[[float], Atom], float, float]],
    beside: tuple[Atom, ...],
    tolerance: float,
) -> Formula | None:
    """A function with one fitted parameter, alone or with one function of the dictionary."""
    others, points = columns_of(beside, curve.points), tuple(curve.points.tolist())
    for make, low, high in makers.values():
        column = functools.partial(_tabulated, make, points=points)
        fitted = fit_parameter(curve, column, low, high, others, tolerance)
        if fitted is None:
            continue
        atoms = (make(fitted[0]),) if fitted[1] is None else (make(fitted[0]), beside[fitted[1]])
        columns = columns_of(atoms, curve.points)
        coefficients, constant, error = fit(curve, columns)
        if error <= tolerance and all_matter(curve, columns, coefficients, tolerance):
            subset = snap(curve, columns, Subset(tuple(range(len(atoms))), coefficients, constant, error), tolerance)
            return Formula("expression", atoms, subset.coefficients, subset.error)
    return None


def _combined(curve: Curve, atoms: tuple[Atom, ...], kind: Kind, size: int, tolerance: float) -> Formula | None:
    columns = columns_of(atoms, curve.points)
    subset = best_subset(curve, columns, size)
    if subset is None or subset.error > tolerance:
        return None
    if not all_matter(curve, columns[:, list(subset.indices)], subset.coefficients, tolerance):
        return None
    subset = snap(curve, columns, subset, tolerance)
    return Formula(kind, tuple(atoms[i] for i in subset.indices), subset.coefficients, subset.error)


def _plateaus(curve: Curve, tolerance: float) -> tuple[int, int]:
    """The number of points at each end with one value; 0 for a single point."""
    limit = tolerance * curve.scale
    left = int(np.argmin(np.append(np.abs(curve.values - curve.values[0]) <= limit, False)))
    right = int(np.argmin(np.append(np.abs(curve.values - curve.values[-1])[::-1] <= limit, False)))
    return (left if left > 1 else 0), (right if right > 1 else 0)


def find_clamped(curve: Curve, tolerance: float) -> Formula | None:
    """A formula of a clamped log-ratio; the clamp's ends are where the formula meets the plateaus (T4)."""
    left, right = _plateaus(curve, tolerance)
    inner = slice(left, len(curve.points) - right)
    if left + right == 0 or inner.stop - inner.start < 5:
        return None
    keep = np.arange(len(curve.points))[inner]
    inside = find_formula(curve.part(keep), tolerance)
    if inside is None:
        return None
    constant = fit(curve.part(keep), inside.values(curve.points[keep])[:, None])[1]
    ends: list[float] = []
    for count, index, step, beyond in ((left, int(keep[0]), -1, -np.inf), (right, int(keep[-1]), 1, np.inf)):
        end = _meets(inside, constant, curve, index, step, tolerance) if count else beyond
        if end is None:
            return None
        ends.append(end)
    found = replace(inside, kind="expression", clamp=(ends[0], ends[1]))
    error = fit(curve, found.values(curve.points)[:, None])[2]
    return replace(found, error=error) if error <= 10.0 * tolerance else None


def _meets(inside: Formula, constant: float, curve: Curve, index: int, step: int, tolerance: float) -> float | None:
    """Where the formula reaches the plateau, between the last grid point inside and the first one on it."""
    from scipy.optimize import brentq

    near, far, plateau = curve.points[index], curve.points[index + step], curve.values[index + step]

    def gap(t: float) -> float:
        return float(inside.values(np.array([t]))[0]) + constant - plateau

    def fits(t: float, at: int) -> bool:
        return bool(abs(gap(t)) <= tolerance * curve.scale[at])

    if fits(near, index):
        return _short(float(near), lambda t: fits(t, index))
    if fits(far, index + step):
        return _short(float(far), lambda t: fits(t, index + step))
    if gap(near) * gap(far) > 0:
        return None
    end = float(brentq(gap, near, far, xtol=1e-15))
    return _short(end, lambda t: abs(t - end) < 1e-9)


def _short(end: float, fits: Callable[[float], bool]) -> float:
    """The bound as a short log-ratio or a short ratio, since a nearly flat weight determines it only roughly."""
    for digits in range(7):
        for short in (round(end, digits), float(np.log(max(round(float(np.exp(end)), digits), 1e-300)))):
            if abs(short - end) < _NARROW and fits(short):
                return short
    return end


def find_window(curve: Curve, tolerance: float) -> str | None:
    """A formula inside a window, and a constant outside with a jump, whose position is known to a cell of the grid."""
    left, right = _plateaus(curve, tolerance)
    keep = np.arange(left, len(curve.points) - right)
    if left + right == 0 or len(keep) < 5 or (inside := find_formula(curve.part(keep), tolerance)) is None:
        return None
    t = curve.points
    low = _within(t[keep[0] - 1], t[keep[0]]) if left else "-inf"
    high = _within(t[keep[-1]], t[keep[-1] + 1]) if right else "inf"
    return f"{label_of(inside)} for log u between {low} and {high}, constant outside with a jump"


def _within(low: float, high: float) -> str:
    """A log-ratio known to a cell of the grid: the digits that both ends share, or both ends."""
    near, far = f"{low:.4g}", f"{high:.4g}"
    if high - low < _NARROW:
        return near if near == far else f"{(low + high) / 2.0:.4g}"
    return f"{low:.3g}..{high:.3g}"


def label_of(found: Formula) -> str:
    """The formula as text, with the ratios of its coefficients."""
    if found.kind == "catalogue":
        text = found.atoms[0].label
    else:
        labels = [atom.label for atom in found.atoms]
        text = label_of_terms(dict(zip(labels, found.coefficients.tolist(), strict=True)))
    if found.clamp is None:
        return text
    return f"{text} of u with log u clamped to {_interval(*found.clamp)}"


def _interval(low: float, high: float) -> str:
    if low == -np.inf:
        return f"at most {high:.6g}"
    return f"at least {low:.6g}" if high == np.inf else f"[{low:.6g}, {high:.6g}]"


def expressions(found: Formula) -> tuple[sympy.Expr, sympy.Expr | None]:
    """The weight and its implied generator, term by term."""
    import sympy

    numbers = [as_number(float(c)) for c in found.coefficients]
    weight = sympy.Add(*(c * atom.expr() for c, atom in zip(numbers, found.atoms, strict=True)))
    parts = [atom.generator() for atom in found.atoms]
    generator = None
    if all(part is not None for part in parts):
        generator = sympy.Add(*(c * part for c, part in zip(numbers, parts, strict=True)))
    if found.clamp is None:
        return weight, generator
    return _piecewise(weight, generator, found.clamp)


def _piecewise(
    weight: sympy.Expr, generator: sympy.Expr | None, clamp: tuple[float, float]
) -> tuple[sympy.Expr, sympy.Expr | None]:
    """The expressions with a clamp: outside it the weight is constant, the generator its own tangent (T4)."""
    import sympy

    u = divergences.symbol()
    low, high = (_edge(end) for end in clamp)
    bounded = u if clamp[0] == -np.inf else sympy.Max(u, low)
    bounded = bounded if clamp[1] == np.inf else sympy.Min(bounded, high)
    clamped = weight.subs(u, bounded)
    if generator is None:
        return clamped, None
    slope = generator.diff(u)

    def tangent(at: sympy.Expr) -> sympy.Expr:
        return sympy.expand(generator.subs(u, at) + slope.subs(u, at) * (u - at))

    # If 1 itself is outside, the gauge f(1) = f'(1) = 0 subtracts the tangent there.
    gauge = tangent(low) if clamp[0] > 0 else tangent(high) if clamp[1] < 0 else sympy.Integer(0)
    branches = [] if clamp[0] == -np.inf else [(tangent(low) - gauge, u < low)]
    inside = generator - gauge
    if clamp[1] == np.inf:
        return clamped, sympy.Piecewise(*branches, (inside, True))
    return clamped, sympy.Piecewise(*branches, (inside, u < high), (tangent(high) - gauge, True))


def _edge(log_bound: float) -> sympy.Expr:
    """The ratio at a bound, exactly if it or its logarithm is a short number."""
    import sympy

    if not np.isfinite(log_bound):
        return sympy.Integer(1)
    bound = float(np.exp(log_bound))
    short = round(bound, 6)
    return as_number(short) if abs(short - bound) <= 1e-12 * bound else sympy.exp(as_number(log_bound))
