"""T7: the variance of sampled estimators; here T7a, constant baselines, and T7d, second moments in closed form.

T7b and T7c stand in `rao_blackwell`, T7e and T7f in `groups`, T7g and T7h in `variance_bounds`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import estimator
from opdtheory.exact import gradient_moments
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Pair,
    enclose,
    interval,
    pairs,
    rational_distributions,
    values_of,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    chi2,
    expectation,
    first_rows,
    intervals,
    kl,
    mean_gradient,
    optimal_baseline,
    ratios,
    second_moment,
    three_atoms,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

Values = Callable[[Sequence[Any], Sequence[Any]], Any]

# Pairs ever further apart: the teacher puts half, or nearly all, of its mass where the student has little.
_FAR_DISTRIBUTIONS = tuple(
    ((1 - rare, rare), (kept, 1 - kept))
    for rare in (Fraction(1, 15), Fraction(1, 10**3), Fraction(1, 10**9))
    for kept in (Fraction(1, 2), Fraction(1, 10**6))
)


def theorems() -> list[Theorem]:
    """T7a and T7d."""
    return [_constants(), _second_moments()]


def _constants() -> Theorem:
    half = Fraction(1, 2)
    return Theorem(
        number="T7a",
        name="constant baselines",
        statement=r"E_p[(w-b)s] = E_p[w s]; \quad \mathrm{Var}(b) = \mathrm{Var}(b^*) + (b-b^*)^2 E_p|s|^2, \quad "
        r"b^* = \frac{E_p[w|s|^2]}{E_p|s|^2}; \quad w_f - w_f(1) = w_{f - f'(1)(u-1)}",
        hypotheses=("one sampled token, g = -(w(u) - b) s", "b does not depend on the sample", "f(1) = 0"),
        source="OPD+, arXiv 2606.01039; the optimal constant is Greensmith, Bartlett & Baxter (2004); derived here",
        advice="Use `opd_plus_centred`: no constant changes the mean, and this one drops the -1 of the reverse KL and "
        "the 1 of the forward KL, which are noise near the teacher.",
        derivation=(
            Step(
                r"E_p[b\,s] = b\,\partial_\theta \textstyle\sum_a p_a = 0",
                "three atoms undefined in θ, summing to one",
                _score_has_no_mean,
            ),
            Step(
                r"E_p[(w-b)^2|s|^2] = E_p[(w-b^*)^2|s|^2] + (b-b^*)^2 E_p|s|^2",
                "complete the square; any scores of mean zero",
                _parabola,
            ),
            Step(
                r"E_p[(\log u - 1)^2] = E_p[\log^2 u] + 2\,KL(p\|q) + 1",
                "E_p[-log u] = KL(p||q)",
                _adds_two_kl_plus_one,
            ),
            Step(
                r"w_f(1) = f'(1),\quad w_{f - c(u-1)} = w_f - c",
                "f(1) = 0; the gauge of T3 with c = f'(1)",
                _centring_is_a_gauge,
            ),
        ),
        identities=(
            Identity(
                "any constant keeps the mean",
                r"E_p[(w - b) s] = E_p[w s]",
                _check_any_constant,
                lambda p, w: [Fraction(7, 3)] * len(p),
                {
                    "a baseline that depends on the token": lambda p, w: list(p),
                    "half of the weight itself": lambda p, w: [half * x for x in w],
                },
                "exact",
            ),
            Identity(
                "the optimal constant",
                r"b^* = E_p[w|s|^2] / E_p[|s|^2]",
                _check_optimal,
                optimal_baseline,
                {
                    "the mean of the weight": lambda p, w: expectation(p, w),
                    "zero": lambda p, w: Fraction(0),
                    "not divided by the score's square": lambda p, w: (
                        optimal_baseline(p, w) * (1 - sum(a * a for a in p))
                    ),
                },
                "exact",
            ),
            Identity(
                "what another constant costs",
                r"\mathrm{Var}(b) - \mathrm{Var}(b^*) = (b - b^*)^2 E_p|s|^2",
                _check_excess,
                lambda shift, p, norms: shift**2 * (p * norms).sum(),
                {
                    "score's square dropped": lambda shift, p, norms: torch.as_tensor(shift**2, dtype=p.dtype),
                    "no cost": lambda shift, p, norms: 0 * p.sum(),
                },
            ),
            Identity(
                "the -1 of the reverse KL",
                r"E_p[(\log u - 1)^2] - E_p[\log^2 u] = 2\,KL(p\|q) + 1",
                _check_minus_one,
                lambda reverse, forward: 2 * reverse + 1,
                {
                    "sign of the KL flipped": lambda reverse, forward: 1 - 2 * reverse,
                    "+1 dropped": lambda reverse, forward: 2 * reverse,
                    "forward KL": lambda reverse, forward: 2 * forward + 1,
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "centred weights",
                r"w_f(u) - w_f(1):\ \log u,\ u - 1,\ \tfrac12\log\tfrac{1+u}{2}",
                _check_centred,
                {
                    "reverse_kl": sympy.log,
                    "forward_kl": lambda u: u - 1,
                    "jsd": lambda u: sympy.log((1 + u) / 2) / 2,
                },
                {
                    "reverse KL with its -1": {"reverse_kl": lambda u: sympy.log(u) - 1},
                    "forward KL not centred": {"forward_kl": lambda u: u},
                    "JSD moved": {"jsd": lambda u: sympy.log((1 + u) / 2) / 2 + sympy.log(2) / 2},
                },
                "symbolic",
            ),
            Identity(
                "forward KL has a known mean",
                r"E_p[u - 1] = 0",
                _check_known_mean,
                Fraction(0),
                {"mean one": Fraction(1), "mean minus one": Fraction(-1)},
                "exact",
            ),
        ),
    )


def _second_moments() -> Theorem:
    return Theorem(
        number="T7d",
        name="second moments in closed form",
        statement=r"w = u:\ E_p[w^2] = 1 + \chi^2(q\|p); \quad w = u - 1:\ \chi^2(q\|p); "
        r"\quad w = \log u:\ E_p[\log^2 u]; \quad w = \log u - 1:\ E_p[\log^2 u] + 2KL(p\|q) + 1; \quad "
        r"w_{\mathrm{JSD}} = \tfrac12\log\tfrac{1+u}{2} \ge -\tfrac12\log 2,\ "
        r"E_p[w_{\mathrm{JSD}}^2] \le \tfrac12\log^2 2",
        hypotheses=("p positive where q is",),
        source="derived here",
        advice="Where the student nearly excludes a token that the teacher wants, the forward KL's weight explodes "
        "with chi2; the JSD's second moment never exceeds 0.25.",
        derivation=(
            Step(
                r"p\,u^2 = p(u-1)^2 + 2q - p",
                "summed over atoms: E_p[u^2] = chi2(q||p) + 1, and E_p[(u-1)^2] = chi2",
                _forward_square,
            ),
            Step(
                r"w_{\mathrm{JSD}} = \tfrac12\log\tfrac{1+u}{2},\ w' = \tfrac{1}{2(1+u)} > 0,\ "
                r"w(0^+) = -\tfrac12\log 2,\ w - \tfrac12\log u + \tfrac12\log 2 = \tfrac12\log(1+\tfrac1u) \to 0",
                "from the catalogue's generator; increasing, so its limit at 0 bounds it from below",
                _jsd_weight,
            ),
            Step(
                r"\log^2 x \le 2\log^2 2\; x\ \ (x \ge \tfrac12) \;\Rightarrow\; "
                r"E_p[w_{\mathrm{JSD}}^2] \le \tfrac12\log^2 2\; E_p\big[\tfrac{1+u}{2}\big] = \tfrac12\log^2 2",
                "with x = (1+u)/2, whose mean is 1; log²x/x has the slope log x (2 - log x)/x²: it falls from x = 1/2 "
                "to 1 and rises to its other maximum at e², which is smaller",
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
                (lambda u, log_2: -log_2 / 2, lambda u, log_2: _log(u) / 2 - log_2 / 2),
                {
                    "a higher floor": (lambda u, log_2: -log_2 / 4, lambda u, log_2: _log(u) / 2 - log_2 / 2),
                    "grows like log u": (lambda u, log_2: -log_2 / 2, lambda u, log_2: _log(u) - log_2 / 2),
                    "without -log 2 / 2": (lambda u, log_2: -log_2 / 2, lambda u, log_2: _log(u) / 2),
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


# T7a: constants.


def _check_any_constant(baseline: Values) -> Cases:
    r"""$E_p[(w - b) s] = E_p[w s]$ in fractions; a baseline gives one value per token."""
    for name in RATIONAL:
        for p, q in rational_distributions():
            w = weights(name, p, q)
            shifted = [x - b for x, b in zip(w, baseline(p, w), strict=True)]
            yield same(mean_gradient(p, shifted), mean_gradient(p, w), name, p, q)


def _check_optimal(best: Values) -> Cases:
    r"""The vertex of the parabola $b \mapsto E_p[(w-b)^2|s|^2]$, from its values at $-1, 0, 1$."""
    for name in RATIONAL:
        for p, q in rational_distributions():
            w = weights(name, p, q)
            low, middle, high = (second_moment(p, [x - b for x in w]) for b in (-1, 0, 1))
            yield same((low - high) / (2 * (low + high - 2 * middle)), best(p, w), name, p, q)


def _check_excess(excess: Callable[[float, Tensor, Tensor], Tensor]) -> Cases:
    r"""$\mathrm{Var}(b) - \mathrm{Var}(b^*)$ of the library's estimator as a black box."""
    for pair in _rows():
        log_p, log_q = (policy.logits[0][0].log_softmax(-1) for policy in pair)
        p = log_p.exp()
        for name in SMOOTH:
            w = divergences.divergence(name).weight(log_q - log_p)
            best = float(optimal_baseline(list(p), list(w)))
            least = _variance(name, pair, best)
            for b in (-1.0, 0.5):
                gap = torch.tensor(_variance(name, pair, b) - least, dtype=torch.float64)
                yield close(gap, excess(b - best, p, 1 - 2 * p + p.square().sum()), pair, name, b)


@functools.cache
def _rows() -> tuple[Pair, ...]:
    return tuple(first_rows(pair) for pair in pairs()[:3])


@functools.cache
def _variance(name: str, pair: Pair, b: float) -> float:
    return gradient_moments(estimator("opd_plus", name, baseline="constant", baseline_value=b), *pair).variance


def _check_minus_one(added: Values) -> Cases:
    r"""$E_p[(\log u - 1)^2] - E_p[\log^2 u]$, both sides enclosed."""
    for student, teacher in rational_distributions():
        w = weights_enclosed("reverse_kl", student, teacher)
        p, q = intervals(student), intervals(teacher)
        moved = expectation(p, [x * x for x in w]) - expectation(p, [(x + 1) ** 2 for x in w])
        yield overlap(moved, added(kl(p, q), kl(q, p)), student, teacher)


def _check_centred(claimed: dict[str, Callable[[Any], Any]]) -> Cases:
    r"""$w_f(u) - w_f(1)$, and the weight of $f - f'(1)(u-1)$, from the catalogue's generators."""
    u = divergences.symbol()
    for name, form in claimed.items():
        f = divergences.divergence(name).expr
        gauged = f - sympy.diff(f, u).subs(u, 1) * (u - 1)
        w, own = (u * sympy.diff(g, u) - g for g in (f, gauged))
        yield holds(_vanishes(w - w.subs(u, 1) - form(u)) and _vanishes(w - w.subs(u, 1) - own), name, form)


def _vanishes(expr: Any) -> bool:
    return sympy.simplify(sympy.expand_log(sympy.expand(sympy.together(expr)), force=True)) == 0


def _check_known_mean(offset: Fraction) -> Cases:
    """The forward KL's centred weight has the same mean for every teacher."""
    for p, q in rational_distributions():
        yield same(expectation(p, weights("forward_kl", p, q)) - 1, offset, p, q)


# T7d: second moments.


def _check_forward_moment(value: Values) -> Cases:
    r"""$E_p[w^2]$ of the forward KL against the catalogue's $\chi^2$, in fractions."""
    u, f = divergences.symbol(), divergences.divergence("chi2").expr
    for p, q in rational_distributions():
        moment = expectation(p, [w * w for w in weights("forward_kl", p, q)])
        divergence = expectation(p, [values_of(f, {u: ratio}) for ratio in ratios(p, q)])
        yield same(divergence, chi2(p, q), p, q)
        yield same(moment, value(divergence, expectation(p, [values_of(f, {u: 1 / x}) for x in ratios(p, q)])), p, q)


def _check_jsd_bounds(claimed: tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]) -> Cases:
    r"""A lower bound and an asymptote of the JSD's weight, certified on $\log_{10} u \in [-12, 12]$."""
    lowest, asymptote = claimed
    u, f = divergences.symbol(), divergences.divergence("jsd").expr
    w = u * sympy.diff(f, u) - f
    log_2 = iv.log(interval(2))
    for power in range(-12, 13):
        ratio = interval(Fraction(10) ** power)
        value = enclose(w, {u: ratio})
        yield holds(bool(value > lowest(ratio, log_2)), power)
        gap = value - asymptote(ratio, log_2)
        yield holds(bool(abs(gap) < 1 / (2 * ratio)), power)


def _check_jsd_moment(bound: Callable[[Any], Any]) -> Cases:
    r"""$E_p[w^2]$ of the JSD, certified to lie below a constant however far the teacher is."""
    for student, teacher in (*rational_distributions(), *_FAR_DISTRIBUTIONS):
        p = intervals(student)
        moment = expectation(p, [w * w for w in weights_enclosed("jsd", student, teacher)])
        yield holds(bool(moment < bound(iv.log(interval(2)))), student, teacher)


def _check_unbounded(grows: dict[str, bool]) -> Cases:
    r"""Whether $E_p[w^2]$ passes $10^3$ when the student all but excludes a token that the teacher wants."""
    for name, expected in grows.items():
        student, teacher = _FAR_DISTRIBUTIONS[4]
        moment = expectation(intervals(student), [w * w for w in weights_enclosed(name, student, teacher)])
        yield holds(bool(moment > 1000) == expected and bool(moment < 1000) != expected, name, expected)


# The derivation.


def _score_has_no_mean() -> bool:
    """Three atoms whose probabilities are undefined functions of a parameter and sum to one."""
    t, b = sympy.symbols("theta b", real=True)
    first = [sympy.Function(f"p{i}", positive=True)(t) for i in range(2)]
    p = [*first, 1 - first[0] - first[1]]
    return sum(p) == 1 and sympy.simplify(sum(a * b * sympy.diff(sympy.log(a), t) for a in p)) == 0


def _parabola() -> bool:
    """Any family, $|s_a|^2$ being any three positive numbers: the square's dependence on the baseline."""
    p, w, _ = three_atoms()
    b, norms = sympy.Symbol("b", real=True), sympy.symbols("n0:3", positive=True)
    moment = sum(a * (x - b) ** 2 * n for a, x, n in zip(p, w, norms, strict=True))
    size = sum(a * n for a, n in zip(p, norms, strict=True))
    best = sum(a * x * n for a, x, n in zip(p, w, norms, strict=True)) / size
    gap = moment - moment.subs(b, best) - (b - best) ** 2 * size
    return sympy.simplify(gap) == 0


def _adds_two_kl_plus_one() -> bool:
    log_u = sympy.symbols("x0:3", real=True)
    p0, p1 = sympy.symbols("p0 p1", positive=True)
    p = [p0, p1, 1 - p0 - p1]
    kl_pq = -sum(a * x for a, x in zip(p, log_u, strict=True))
    added = sum(a * ((x - 1) ** 2 - x**2) for a, x in zip(p, log_u, strict=True))
    return sympy.expand(added - 2 * kl_pq - 1) == 0


def _centring_is_a_gauge() -> bool:
    r"""$w_f(1) = f'(1)$ as $f(1) = 0$, and $f - f'(1)(u-1)$ has the weight $w_f - f'(1)$."""
    u, c = sympy.symbols("u c", positive=True)
    f = sympy.Function("f")
    gauged = f(u) - c * (u - 1)
    moved = (u * sympy.diff(gauged, u) - gauged) - (u * sympy.diff(f(u), u) - f(u))
    at_one = (u * sympy.diff(f(u), u) - f(u)).subs(u, 1).doit() - sympy.diff(f(u), u).subs(u, 1)
    return gauged.subs(u, 1) == f(1) and sympy.simplify(moved + c) == 0 and sympy.simplify(at_one.subs(f(1), 0)) == 0


def _forward_square() -> bool:
    p, q = sympy.symbols("p q", positive=True)
    return sympy.simplify(p * (q / p) ** 2 - (p * (q / p - 1) ** 2 + 2 * q - p)) == 0


def _jsd_weight() -> bool:
    u = divergences.symbol()
    f = divergences.divergence("jsd").expr
    w = u * sympy.diff(f, u) - f
    slope = sympy.simplify(sympy.diff(w, u) - 1 / (2 * (1 + u)))
    floor = sympy.limit(w, u, 0) + sympy.log(2) / 2
    rest = sympy.log(1 + 1 / u) / 2
    grows = _vanishes(w - sympy.log(u) / 2 + sympy.log(2) / 2 - rest) and sympy.limit(rest, u, sympy.oo) == 0
    return _vanishes(w - sympy.log((1 + u) / 2) / 2) and slope == 0 and sympy.simplify(floor) == 0 and grows


def _log_square_below_line() -> bool:
    r"""$\log^2 x / x$ falls on $[1/2, 1]$ from $2\log^2 2$; beyond 1 its maximum is $4/e^2 < 2\log^2 2$, at $e^2$."""
    x = sympy.Symbol("x", positive=True)
    h = sympy.log(x) ** 2 / x
    slope = sympy.simplify(sympy.diff(h, x) - sympy.log(x) * (2 - sympy.log(x)) / x**2)
    half, top = h.subs(x, sympy.Rational(1, 2)), h.subs(x, sympy.exp(2))
    return slope == 0 and sympy.simplify(half - 2 * sympy.log(2) ** 2) == 0 and bool(top < half)


def _log(u: Any) -> Any:
    return iv.log(u)
