"""T5b: when a change of gauge makes stop-gradient descend a genuine divergence, and which one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.theorems.instances.cases import RATIONAL, catalogue, enclose, interval, rational_distributions, values_of
from opdtheory.theorems.instances.flows import TEACHER, distance, far_students, flow
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

# The largest c that cures a generator, infinite (no c does) as sympy's -oo.
Threshold = Callable[["sympy.Expr", "sympy.Symbol"], "sympy.Expr"]
# The factor k with V[-f - c(u-1)] = k D_f at the largest curing c, or None where there is none.
Factor = Callable[[Divergence], "Fraction | None"]


def theorems() -> list[Theorem]:
    """T5b."""
    return [
        Theorem(
            number="T5b",
            name="gauges that cure stop-gradient",
            statement=(
                r"-(f + c(u-1)) \text{ is non-decreasing on } (0, \infty) \text{ iff } c \le -f'(\infty),"
                r"\ \text{on } \log u \le C \text{ iff } c \le -f'(e^C).\ \text{It descends } V[-f - c(u-1)],"
                r"\ \text{which is } k D_f,\ k > 0,\ \text{iff } f \text{ is the } \alpha\text{-generator with }"
                r"\alpha = 1 - 1/k \text{ up to scale and gauge, and } c = -f'(\infty)"
            ),
            hypotheses=("f convex and differentiable where it has no kink", "C of either sign; only u <= e^C is met"),
            source="derived here",
            advice=(
                "Prefer OPD+; where only the reward may change, add f'(∞)(u - 1) to it, under a clip f'(e^C)(u - 1), "
                "and know that another divergence is descended."
            ),
            derivation=(
                Step(
                    r"V[-f - c(u-1)]'' = -\frac{f' + c}{u}",
                    "T4: V[w]'' = w'/u; f undefined",
                    _slope_of_weight,
                ),
                Step(
                    r"f' + c \le 0 \text{ on } (0, \infty) \iff c \le -\sup f' = -f'(\infty)",
                    "f' is non-decreasing, so its supremum is its limit; on log u <= C it is the value at e^C. The "
                    "machine looks at the catalogue on a grid",
                    _supremum,
                    in_words=True,
                ),
                Step(
                    r"f'(\infty):\ \mathrm{JSD}\ \tfrac12\log 2,\ \mathrm{Hellinger}^2\ 1,\ \mathrm{Le\ Cam}\ 1,\ "
                    r"\tfrac12|u-1|\ \tfrac12,\ u\log u\ \infty,\ \chi^2\ \infty",
                    "limits by sympy",
                    _named_limits,
                ),
                Step(
                    r"f'(e^C):\ u\log u\ \ C + 1,\qquad \chi^2\ \ 2(e^C - 1)",
                    "substitution",
                    _clipped_limits,
                ),
                Step(
                    r"-(f' + c) = k\,u f'' \iff f' = -c + A u^{-1/k}",
                    "variation of the constant A: the alpha family with alpha = 1 - 1/k < 1, in the gauge in which f' "
                    "vanishes at infinity",
                    _proportional,
                ),
                Step(
                    r"k:\ \mathrm{Hellinger}^2\ 2,\ \text{Neyman } \tfrac12,\ \text{reverse KL } 1;"
                    r"\ \text{JSD, Le Cam: none}",
                    "the quotient of the two sides, by sympy",
                    _named_factors,
                ),
            ),
            identities=(
                Identity(
                    "in fractions",
                    r"-(f + c(u-1)) \text{ non-decreasing} \iff c \le -f'(\infty)",
                    _check_rational,
                    _threshold,
                    _FALSE_THRESHOLDS,
                    "exact",
                ),
                Identity(
                    "enclosed",
                    r"-f'(u) - c \ge 0 \text{ for all } u \iff c \le -f'(\infty)",
                    _check_enclosed,
                    _threshold,
                    _FALSE_THRESHOLDS,
                    "rigorous",
                ),
                Identity(
                    "forward KL under a clip",
                    r"\log u \le C:\ c \le -(C + 1)",
                    _check_forward_kl,
                    lambda clip: -(clip + 1),
                    {"-C": lambda clip: -clip, "C + 1": lambda clip: clip + 1, "-(C + 2)": lambda clip: -(clip + 2)},
                    "rigorous",
                ),
                Identity(
                    "multiple in fractions",
                    r"\nabla D_{V[-f-c(u-1)]} = k \nabla D_f:\ \text{Neyman } k = \tfrac12;\ \text{not Le Cam, not TV}",
                    _check_factor_rational,
                    _factor,
                    _FALSE_FACTORS,
                    "exact",
                ),
                Identity(
                    "multiple enclosed",
                    r"-(f' + c) = k\,u f'',\ k = 1/(1-\alpha), \text{ for the } \alpha\text{-family and no other}",
                    _check_factor_enclosed,
                    _factor,
                    _FALSE_FACTORS,
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "limits of the catalogue",
                    r"f'(\infty) = \lim_{u\to\infty} f'(u)",
                    _check_catalogue,
                    1.0,
                    {"sign flipped": -1.0},
                ),
                Identity(
                    "under a clip",
                    r"\log u \le C:\ c \le -f'(e^C)",
                    _check_clipped,
                    _clipped_threshold,
                    {
                        "-f'(∞)": lambda d, clip: -min(d.slope_at_infinity, 1e6),
                        "-f'(1)": lambda d, clip: _clipped_threshold(d, 0.0),
                        "e^C f'(e^C)": lambda d, clip: _clipped_threshold(d, clip) * math.exp(clip),
                    },
                ),
                Identity(
                    "simulated",
                    r"\text{some far students leave in the usual gauge; all approach in the curing one}",
                    _check_cured,
                    _GAUGES,
                    {
                        "sign flipped": {label: -c for label, c in _GAUGES.items()},
                        "no clip needed": {"forward KL": -7.0, "chi2": -2.0 * math.expm1(2.0), "JSD": 0.0},
                    },
                ),
            ),
        )
    ]


@functools.cache
def _slope_at_infinity(f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    """The limit of `f'`, by sympy."""
    # The logarithm of a quotient is the form in which sympy finds these limits.
    return sympy.limit(sympy.logcombine(sympy.simplify(sympy.diff(_right_of_kinks(f), u)), force=True), u, sympy.oo)


def _right_of_kinks(f: sympy.Expr) -> sympy.Expr:
    """The branch for `u > 1`."""
    return f.replace(sympy.Abs, lambda x: x)


def _threshold(f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    return -_slope_at_infinity(f, u)


_FALSE_THRESHOLDS: dict[str, Threshold] = {
    "sign of f'(∞) flipped": lambda f, u: -_threshold(f, u),
    "f'(1) in place of f'(∞)": lambda f, u: _right_of_kinks(f).diff(u).subs(u, 1) * -1,
    "half of it": lambda f, u: _threshold(f, u) / 2,
    "no more than one below it": lambda f, u: _threshold(f, u) - 1,
    "a cure for all": lambda f, u: _threshold(f, u) if _threshold(f, u).is_finite else f.subs(u, 1) * 0 - 10,
}

_LIMIT = Fraction(10) ** 12


def _check_rational(threshold: Threshold) -> Cases:
    """The weight on rational ratios up to 1e12, at, below and above the largest curing `c`."""
    u = divergences.symbol()
    ratios = [1 / _LIMIT, Fraction(1, 9), Fraction(1, 2), Fraction(1), Fraction(3, 2), Fraction(100), _LIMIT]
    ratios.append(2 * _LIMIT)
    for name in RATIONAL:
        f = divergences.divergence(name).expr
        largest = threshold(f, u)
        if largest.is_finite:
            candidates = [(largest - k, True) for k in (0, sympy.Rational(1, 50), 3)]
            candidates += [(largest + k, False) for k in (sympy.Rational(1, 50), 3)]
        else:
            candidates = [(-sympy.Integer(k), False) for k in (0, 1, 7, 1000)]
        for c, cured in candidates:
            values = [values_of(-f - c * u, {u: r}) for r in ratios]  # a constant changes no order
            yield holds(all(b >= a for a, b in zip(values[:-1], values[1:], strict=True)) == cured, name, c, cured)


def _check_enclosed(threshold: Threshold) -> Cases:
    r"""The sign of $-f'(u) - c$ certified on a grid, for every other entry."""
    u = divergences.symbol()
    ratios = [interval(r) for r in (1 / _LIMIT, Fraction(1, 9), 1, 2, 100, _LIMIT)]
    for divergence in (d for d in catalogue() if d.name not in RATIONAL):
        f = divergence.expr
        largest, slope = threshold(f, u), sympy.diff(f, u)
        finite = bool(largest.is_finite)
        steps = (0, Fraction(1, 20), Fraction(-1, 20)) if finite else (1, 7, 20)
        bound = enclose(largest, {}) if finite else interval(0)
        for step in steps:
            slopes = [-enclose(slope, {u: r}) - bound + interval(step) for r in ratios]
            cured = finite and step >= 0
            certified = all(s.a > 0 for s in slopes) if cured else any(s.b < 0 for s in slopes)
            yield holds(certified, divergence, step)


def _check_catalogue(sign: float) -> Cases:
    r"""The limits by sympy against the catalogue's `slope_at_infinity`."""
    u = divergences.symbol()
    for divergence in catalogue():
        claimed = sign * divergence.slope_at_infinity
        found = _slope_at_infinity(divergence.expr, u)
        if math.isinf(claimed):
            yield holds(found.is_infinite is True and claimed > 0, divergence)
        else:
            yield holds(bool(found.is_finite), divergence)
            yield close(torch.tensor(float(found)), torch.tensor(claimed), divergence)


ClippedThreshold = Callable[[Divergence, float], float]


def _clipped_threshold(divergence: Divergence, clip: float) -> float:
    r"""$-f'(e^C)$."""
    at = torch.tensor([clip], dtype=torch.float64)
    return -float(divergence.log_slope(at) * (-at).exp())


def _check_clipped(threshold: ClippedThreshold) -> Cases:
    r"""The slope of the weight on $\log u \le C$ under the largest curing `c`: zero at the clip, positive below."""
    for divergence in (d for d in catalogue() if d.name != "total_variation"):
        for clip in (0.5, 2.0, 6.0):
            grid = torch.linspace(-8.0, clip, 200, dtype=torch.float64)
            slope = divergence.log_slope(grid) * (-grid).exp()
            largest = threshold(divergence, clip)
            rise, size = -slope - largest, max(1.0, abs(largest))
            # All of these are strictly convex, so the slope at the clip is met there alone.
            yield holds(abs(float(rise[-1])) <= 1e-12 * size and bool((rise[:-1] > 0).all()), divergence, clip)


def _check_forward_kl(least: Callable[[Fraction], Fraction]) -> Cases:
    r"""$-(u\log u) - c(u-1)$ on $\log u \le C$, certified at $u = e^C$, where its slope is least."""
    for clip in (Fraction(1, 3), Fraction(2), Fraction(6)):
        for step in (Fraction(-1, 100), Fraction(1, 100)):
            c = least(clip) + step
            tops = [clip * k / 4 for k in (-8, 0, 1, 2, 3, 4)]
            slopes = [-(iv.log(iv.exp(interval(t))) + 1) - interval(c) for t in tops]
            yield holds(all(s.a > 0 for s in slopes) if step < 0 else any(s.b < 0 for s in slopes), clip, step)


# What is descended.


def _factor(divergence: Divergence) -> Fraction | None:
    r"""$1/(1-\alpha)$ for the members of the alpha family with $\alpha < 1$, under any name."""
    orders = {"reverse_kl": Fraction(0), "hellinger": Fraction(1, 2), "neyman_chi2": Fraction(-1)}
    if divergence.name in orders:
        return 1 / (1 - orders[divergence.name])
    if divergence.name == "alpha":
        order = Fraction(str(divergence.parameters["alpha"]))
        return 1 / (1 - order) if order < 1 else None
    plain = divergence.name == "skew_reverse_kl" and divergence.parameters["lam"] == 0.0
    return Fraction(1) if plain else None


_FALSE_FACTORS: dict[str, Factor] = {
    "D_f itself": lambda d: None if _factor(d) is None else Fraction(1),
    "never proportional": lambda d: None,
    "1 - α in place of 1/(1 - α)": lambda d: None if (k := _factor(d)) is None else 1 / k,
}


def _curable() -> list[Divergence]:
    return [d for d in catalogue() if math.isfinite(d.slope_at_infinity)]


def _check_factor_rational(factor: Factor) -> Cases:
    """Cured gradients in fractions against the divergence's own: a multiple, or not even parallel."""
    u = divergences.symbol()
    for divergence in (d for d in _curable() if d.name in RATIONAL):
        f, k = divergence.expr, factor(divergence)
        cured = -f - _threshold(f, u) * u  # up to a constant, which is no force
        parallel = []
        for student, teacher in rational_distributions():
            ratios = [b / a for a, b in zip(student, teacher, strict=True)]
            if divergence.name == "total_variation" and Fraction(1) in ratios:
                continue
            slopes = [sympy.diff(f if r < 1 else _right_of_kinks(f), u) for r in ratios]
            if divergence.name == "total_variation":
                slopes = [sympy.Rational(-1 if r < 1 else 1, 2) for r in ratios]
            own = [r * values_of(s, {u: r}) - values_of(f, {u: r}) for r, s in zip(ratios, slopes, strict=True)]
            mine, theirs = (
                _centred(student, [values_of(cured, {u: r}) for r in ratios]),
                _centred(student, own),
            )
            if k is not None:
                yield same(mine, [k * v for v in theirs], divergence, student, teacher)
            elif len(student) > 2:  # with two tokens all gradients are parallel
                parallel.append(all(a * theirs[0] == b * mine[0] for a, b in zip(mine, theirs, strict=True)))
        if k is None:
            yield holds(not all(parallel), divergence)


def _centred(distribution: tuple[Fraction, ...], weights: list[Fraction]) -> list[Fraction]:
    mean = sum((a * v for a, v in zip(distribution, weights, strict=True)), Fraction(0))
    return [a * (v - mean) for a, v in zip(distribution, weights, strict=True)]


def _check_factor_enclosed(factor: Factor) -> Cases:
    r"""$-f'(u) - c - k\,u f''(u)$ encloses zero at every ratio, or excludes it for every k."""
    u = divergences.symbol()
    ratios = [interval(r) for r in (Fraction(1, 7), Fraction(2, 3), 3, 50)]
    for divergence in (d for d in _curable() if d.name != "total_variation"):
        f, k = divergence.expr, factor(divergence)
        bound = enclose(_threshold(f, u), {})
        cured = [-enclose(sympy.diff(f, u), {u: r}) - bound for r in ratios]
        own = [enclose(u * sympy.diff(f, u, 2), {u: r}) for r in ratios]
        for i in range(1, len(ratios)):
            if k is not None:
                yield overlap(cured[i], interval(k) * own[i], divergence, i)
        if k is None:
            # Slopes with different quotients at two ratios are proportional for no k.
            quotients = [a / b for a, b in zip(cured, own, strict=True)]
            yield holds(any(k.b < quotients[0].a or k.a > quotients[0].b for k in quotients[1:]), divergence)


# Simulated.

_CASES: dict[str, tuple[str, float | None]] = {
    "JSD": ("jsd", None),
    "Le Cam": ("le_cam", None),
    "squared Hellinger": ("hellinger", None),
    "total variation": ("total_variation", None),
    "forward KL": ("forward_kl", None),
    "forward KL, clip 6": ("forward_kl", 6.0),
    "chi2": ("chi2", None),
    "chi2, clip 2": ("chi2", 2.0),
}


@functools.cache
def _ends(label: str, c: float) -> tuple[bool, bool]:
    """After the flow under a gauge of `c`: whether every far student is nearer to the teacher, and whether one is not.

    Those that have not moved are neither nearer nor further away.
    """
    name, clip = _CASES[label]
    divergence = divergences.divergence(name)

    def weight(log_u: Tensor) -> Tensor:
        t = log_u if clip is None else log_u.clamp(-clip, clip)
        return -divergence.generator(t) - c * torch.expm1(t)

    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()
    path = distance(flow(far_students(), log_q, weight, 12.0, 100), log_q)
    return bool((path[-1] < path[0]).all()), bool((path[-1] > path[0] + 1.0).any())


_LOG2 = math.log(2.0)
_GAUGES = {
    "JSD": -0.5 * _LOG2,
    "Le Cam": -1.0,
    "squared Hellinger": -1.0,
    "total variation": -0.5,
    "forward KL, clip 6": -7.0,
    "chi2, clip 2": -2.0 * math.expm1(2.0),
}


def _check_cured(gauges: dict[str, float]) -> Cases:
    """Far students leave in the usual gauge and come back in the curing one."""
    for label, c in gauges.items():
        yield holds(_ends(label, 0.0) == (False, True), label, c)
        yield holds(_ends(label, c) == (True, False), label, c)


# The derivation.


def _slope_of_weight() -> bool:
    u, c = sympy.Symbol("u", positive=True), sympy.Symbol("c", real=True)
    f = sympy.Function("f")
    w = -(f(u) + c * u)  # up to a constant, which is a gauge of V
    implied_curvature = sympy.diff(w, u) / u  # T4: V[w]'' = w'/u
    return sympy.simplify(implied_curvature + (sympy.diff(f(u), u) + c) / u) == 0


def _supremum() -> bool:
    """The slope of every catalogue generator stays below its limit on a grid."""
    grid = torch.linspace(-30.0, 30.0, 241, dtype=torch.float64)
    slopes = [(d.log_slope(grid) * (-grid).exp(), d.slope_at_infinity) for d in catalogue()]
    return all(bool((s <= limit + 1e-12 * max(1.0, abs(limit))).all()) for s, limit in slopes if math.isfinite(limit))


def _named_limits() -> bool:
    u = divergences.symbol()
    named = ("jsd", "hellinger", "le_cam", "total_variation", "forward_kl", "chi2")
    found = [_slope_at_infinity(divergences.divergence(name).expr, u) for name in named]
    found = [sympy.expand_log(limit) for limit in found]
    return found == [sympy.log(2) / 2, 1, 1, sympy.Rational(1, 2), sympy.oo, sympy.oo]


def _clipped_limits() -> bool:
    u, clip = divergences.symbol(), sympy.Symbol("C", real=True)
    found = [sympy.diff(divergences.divergence(n).expr, u).subs(u, sympy.exp(clip)) for n in ("forward_kl", "chi2")]
    return all(
        sympy.simplify(sympy.expand_log(a - b, force=True)) == 0
        for a, b in zip(found, (clip + 1, 2 * (sympy.exp(clip) - 1)), strict=True)
    )


def _proportional() -> bool:
    r"""$-(g + c) = k u g'$ for $g = f'$ has the solutions $g = -c + A u^{-1/k}$ alone: the alpha family."""
    u, k = sympy.symbols("u k", positive=True)
    c, a = sympy.Symbol("c", real=True), sympy.Symbol("C1")
    g = sympy.Function("g")
    # With g = -c + h u^(-1/k), the equation says that h is constant, whatever h.
    h = sympy.Function("h")
    left = (g(u) + c + k * u * sympy.diff(g(u), u)).subs(g(u), -c + h(u) * u ** (-1 / k)).doit()
    alpha = 1 - 1 / k
    power = (u**alpha - 1 - alpha * (u - 1)) / (alpha * (alpha - 1))
    limit_free = sympy.diff(power, u) - 1 / (1 - alpha)  # f' - f'(∞) of the alpha generator
    return (
        sympy.simplify(left - k * u ** (1 - 1 / k) * sympy.diff(h(u), u)) == 0
        and sympy.simplify(power.subs(u, 1)) == 0
        and sympy.simplify(limit_free + k * u ** (-1 / k)) == 0
        and sympy.simplify((a * u ** (-1 / k)).diff(u) * k * u + a * u ** (-1 / k)) == 0
    )


def _named_factors() -> bool:
    """Squared Hellinger doubled, Neyman halved, the reverse KL unchanged, JSD and Le Cam no multiple."""
    u = divergences.symbol()
    found = {}
    for name in ("hellinger", "neyman_chi2", "reverse_kl", "jsd", "le_cam"):
        f = divergences.divergence(name).expr
        found[name] = sympy.simplify(-(sympy.diff(f, u) + _threshold(f, u)) / (u * sympy.diff(f, u, 2)))
    constant = {name: value for name, value in found.items() if not value.has(u)}
    return constant == {"hellinger": 2, "neyman_chi2": sympy.Rational(1, 2), "reverse_kl": 1}
