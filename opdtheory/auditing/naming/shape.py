r"""What follows from a weight's formula: monotonicity, other fixed points, limits, growth and the second moment."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opdtheory.auditing.naming.formula import Formula
from opdtheory.divergences import implied_generator_values, symbol

if TYPE_CHECKING:
    import sympy

__all__ = ["Growth", "Properties", "Shape", "shape_of"]

Array = np.ndarray[Any, np.dtype[np.float64]]

# Log-ratios over which a formula is checked to be monotone; u^2 does not overflow float64 there.
_WIDE = np.linspace(-30.0, 30.0, 2401)
_FALLS = 1e-9

# Growth is measured between three log-ratios, each twice the one before. From the second of these starts only, if both
# can be used: further out a small leading term leads. Each nat takes digits, so that 1 + 1/u differs from 1.
_FARS = (100, 1000)
_DIGITS = 3
_EXAMPLES = 3


@dataclass(frozen=True)
class Shape:
    """A recovered weight: its grid, its slope at the teacher, and its values if it is a function of the ratio."""

    log_u: Array
    non_decreasing: bool
    slope: float
    flat: float
    values: Array = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Growth:
    r"""The behaviour $w \sim c\, u^a \log^b u$ at one end, or a finite limit.

    Attributes:
        limit: limit of $w(u) - w(1)$, which may be infinite.
        power: $a$.
        log_power: $b$.
    """

    limit: float
    power: float = 0.0
    log_power: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether the limit is finite."""
        return math.isfinite(self.limit)

    @property
    def text(self) -> str:
        """The leading behaviour, such as `u log u`."""
        parts = [
            "" if self.power == 0 else "u" if self.power == 1 else f"u^{self.power:.6g}",
            "" if self.log_power == 0 else "log u" if self.log_power == 1 else f"log^{self.log_power:.6g} u",
        ]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Properties:
    """The part of a `WeightForm` that follows from its formula."""

    genuine: bool
    fixed_points: list[str]
    limits: dict[str, float]
    growth: str
    second_moment: str
    generator_values: list[float]


def shape_of(shape: Shape, found: Formula | None, expr: sympy.Expr | None, generator: sympy.Expr | None) -> Properties:
    """The properties of a weight, from its formula or else from its values on the grid."""
    if found is None or expr is None:
        return _numeric(shape)
    wide, size = found.values(_WIDE), found.size(_WIDE)
    falls = bool((np.diff(wide) < -_FALLS * np.maximum(size[1:], size[:-1])).any())
    ends = {key: _growth(expr, key) for key in ("0", "inf")}
    falls = falls or ends["0"].limit == math.inf or ends["inf"].limit == -math.inf
    return Properties(
        genuine=shape.non_decreasing and not falls,
        fixed_points=_fixed_points(lambda t: found.values(t), shape),
        limits={key: growth.limit for key, growth in ends.items()},
        growth=f"{_words('0', ends['0'])}; {_words('inf', ends['inf'])}",
        second_moment=_second_moment(str(expr), ends),
        generator_values=_generator_values(lambda t: found.values(t), shape, generator),
    )


def _numeric(shape: Shape) -> Properties:
    limits = {"0": math.nan, "inf": math.nan}
    if len(shape.values) != len(shape.log_u):
        unknown = "unknown: the weight is not a function of the ratio alone"
        return Properties(False, [], limits, unknown, unknown, [])
    from scipy.interpolate import PchipInterpolator

    low, high = shape.log_u[0], shape.log_u[-1]
    curve = PchipInterpolator(shape.log_u, shape.values) if len(shape.log_u) > 1 else None
    ends = f"w - w(1) is {shape.values[0]:.4g} at log u = {low:.3g} and {shape.values[-1]:.4g} at {high:.3g}"
    return Properties(
        genuine=shape.non_decreasing,
        fixed_points=[] if curve is None else _fixed_points(curve, shape),
        limits=limits,
        growth=f"known between log u = {low:.3g} and {high:.3g} only: {ends}",
        second_moment=f"unknown beyond |log u| = {high:.3g}",
        generator_values=[] if curve is None else _generator_values(curve, shape, None),
    )


def _generator_values(curve: Any, shape: Shape, generator: sympy.Expr | None) -> list[float]:
    log_u = torch.from_numpy(shape.log_u)
    if generator is not None and not generator.has(_polylogarithm()):
        function = _mpmath(generator)
        return [float(function(math.exp(t))) if t != 0.0 else 0.0 for t in shape.log_u.tolist()]
    breaks = [] if generator is not None else shape.log_u.tolist()
    return implied_generator_values(lambda t: torch.from_numpy(np.asarray(curve(t.numpy()))), log_u, breaks).tolist()


def _polylogarithm() -> type:
    import sympy

    return sympy.polylog


def _mpmath(expr: sympy.Expr) -> Any:
    import sympy

    return sympy.lambdify(symbol(), expr, "mpmath")


def _growth(expr: sympy.Expr, end: str) -> Growth:
    """The leading behaviour towards one end: of its terms `c u^a log^b u`, or measured at far points."""
    found = _leading(expr, end)
    if found is not None:
        return found
    for far in _FARS:
        found = _growth_at(_mpmath(expr), 1 if end == "inf" else -1, far) or found
        if found is not None and found.bounded:
            break
    return found or Growth(math.nan)


def _leading(expr: sympy.Expr, end: str) -> Growth | None:
    """The leading behaviour of a sum of terms `c u^a log^b u`; None for another weight."""
    import sympy

    u, terms = symbol(), []
    for term in sympy.Add.make_args(sympy.expand(expr)):
        coefficient, rest = term.as_independent(u)
        powers = rest.as_powers_dict()
        power, log_power = sympy.S(powers.pop(u, 0)), sympy.S(powers.pop(sympy.log(u), 0))
        powers.pop(sympy.Integer(1), None)
        if powers or not (power.is_number and log_power.is_Integer and log_power >= 0):
            return None
        terms.append((float(power), int(log_power), float(coefficient)))
    sign = 1 if end == "inf" else -1
    power, log_power, coefficient = max(terms, key=lambda term: (sign * term[0], term[1]))
    if (sign * power, log_power) <= (0.0, 0):
        constant = sum(c for a, b, c in terms if a == b == 0)
        limit = constant - sum(c for _, b, c in terms if b == 0)
        return Growth(limit if abs(limit) > 1e-100 else 0.0)
    return Growth(math.copysign(math.inf, coefficient * sign**log_power), _near_fraction(power), float(log_power))


def _growth_at(function: Any, sign: int, far: int) -> Growth | None:
    """The behaviour between three far points, each twice as far as the one before; None where the weight is zero."""
    import mpmath

    with mpmath.workdps(_DIGITS * far):
        values = [mpmath.re(function(mpmath.exp(sign * k * far))) for k in (1, 2, 4)]
        if abs(values[2] - values[1]) <= mpmath.mpf(10) ** -12 * (1 + abs(values[2])):
            limit = float(values[2] - mpmath.re(function(mpmath.mpf(1))))
            return Growth(limit if abs(limit) > 1e-100 else 0.0)
        if 0 in values:
            return None
        first, second = (mpmath.log(abs(b / a)) for a, b in ((values[0], values[1]), (values[1], values[2])))
        power = float((second - first) / far) * sign
        log_power = float((2 * first - second) / mpmath.log(2))
    rounded = round(log_power)
    # The power of the logarithm is an integer; the rest is a slow correction to the leading term.
    limit = math.copysign(math.inf, float(mpmath.sign(values[2])))
    return Growth(limit, _near_fraction(power), float(rounded))


def _near_fraction(value: float) -> float:
    short = round(value, 6)
    return 0.0 if abs(short) < 1e-3 else round(short, 2) if abs(round(short, 2) - short) < 1e-3 else short


def _words(end: str, growth: Growth) -> str:
    where = "u -> 0" if end == "0" else "u -> inf"
    if growth.bounded:
        return f"w - w(1) tends to {growth.limit:.4g} as {where}"
    who, other = ("student", "teacher") if end == "0" else ("teacher", "student")
    verb = "grows" if growth.limit > 0 else "falls"
    return f"w {verb} without bound like {growth.text} as {where}, where the {who} puts mass that the {other} does not"


def _second_moment(expr: str, ends: dict[str, Growth]) -> str:
    """What E_p[w^2] can be: p may put any mass near ratio 0, but E_p[u] = 1 bounds that on large ones (T7d)."""
    name = {"u": "E_p[w^2] = E_p[u^2] = 1 + chi2(q||p)", "log(u)": "E_p[w^2] = E_p[log^2 u]"}.get(
        expr, f"E_p[w^2] with w = {expr}"
    )
    if ends["0"].bounded and ends["inf"].bounded:
        return f"{name}: bounded for every pair"
    causes = []
    if not ends["0"].bounded:
        causes.append("where the teacher's probability vanishes")
    large = ends["inf"]
    if not large.bounded and (large.power > 0.5 or (large.power == 0.5 and large.log_power > 0)):
        causes.append("where the student's does")
    if causes:
        return f"{name}: can be infinite, {' and '.join(causes)}"
    return f"{name}: finite for every pair, since E_p[u] <= 1"


def _fixed_points(curve: Any, shape: Shape) -> list[str]:
    """Two-token distributions other than the teacher's whose two ratios have the same weight (T5), as text."""
    from scipy.optimize import brentq

    limit = float(shape.log_u[-1])
    t = np.linspace(-limit, limit, 801)
    values = np.asarray(curve(t), dtype=np.float64)
    close = 1e-10 * max(float(np.ptp(values)), 1e-300)
    found: list[str] = []
    for mine, others in _directions(t, limit):
        if len(found) == _EXAMPLES:
            break
        level = float(np.asarray(curve(np.array([mine])))[0])
        gaps = np.asarray(curve(others), dtype=np.float64) - level
        crossing = np.flatnonzero((np.sign(gaps[:-1]) * np.sign(gaps[1:]) < 0) | (np.abs(gaps[1:]) <= close))
        if not len(crossing):
            continue
        a, b = others[crossing[0]], others[crossing[0] + 1]
        if abs(gaps[crossing[0] + 1]) <= close:
            root = float(b)
        else:
            root = float(brentq(lambda s, w=level: float(np.asarray(curve(np.array([s])))[0]) - w, a, b, xtol=1e-14))
            # A jump across the level is not a solution.
            if abs(float(np.asarray(curve(np.array([root])))[0]) - level) > 1e-6 * max(float(np.ptp(values)), 1e-300):
                continue
        point = _fixed_point(*sorted((mine, root)))
        found += [point] if point not in found else []
    return found


def _directions(t: Array, limit: float) -> list[tuple[float, Array]]:
    """A ratio on one side of 1, and the ratios on the other side to compare with it, nearest first."""
    sides = []
    for size in (math.log(2.0), math.log(1.2), math.log(5.0), 0.75 * limit):
        if size < limit:
            sides += [(size, t[t < -1e-9][::-1]), (-size, t[t > 1e-9])]
    return sides


def _fixed_point(low: float, high: float) -> str:
    u1, u2 = math.exp(low), math.exp(high)
    p = (u2 - 1) / (u2 - u1)
    return (
        f"p = ({p:.4g}, {1 - p:.4g}) for the teacher q = ({p * u1:.4g}, {(1 - p) * u2:.4g}): "
        f"w is equal at u = {u1:.4g} and {u2:.4g}"
    )
