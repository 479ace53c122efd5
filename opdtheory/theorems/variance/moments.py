"""T7d: second moments of the weights in closed form."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv

from opdtheory import divergences
from opdtheory.theorems.instances.cases import Distribution, at_atoms, enclose, interval, rational_distributions
from opdtheory.theorems.instances.one_sample import (
    OfPair,
    chi2,
    expectation,
    intervals,
    vanishes,
    weight_of,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, holds, same

__all__ = ["theorems"]

# Pairs ever further apart: the teacher puts half, or nearly all, of its mass where the student has little.
_FAR_DISTRIBUTIONS = tuple(
    ((1 - rare, rare), (kept, 1 - kept))
    for rare in (Fraction(1, 15), Fraction(1, 10**3), Fraction(1, 10**9))
    for kept in (Fraction(1, 2), Fraction(1, 10**6))
)


def theorems() -> list[Theorem]:
    """T7d."""
    theorem = Theorem(
        number="T7d",
        name="second moments in closed form",
        meaning=(
            r"How noisy a sampled gradient is depends on the mean square of the token's weight. For the forward KL"
            r" this is $1 + \chi^2(q\|p)$, which has no bound: it explodes where the student nearly excludes a token"
            r" that the teacher wants. For the JSD it is at most $\tfrac12\log^2 2$, about 0.24, for every student"
            r" and teacher."
        ),
        statement=(
            r"w = u:\ E_p[w^2] = 1 + \chi^2(q\|p);\quad"
            r" w = u - 1:\ E_p[w^2] = \chi^2(q\|p);\quad"
            r" w = \log u:\ E_p[w^2] = E_p[\log^2 u];\quad"
            r" w = \log u - 1:\ E_p[w^2] = E_p[\log^2 u] + 2\,\mathrm{KL}(p\|q) + 1;\quad"
            r" w_{\mathrm{JSD}} = \tfrac12\log\tfrac{1+u}{2} \ge -\tfrac12\log 2;\quad"
            r" E_p[w_{\mathrm{JSD}}^2] \le \tfrac12\log^2 2"
        ),
        hypotheses=("$p$ is positive where $q$ is",),
        source="derived here",
        advice=(
            r"Where the student nearly excludes a token that the teacher wants, the forward KL's weight explodes with"
            r" $\chi^2$; the JSD's second moment never exceeds 0.25."
        ),
        derivation=(
            Step(
                r"p\,u^2 = p(u-1)^2 + 2q - p",
                r"insert $u = q/p$, then sum over the tokens. Both $p$ and $q$ sum to one, and"
                r" $E_p[(u-1)^2] = \chi^2(q\|p)$, so $E_p[u^2] = \chi^2(q\|p) + 1$. The fourth line of the statement"
                r" is a step of T7a",
                _forward_square,
            ),
            Step(
                r"w_{\mathrm{JSD}} = \tfrac12\log\tfrac{1+u}{2},\ w' = \tfrac{1}{2(1+u)} > 0,\ w(0^+) = -\tfrac12\log"
                r" 2;\quad"
                r" w - \tfrac12\log u + \tfrac12\log 2 = \tfrac12\log(1+\tfrac1u) \to 0",
                r"the weight follows from the catalogue's generator. It increases, so its limit at $u = 0$ bounds it"
                r" from below. For large $u$ it grows like $\tfrac12\log u$",
                _jsd_weight,
            ),
            Step(
                r"\log^2 x \le 2x\,\log^2 2 \text{ for } x \ge \tfrac12;\quad"
                r" E_p[w_{\mathrm{JSD}}^2] \le \tfrac12\log^2 2\,E_p\big[\tfrac{1+u}{2}\big] = \tfrac12\log^2 2",
                r"take $x = (1+u)/2$, which is at least $\tfrac12$ and has mean 1, so that"
                r" $w_{\mathrm{JSD}} = \tfrac12\log x$. The slope of $\log^2 x / x$ is $\log x\,(2 - \log x)/x^2$: it"
                r" falls from $x = \tfrac12$ to 1 and then rises to its other maximum at $e^2$, which is smaller. So"
                r" $\log^2 x / x$ is at most $2\log^2 2$, its value at $\tfrac12$, and the second line follows from"
                r" the first",
                _log_square_below_line,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "forward KL",
                r"E_p[w^2] = 1 + \chi^2(q\|p),\quad w = u",
                _check_forward_moment,
                lambda of_teacher, other: 1 + of_teacher,
                {
                    "1 dropped": lambda of_teacher, other: of_teacher,
                    "inverse ratio": lambda of_teacher, other: 1 + other,
                    "twice chi2": lambda of_teacher, other: 1 + 2 * of_teacher,
                },
                "exact",
            ),
            Identity(
                "JSD weight's floor and growth",
                r"w > -\tfrac12\log 2,\quad |w - \tfrac12\log u + \tfrac12\log 2| < \tfrac{1}{2u}",
                _check_jsd_bounds,
                (lambda u, log_2: -log_2 / 2, lambda u, log_2: iv.log(u) / 2 - log_2 / 2),
                {
                    "a higher floor": (lambda u, log_2: -log_2 / 4, lambda u, log_2: iv.log(u) / 2 - log_2 / 2),
                    "grows like log u": (lambda u, log_2: -log_2 / 2, lambda u, log_2: iv.log(u) - log_2 / 2),
                    "without -log 2 / 2": (lambda u, log_2: -log_2 / 2, lambda u, log_2: iv.log(u) / 2),
                },
                "rigorous",
            ),
            Identity(
                "JSD moment is bounded",
                r"E_p[w^2] \le \tfrac12 \log^2 2 \ \text{for every pair}",
                _check_jsd_moment,
                lambda log_2: log_2**2 / 2,
                {"the floor's square bounds it": lambda log_2: log_2**2 / 4},
                "rigorous",
            ),
            Identity(
                "which moments explode",
                r"p_a \to 0 < q_a:\ E_p[w^2] \to \infty \text{ for the forward KL and } \chi^2, \text{ not for the "
                r"reverse KL and the JSD}",
                _check_unbounded,
                {"forward_kl": True, "chi2": True, "reverse_kl": False, "jsd": False},
                {
                    "the forward KL does not": {"forward_kl": False},
                    "the reverse KL does": {"reverse_kl": True},
                    "the JSD does": {"jsd": True},
                },
                "rigorous",
            ),
        ),
    )
    return [theorem]


def _check_forward_moment(value: OfPair) -> Cases:
    r"""$E_p[w^2]$ of the forward KL against the catalogue's $\chi^2$, in fractions."""
    u, f = divergences.symbol(), divergences.divergence("chi2").expr
    for p, q in rational_distributions():
        moment = expectation(p, [w * w for w in weights("forward_kl", p, q)])
        divergence, inverse = (expectation(p, at_atoms(each, p, q)) for each in (f, f.subs(u, 1 / u)))
        yield same(divergence, chi2(p, q), p, q, "chi2")
        yield same(moment, value(divergence, inverse), p, q, "moment")


def _check_jsd_bounds(claimed: tuple[OfPair, OfPair]) -> Cases:
    r"""A lower bound and an asymptote of the JSD's weight, certified on $\log_{10} u \in [-12, 12]$."""
    lowest, asymptote = claimed
    w, log_2 = weight_of("jsd"), iv.log(interval(2))
    for power in range(-12, 13):
        ratio = interval(Fraction(10) ** power)
        value = enclose(w, {divergences.symbol(): ratio})
        yield holds(bool(value > lowest(ratio, log_2)), f"u 1e{power}", "floor")
        gap = value - asymptote(ratio, log_2)
        yield holds(bool(abs(gap) < 1 / (2 * ratio)), f"u 1e{power}", "growth")


def _moment(name: str, student: Distribution, teacher: Distribution) -> Any:
    r"""An interval around $E_p[w^2]$."""
    return expectation(intervals(student), [w * w for w in weights_enclosed(name, student, teacher)])


def _check_jsd_moment(bound: Callable[[Any], Any]) -> Cases:
    r"""$E_p[w^2]$ of the JSD, certified to lie below a constant however far the teacher is."""
    for student, teacher in (*rational_distributions(), *_FAR_DISTRIBUTIONS):
        yield holds(bool(_moment("jsd", student, teacher) < bound(iv.log(interval(2)))), student, teacher)


def _check_unbounded(grows: dict[str, bool]) -> Cases:
    r"""Whether $E_p[w^2]$ passes $10^3$ when the student all but excludes a token that the teacher wants."""
    for name, expected in grows.items():
        moment = _moment(name, *_FAR_DISTRIBUTIONS[4])
        yield holds(bool(moment > 1000) == expected and bool(moment < 1000) != expected, name)


# The derivation.


def _forward_square() -> bool:
    p, q = sympy.symbols("p q", positive=True)
    return sympy.simplify(p * (q / p) ** 2 - (p * (q / p - 1) ** 2 + 2 * q - p)) == 0


def _jsd_weight() -> bool:
    u, w = divergences.symbol(), weight_of("jsd")
    slope = sympy.simplify(sympy.diff(w, u) - 1 / (2 * (1 + u)))
    floor = sympy.limit(w, u, 0) + sympy.log(2) / 2
    rest = sympy.log(1 + 1 / u) / 2
    grows = vanishes(w - sympy.log(u) / 2 + sympy.log(2) / 2 - rest) and sympy.limit(rest, u, sympy.oo) == 0
    return vanishes(w - sympy.log((1 + u) / 2) / 2) and slope == 0 and sympy.simplify(floor) == 0 and grows


def _log_square_below_line() -> bool:
    r"""$\log^2 x / x$ falls on $[1/2, 1]$ from $2\log^2 2$; beyond 1 its maximum is $4/e^2 < 2\log^2 2$, at $e^2$."""
    x = sympy.Symbol("x", positive=True)
    h = sympy.log(x) ** 2 / x
    slope = sympy.simplify(sympy.diff(h, x) - sympy.log(x) * (2 - sympy.log(x)) / x**2)
    half, top = h.subs(x, sympy.Rational(1, 2)), h.subs(x, sympy.exp(2))
    return slope == 0 and sympy.simplify(half - 2 * sympy.log(2) ** 2) == 0 and bool(top < half)
