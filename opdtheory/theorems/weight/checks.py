"""The checks of T4: weights and generators in symbols, fractions, intervals and by quadrature."""

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
from opdtheory.theorems.theorem import Cases, Identity, close, holds, same
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

__all__ = ["identities", "never_falls"]

# Catalogue generators whose implied generators sympy finds quickly.
_CLOSED = ("reverse_kl", "forward_kl", "jsd", "chi2", "neyman_chi2", "hellinger", "le_cam", "jeffreys")


def identities() -> tuple[Identity, ...]:
    """The claims of T4 that are checked."""
    u = divergences.symbol()
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
            never_falls,
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
            r"V[w_f - w_f(1)] = f - f'(1)(u - 1)",
            _check_quadrature,
            lambda d, log_u: d.weight(log_u),
            {
                "-f for the weight": lambda d, log_u: -d.generator(log_u),
                "u f' for the weight": lambda d, log_u: d.log_slope(log_u),
            },
        ),
    )


def _check_inverse(back: Callable[[sympy.Expr, sympy.Symbol], sympy.Expr]) -> Cases:
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


def never_falls(row: Row) -> bool:
    """Whether the weight does not fall between any two points of a grid."""
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
    """Whether a generator does not rise between any two points of a wide grid."""
    u = divergences.symbol()
    value = sympy.lambdify(u, f, "mpmath")
    points = [2.0**k for k in range(-40, 41)]
    return all(right <= left + 1e-12 for left, right in itertools.pairwise(map(value, points)))


def _falls_at_one(f: sympy.Expr) -> bool:
    """Whether a generator falls at one."""
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
