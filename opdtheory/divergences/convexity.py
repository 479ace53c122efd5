r"""Whether an expression in `u` is a convex generator: $f(1) = 0$, $f$ real, finite and continuous, $f'' \ge 0$.

Enclosures of the curvature $u^2 f''$ over whole intervals of $\log u$ show where it is not negative, and the intervals
that they leave open are halved, so that dents between the points of a grid are found too. A violation counts only if
mpmath confirms it with many digits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opdtheory.divergences.custom import lambdify, symbol
from opdtheory.divergences.intervals import Enclosure, enclosures
from opdtheory.divergences.transform import differentiate, has_kinks, is_zero, only_u, smooth_pieces
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy as np
    import sympy

__all__ = ["check_generator", "is_convex"]

_GRID_LIMIT = 60  # a grid covers |log u| up to this
_GRID_POINTS = 968  # one more than a prime
_FAR_LIMIT = 2000  # sparse points beyond it go up to this
_DIGITS = 50

# The search by enclosures: the range of |log u|, the first number of intervals, how often these are halved, and how
# many are kept at a time.
_RANGE, _INTERVALS, _HALVINGS, _KEPT = 64.0, 1024, 36, 2048


def is_convex(expr: sympy.Expr) -> bool:
    r"""Whether $f'' \ge 0$ on $(0, \infty)$, as far as enclosures for $|\log u| \le 64$ and points up to 2000 show.

    Raises:
        InvalidArgumentError: `expr` is not a real sympy expression in `u` alone.
    """
    return _violation(_real(expr)) is None


def check_generator(expr: sympy.Expr) -> sympy.Expr:
    """The expression in `symbol()`, if it is a convex generator that vanishes at one.

    Raises:
        InvalidArgumentError: a condition is violated; the message names it, with numbers.
    """
    f = _real(expr)
    at_one = f.subs(symbol(), 1)
    if at_one.is_finite is False or not is_zero(at_one):
        raise InvalidArgumentError("expr", f"violates f(1) = 0: f(1) = {at_one}; subtract that constant")
    violation = _violation(f)
    if violation is not None:
        raise InvalidArgumentError("expr", f"violates convexity on (0, oo): {violation}")
    return f


def _real(expr: sympy.Expr) -> sympy.Expr:
    """The expression in `symbol()`, if all that it is made of is real, finite and without steps of its own."""
    import sympy

    f = only_u(expr)
    for bad in (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        if f.has(bad):
            raise InvalidArgumentError("expr", f"must have finite coefficients, got {bad} in {f}")
    if f.has(sympy.I):
        raise InvalidArgumentError("expr", f"must be real, got the imaginary unit in {f}")
    steps = (sympy.floor, sympy.ceiling, sympy.frac, sympy.Mod, sympy.DiracDelta, sympy.KroneckerDelta)
    if f.has(*steps):
        raise InvalidArgumentError("expr", f"must be continuous, got a step function in {f}")
    for node in f.atoms(sympy.exp, sympy.Pow):
        if any(symbol() in inner.exp.free_symbols for inner in node.exp.atoms(sympy.exp, sympy.Pow)):
            raise InvalidArgumentError("expr", f"must not have a power of u in the exponent of an exponent, got {node}")
    return f


def _violation(f: sympy.Expr) -> str | None:
    """A sentence about a violation of convexity, or None."""
    return _jump(f) or _pole(f) or _falls_on_the_grid(f) or _falls_within(f)


def _jump(f: sympy.Expr) -> str | None:
    """Where a generator in pieces is not continuous, or its slope falls from one piece to the next."""
    import sympy

    if not has_kinks(f):
        return None
    u, pieces = symbol(), smooth_pieces("expr", f)
    for (_, edge, left), (_, _, right) in zip(pieces[:-1], pieces[1:], strict=True):
        values = [sympy.N(g.subs(u, edge), _DIGITS) for g in (left, f, right)]
        slopes = [sympy.N(differentiate(g).subs(u, edge), _DIGITS) for g in (left, right)]
        at = f"at u = {sympy.N(edge, 6)}"
        if not all(value.is_real for value in values):
            return f"f is not finite {at}"
        scale = max(1, *(abs(value) for value in values))
        if max(values) - min(values) > scale * sympy.Float("1e-30"):
            return f"f jumps from {sympy.N(min(values), 6)} to {sympy.N(max(values), 6)} {at}"
        if all(slope.is_real for slope in slopes):
            fall = slopes[0] - slopes[1]
            if fall > sympy.Float("1e-30") * max(1, *(abs(slope) for slope in slopes)):
                return f"f' falls by {sympy.N(fall, 6)} {at}"
    return None


def _pole(f: sympy.Expr) -> str | None:
    """Where a denominator or the argument of a logarithm vanishes, as far as these are polynomials."""
    import sympy

    u = symbol()
    for low, high, piece in smooth_pieces("expr", f):
        nodes = piece.atoms(sympy.Pow, sympy.log)
        bases = {n.args[0] for n in nodes if isinstance(n, sympy.log) or n.exp.is_negative}
        for base in bases:
            _, denominator = base.as_numer_denom()
            for polynomial in (base * denominator, denominator):
                if u not in polynomial.free_symbols or not polynomial.is_polynomial(u):
                    continue
                poly = sympy.Poly(polynomial, u)
                if poly.degree() > 40:
                    continue
                # A root that f does not notice cancels, as in (u**2 - 1)/(u - 1).
                for root in sympy.Poly(sympy.nsimplify(poly.as_expr(), rational=True), u).nroots(n=30, maxsteps=200):
                    real, imaginary = sympy.re(root), sympy.im(root)
                    if abs(imaginary) > sympy.Float("1e-20") or not low < real < high or not real > 0:
                        continue
                    if _grows_near(piece, real):
                        return f"f is not finite at u = {sympy.N(real, 6)}"
    return None


def _grows_near(piece: sympy.Expr, at: sympy.Expr) -> bool:
    """Whether a function has no finite limit at a point, from its values closer and closer to it."""
    import mpmath

    function = lambdify(symbol(), piece)
    with mpmath.workdps(120):
        sizes = []
        for k in (10, 20, 25):
            try:
                value = function(mpmath.mpf(at) * (1 + mpmath.mpf(10) ** -k))
            except (ZeroDivisionError, ValueError, OverflowError):
                return True
            sizes.append(abs(value))
        # A logarithm adds the same at each step, a convergent value less and less.
        return bool(sizes[2] - sizes[1] > (sizes[1] - sizes[0]) / 4 > mpmath.mpf("1e-6"))


def _falls_on_the_grid(f: sympy.Expr) -> str | None:
    """The violation nearest to u = 1 at the points of a grid, by the values of f, f' and f''."""
    import mpmath

    u = symbol()
    first_derivative = differentiate(f)
    second_derivative = differentiate(first_derivative)
    value_at, slope_at, curvature_at = (lambdify(u, g) for g in (f, first_derivative, second_derivative))
    found: list[tuple[Any, str]] = []
    previous = None
    for t in _grid():
        # Far out, terms that cancel may be u**2 times as large as what they leave.
        digits = _DIGITS + int(abs(t)) if abs(t) > _GRID_LIMIT else _DIGITS
        with mpmath.workdps(digits):
            point = mpmath.exp(t)
            try:
                value, slope, curvature = (mpmath.mpmathify(g(point)) for g in (value_at, slope_at, curvature_at))
            except (ZeroDivisionError, ValueError, OverflowError):
                return f"f is not finite at u = {mpmath.nstr(point, 6)}"
            if any(isinstance(x, mpmath.mpc) and x.imag != 0 for x in (value, slope, curvature)):
                return f"f is not real at u = {mpmath.nstr(point, 6)}"
            slope, curvature = mpmath.re(slope), mpmath.re(curvature)
            if not all(mpmath.isfinite(x) for x in (mpmath.re(value), slope, curvature)):
                return f"f is not finite at u = {mpmath.nstr(point, 6)}"
            tolerance = mpmath.mpf("1e-40")
            if curvature < 0 and _is_negative(curvature_at, t, abs(slope) / point):
                found.append((abs(t), f"f''({mpmath.nstr(point, 6)}) = {mpmath.nstr(curvature, 6)} < 0"))
            elif previous is not None and slope < previous[1] - tolerance * max(1, abs(slope)):
                span = f"between u = {mpmath.nstr(previous[0], 10)} and {mpmath.nstr(point, 10)}"
                found.append((abs(t), f"f' falls by {mpmath.nstr(previous[1] - slope, 6)} {span}"))
            previous = (point, slope)
    return min(found)[1] if found else None


def _is_negative(curvature_at: Any, t: Any, scale: Any) -> bool:
    """Whether the second derivative is negative, with digits enough to tell from rounding."""
    import mpmath

    with mpmath.workdps(2 * _DIGITS + 2 * int(abs(t))):
        point = mpmath.exp(mpmath.mpf(t))
        value = mpmath.re(curvature_at(point))
        return bool(value < -scale * mpmath.mpf(10) ** (-_DIGITS - abs(t)))


def _falls_within(f: sympy.Expr) -> str | None:
    """A violation between the points of the grid, found by halving what enclosures of the curvature leave open."""
    import mpmath
    import numpy as np
    import sympy

    u = symbol()
    for low, high, piece in smooth_pieces("expr", f):
        second = differentiate(differentiate(piece))
        written = [second]
        if second.is_rational_function(u) and not second.has(sympy.Float):
            # Without terms that cancel, the enclosures are narrow.
            written.append(sympy.factor(second))
        if any(each.is_nonnegative for each in written):
            continue
        curvature_at = lambdify(u, second)
        ends = [math.log(x) if 0 < x < math.inf else s * _RANGE for x, s in ((float(low), -1), (float(high), 1))]
        edges = np.linspace(max(ends[0], -_RANGE), min(ends[1], _RANGE), _INTERVALS + 1)
        left, right = edges[:-1], edges[1:]
        for _ in range(_HALVINGS):
            if not len(left):
                break
            bounds = _narrowest(written, left, right)
            if bounds is None:
                break
            middle = (left + right) / 2
            at_middle = _narrowest(written, middle, middle)
            assert at_middle is not None
            for t in middle[at_middle[1] < 0][:4]:
                if _is_negative(curvature_at, float(t), 0):
                    point = mpmath.exp(mpmath.mpf(float(t)))
                    return f"f''({mpmath.nstr(point, 10)}) = {mpmath.nstr(curvature_at(point), 6)} < 0"
            undecided = ~(bounds[0] >= 0)
            # Those that may be the most negative go first, relative to the size of the terms.
            order = np.argsort(np.where(undecided, bounds[0] / bounds[2], np.inf), kind="stable")
            order = order[: min(int(undecided.sum()), _KEPT)]
            left, middle, right = left[order], middle[order], right[order]
            left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    return None


def _narrowest(written: list[sympy.Expr], low: np.ndarray, high: np.ndarray) -> Enclosure | None:
    """The enclosure that several forms of one function have in common; None where one cannot be enclosed."""
    import numpy as np

    found = [each for each in (enclosures(form, low, high) for form in written) if each is not None]
    if len(found) < len(written):
        return None
    lower, upper, sizes = zip(*found, strict=True)
    return np.max(lower, 0), np.min(upper, 0), np.min(sizes, 0)


def _grid() -> list[Any]:
    import mpmath

    # Off the round numbers, so that no kink lies on a grid point; and denser around u = 1.
    coarse = mpmath.linspace(-_GRID_LIMIT, _GRID_LIMIT, _GRID_POINTS)
    fine = [s * mpmath.mpf(2) ** -k * mpmath.mpf("1.01") for k in range(1, 30) for s in (-1, 1)]
    far = [s * _GRID_LIMIT * mpmath.mpf("1.12") ** k for k in range(1, 32) for s in (-1, 1)]
    return sorted([*coarse, *fine, *(t for t in far if abs(t) < _FAR_LIMIT)])
