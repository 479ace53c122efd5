"""T4: the divergence that a local estimator minimises, whatever its weight is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence, implied_generator_values
from opdtheory.theorems.instances.cases import (
    at_atoms,
    catalogue,
    enclose,
    interval,
    perspective,
    rational_distributions,
)
from opdtheory.theorems.instances.one_sample import in_logits, mean_gradient, weight_of
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same
from opdtheory.theorems.weight.corollaries import (
    Row,
    check_followed,
    check_stated,
    check_weights,
    convex,
    implied,
    rows,
    stated,
    values_estimated,
)

__all__ = ["theorems"]

SymbolicWeight = Callable[["sympy.Expr", "sympy.Symbol"], "sympy.Expr"]

# Catalogue generators whose implied generators sympy finds quickly.
_CLOSED = ("reverse_kl", "forward_kl", "jsd", "chi2", "neyman_chi2", "hellinger", "le_cam", "jeffreys")


def theorems() -> list[Theorem]:
    """T4."""
    return [_implied_divergence()]


def _implied_divergence() -> Theorem:
    return Theorem(
        number="T4",
        name="implied divergence",
        statement=(
            r"V[w](u) = u\int_1^u w(t)\,t^{-2}dt:\quad w_{V[w]} = w,\quad V[w_f] = f \text{ up to gauge},\quad"
            r" V[w]'' = w'/u;\quad V[w] \text{ is a genuine f-divergence} \iff w \text{ is non-decreasing}"
        ),
        hypotheses=(
            "the estimator descends -E_p[w(u) s] with a weight of the ratio alone, locally bounded on (0, ∞)",
            "where w jumps, V has a kink, and any value between the two sides will do",
        ),
        source="derived here",
        advice="Plot the local weight over log u: where it falls as u grows, no divergence is being minimised.",
        derivation=(
            Step(r"u V' - V = w", "differentiate the integral, with w an undefined function", _inverse),
            Step(r"V[k] = k\,(u - 1)", "a constant weight is a gauge: neither moves the gradient", _constant_is_gauge),
            Step(
                r"\int_1^u w_f(t)\,t^{-2}dt = f(u)/u - f(1) \implies V[w_f] = f",
                "f/t is the primitive, with f an undefined function, and f(1) = 0",
                _primitive,
            ),
            Step(r"V[w]'' = w'/u", "differentiate twice, with w an undefined function", _second_derivative),
            Step(
                r"V'(b) - V'(a) = \int_a^b \frac{dw(t)}{t}\ \ge\ \frac{w(b) - w(a)}{b}",
                "by parts; with jumps, a Stieltjes integral to which a jump j at t adds j/t. So V' never falls if and"
                " only if w never does, differentiable or not",
                _monotone_is_convex,
                in_words=True,
            ),
            Step(
                r"\nabla_\theta\,\kappa(\log u) = -\kappa'(\log u)\,s",
                "differentiating a loss of log u makes its slope the weight of the score; kappa is undefined",
                _loss_weight,
            ),
            Step(
                r"V[-f]'' = -f'/u",
                "stop-gradient descends a genuine divergence exactly if f never rises",
                _stop_gradient,
            ),
            Step(
                r"w \text{ non-decreasing} \implies \mathrm{clamp}(w, a, b),\ w(\mathrm{clamp}(\log u, -C, C))"
                r" \text{ non-decreasing}",
                "a clamp is a map that never falls, and neither does a composition of such maps",
                _clips,
                in_words=True,
            ),
        ),
        identities=(*_symbolic(), *_decided(), *_numeric()),
    )


def _symbolic() -> tuple[Identity, ...]:
    return (
        Identity(
            "implied generator",
            r"V[w](u) = u\int_1^u w(t)\,t^{-2}dt,\quad w_{V[w]} = w + \text{const}",
            _check_inverse,
            lambda f, u: u * sympy.diff(f, u) - f,
            {"f' dropped": lambda f, u: -f, "sign of f flipped": lambda f, u: u * sympy.diff(f, u) + f},
            "symbolic",
        ),
        Identity(
            "round trip",
            r"V[w_f] = f \ \text{up to}\ c(u-1)",
            _check_round_trip,
            lambda u: u - 1,
            {"no gauge term": lambda u: sympy.Integer(0), "c u for c (u - 1)": lambda u: u},
            "symbolic",
        ),
        Identity(
            "genuine exactly if monotone",
            r"V[w]'' = w'/u,\quad V[w]\ \text{convex} \iff w\ \text{non-decreasing}",
            _check_convexity,
            _never_falls,
            {"always genuine": lambda row: True, "never genuine": lambda row: False},
            "symbolic",
        ),
        Identity(
            "the table's generators",
            r"\text{the stated generator} = V[\text{local weight}]\ \text{up to gauge}",
            check_stated,
            stated,
            {
                "what their values estimate": values_estimated,
                "signs flipped": lambda: {name: -f for name, f in stated().items()},
            },
            "symbolic",
        ),
        Identity(
            "stop-gradient exactly if f never rises",
            r"V[-f]\ \text{convex} \iff f' \le 0",
            _check_stop_gradient,
            _never_rises,
            {
                "for every f": lambda f: True,
                "for none": lambda f: False,
                "if f'(1) < 0": _falls_at_one,
            },
            "symbolic",
        ),
    )


def _decided() -> tuple[Identity, ...]:
    u = divergences.symbol()
    return (
        Identity(
            "in fractions",
            r"\partial_{z_a}\textstyle\sum_b p_b V[w](q_b/p_b) = -p_a (w_a - E_p w)",
            _check_rational,
            lambda weight: weight,
            {
                "sign flipped": lambda weight: -weight,
                "the generator for the weight": implied,
                "w(1/u) for w(u)": lambda weight: weight.subs(u, 1 / u),
            },
            "exact",
        ),
        Identity(
            "falling slopes certified",
            r"\exists\, a < b: V'(b) < V'(a) \iff \text{the table says: not genuine}",
            _check_certified,
            lambda row: row.genuine,
            {
                "always genuine": lambda row: True,
                "never genuine": lambda row: False,
                "genuine if w' >= 0 at u = 1": lambda row: bool(sympy.diff(row.weight, u).subs(u, 1) >= 0),
            },
            "rigorous",
        ),
        Identity(
            "how much the slope rises",
            r"w\ \text{non-decreasing}:\ V'(b) - V'(a) \ge (w(b) - w(a))/b",
            _check_rise,
            lambda a, b, rise: rise / b,
            {"divided by a": lambda a, b, rise: rise / a, "not divided": lambda a, b, rise: rise},
            "rigorous",
        ),
    )


def _numeric() -> tuple[Identity, ...]:
    return (
        Identity(
            "corollary table",
            r"\text{each loss follows}\ \nabla D_{V[w]}\ \text{of its local weight}",
            check_followed,
            stated,
            {"what their values estimate": values_estimated},
        ),
        Identity(
            "local weights, off-policy",
            r"-E_\mu[w(u)\,s] \text{ with the table's weight, its constant too}",
            check_weights,
            0.0,
            {"another constant": 1.0},
        ),
        Identity(
            "round trip by quadrature",
            r"V[w_f] = f - f'(1)(u - 1)",
            _check_quadrature,
            lambda d, log_u: d.weight(log_u),
            {
                "-f for the weight": lambda d, log_u: -d.generator(log_u),
                "u f' for the weight": lambda d, log_u: d.log_slope(log_u),
            },
        ),
    )


def _check_inverse(back: SymbolicWeight) -> Cases:
    r"""$w_{V[w]} - w$ is constant, symbolically, for the smooth weights of the corollary table."""
    u = divergences.symbol()
    for name, row in _smooth_rows():
        yield holds(sympy.simplify(sympy.diff(back(implied(row.weight), u) - row.weight, u)) == 0, name)


def _smooth_rows() -> Iterator[tuple[str, Row]]:
    return ((name, row) for name, row in rows().items() if not row.weight.has(sympy.Max, sympy.Min, sympy.sign))


def _check_round_trip(gauge: Callable[[sympy.Symbol], sympy.Expr]) -> Cases:
    r"""$V[w_f] = f$ up to the gauge $c(u - 1)$, symbolically, for the catalogue."""
    u = divergences.symbol()
    for name in _CLOSED:
        f = divergences.divergence(name).expr
        slope = sympy.diff(f, u).subs(u, 1)
        yield holds(sympy.simplify(implied(weight_of(name)) + slope * gauge(u) - f) == 0, name)


def _check_convexity(genuine: Callable[[Row], bool]) -> Cases:
    r"""$V[w]'' = w'/u$, so $V[w]$ is convex exactly if $w$ never falls; the library's test decides the convexity."""
    u = divergences.symbol()
    for name, row in _smooth_rows():
        gap = sympy.diff(implied(row.weight), u, 2) - sympy.diff(row.weight, u) / u
        yield holds(sympy.simplify(gap) == 0, name, "curvature")
    for name, row in rows().items():
        yield holds(convex(implied(row.weight)) == genuine(row), name, "convexity")


_POINTS = [Fraction(k, 16) for k in range(1, 33)] + [Fraction(k) for k in (3, 5, 10, 30, 100)]


def _never_falls(row: Row) -> bool:
    weights = [float(row.weight.subs(divergences.symbol(), sympy.Rational(point))) for point in _POINTS]
    return all(right >= left for left, right in itertools.pairwise(weights))


def _check_stop_gradient(genuine: Callable[[sympy.Expr], bool]) -> Cases:
    r"""$V[-f]$ is convex exactly if $f$ never rises, in several gauges."""
    u = divergences.symbol()
    gauges = {"jsd": (-sympy.log(2) / 2,), "forward_kl": (0, -1, -2)}
    for name in ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "le_cam", "total_variation"):
        for c in gauges.get(name, (0, -1)):
            f = divergences.divergence(name).expr + c * u  # a constant of f changes neither side
            yield holds(convex(implied(-f)) == genuine(f), name, f"gauge {c}")


def _never_rises(f: sympy.Expr) -> bool:
    u = divergences.symbol()
    value = sympy.lambdify(u, f, "mpmath")
    points = [2.0**k for k in range(-40, 41)]
    return all(right <= left + 1e-12 for left, right in itertools.pairwise(map(value, points)))


def _falls_at_one(f: sympy.Expr) -> bool:
    u = divergences.symbol()
    return bool(sympy.diff(f, u).subs(u, 1).evalf() < 0)


def _check_quadrature(weight: Callable[[Divergence, Tensor], Tensor]) -> Cases:
    r"""By quadrature: $V[w_f] = f - f'(1)(u - 1)$ relative to the largest value."""
    log_u = torch.tensor([-2.0, -0.3, 0.0, 0.5, 2.0], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    for divergence in catalogue():
        slope = divergence.log_slope(zero)
        expected = divergence.generator(log_u) - slope * torch.expm1(log_u)
        values = implied_generator_values(functools.partial(weight, divergence), log_u, breaks=(0.0,))
        yield close(values, expected, divergence)


# Exact and rigorous forms.

# Weights whose implied generators take fractions to fractions: coefficients of powers of u.
_POWERS = ({2: 1}, {-1: -1}, {3: 1, -2: -2})


def _rational_weights() -> list[sympy.Expr]:
    """Sums of powers, a clipped one and a sign."""
    u = divergences.symbol()
    sums = [sympy.Add(*(c * u**k for k, c in terms.items())) for terms in _POWERS]
    clipped = sympy.Max(-2, sympy.Min(sympy.Rational(-1, 2), sums[1]))
    return [*sums, clipped, sympy.sign(sympy.log(u))]


def _check_rational(claim: Callable[[sympy.Expr], sympy.Expr]) -> Cases:
    r"""In fractions: the slope of $\sum_a p_a V[w](q_a/p_a)$ in the logits is $-p_a (w_a - E_p w)$."""
    for weight in _rational_weights():
        term, p, _ = perspective(implied(weight))
        in_p, claimed = sympy.diff(term, p), claim(weight)
        for student, teacher in rational_distributions()[:4]:
            if weight.has(sympy.sign) and any(a == b for a, b in zip(student, teacher, strict=True)):
                continue  # at a jump of the weight the generator has a kink, and no slope
            slopes, weights = (at_atoms(expr, student, teacher) for expr in (in_p, claimed))
            yield same(in_logits(student, slopes), mean_gradient(student, weights), weight, student, teacher)


_CORNERS = tuple(Fraction(a, b) for a, b in ((1, 50), (1, 5), (2, 3), (5, 4), (5, 2), (7, 1), (60, 1)))


def _enclosed(expr: sympy.Expr, point: Fraction) -> Any:
    """An interval around an expression in `u` at a rational point off its kinks."""
    u, e, at = divergences.symbol(), sympy.Symbol("e", positive=True), sympy.Rational(point)
    for node in sorted(expr.atoms(sympy.Piecewise), key=sympy.count_ops):
        branch = next(value for value, condition in node.args if bool(condition.subs(u, at)))
        expr = expr.xreplace({node: branch})
    if expr.has(sympy.Max, sympy.Min, sympy.sign):
        expr = expr.subs(u, at)
    return enclose(expr.xreplace({sympy.E: e}), {u: interval(point), e: iv.exp(iv.mpf(1))})


def _check_certified(genuine: Callable[[Row], bool]) -> Cases:
    r"""$V'$ of the stated generators, in intervals: certified to fall between two rational points, or never so."""
    u = divergences.symbol()
    for name, row in rows().items():
        if row.generator.has(sympy.Abs):
            continue
        slopes = [_enclosed(sympy.diff(row.generator, u), point) for point in _CORNERS]
        falls = any(bool((right - left).b < 0) for left, right in itertools.pairwise(slopes))
        yield holds(falls != genuine(row), name)


def _check_rise(least: Callable[[Any, Any, Any], Any]) -> Cases:
    r"""For monotone weights, smooth or clipped: $V'(b) - V'(a) \ge (w(b) - w(a))/b$ certified, for all $a < b$."""
    for name, row in rows().items():
        if not row.genuine or row.generator.has(sympy.Abs):
            continue
        slope = sympy.diff(row.generator, divergences.symbol())
        at = [(b, _enclosed(slope, b), _enclosed(row.weight, b)) for b in _CORNERS]
        for (a, slope_a, w_a), (b, slope_b, w_b) in itertools.combinations(at, 2):
            gap = slope_b - slope_a - least(interval(a), interval(b), w_b - w_a)
            flat = bool(abs(w_b - w_a).b < 1e-40)
            yield holds(bool(abs(gap).b < 1e-40) if flat else bool(gap.a > 0), name, f"a {a}", f"b {b}")


# The derivation, with weight and generator undefined functions.


def _inverse() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    w = sympy.Function("w")
    v = u * sympy.Integral(w(t) / t**2, (t, 1, u))
    return sympy.simplify(sympy.expand(u * v.diff(u) - v - w(u))) == 0


def _second_derivative() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    w = sympy.Function("w")
    v = u * sympy.Integral(w(t) / t**2, (t, 1, u))
    return sympy.simplify(sympy.expand(v.diff(u, 2) - w(u).diff(u) / u)) == 0


def _primitive() -> bool:
    r"""$(f(t)/t)' = w_f(t)/t^2$."""
    t = sympy.Symbol("t", positive=True)
    f = sympy.Function("f")
    w = t * f(t).diff(t) - f(t)
    return sympy.simplify(sympy.diff(f(t) / t, t) - w / t**2) == 0


def _constant_is_gauge() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    k = sympy.Symbol("k")
    return sympy.simplify(u * sympy.integrate(k / t**2, (t, 1, u)) - k * (u - 1)) == 0


def _monotone_is_convex() -> bool:
    r"""$V'$ gains the integral of $dw/t$, and a jump of $w$ by $j$ at $c$ gains $j/c$."""
    u, t, c, j = sympy.symbols("u t c j", positive=True)
    w = sympy.Function("w")
    slope = sympy.Integral(w(t) / t**2, (t, 1, u)) + w(u) / u
    smooth = sympy.simplify(sympy.expand(slope.diff(u) - w(u).diff(u) / u)) == 0
    # A step at c: V = 0 below it, and above it u times the integral of j/t^2 from c.
    above = u * sympy.integrate(j / t**2, (t, c, u))
    jump = sympy.simplify(above.diff(u).subs(u, c) - j / c) == 0 and sympy.simplify(above.diff(u, 2)) == 0
    return bool(smooth and jump)


def _loss_weight() -> bool:
    r"""$\partial_\theta \kappa(\log q - \log p) = -\kappa'(\log u)\,\partial_\theta\log p$."""
    t, q, x = sympy.symbols("theta q x", positive=True)
    kappa, p = sympy.Function("kappa"), sympy.Function("p", positive=True)
    log_u = sympy.log(q) - sympy.log(p(t))
    left = sympy.diff(kappa(log_u), t).doit()
    right = -sympy.diff(kappa(x), x).subs(x, log_u).doit() * sympy.diff(sympy.log(p(t)), t)
    return sympy.simplify(left - right) == 0


def _stop_gradient() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    f = sympy.Function("f")
    v = u * sympy.Integral(-f(t) / t**2, (t, 1, u))
    return sympy.simplify(sympy.expand(v.diff(u, 2) + f(u).diff(u) / u)) == 0


def _clips() -> bool:
    """A clip is `min` and `max` with constants, whose differences keep the sign; the table's clipped rows."""
    clipped = [row for name, row in rows().items() if "clipped" in name]
    return len(clipped) == 2 and all(_never_falls(row) and convex(implied(row.weight)) for row in clipped)
