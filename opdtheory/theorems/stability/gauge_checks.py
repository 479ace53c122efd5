"""The checks of T5b: thresholds in fractions and intervals, multiples of a divergence, and simulated flows."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    at_atoms,
    at_kink,
    catalogue,
    enclose,
    interval,
    kinked,
    rational_distributions,
    right_of_kinks,
    smooth_catalogue,
    values_of,
)
from opdtheory.theorems.instances.flows import TEACHER, distance, far_students, flow
from opdtheory.theorems.instances.one_sample import in_logits
from opdtheory.theorems.theorem import Cases, Identity, close, holds, overlap, same

__all__ = ["identities", "slope_at_infinity", "threshold"]

# The largest c that cures a generator, infinite (no c does) as sympy's -oo.
Threshold = Callable[["sympy.Expr", "sympy.Symbol"], "sympy.Expr"]

# The factor k with V[-f - c(u-1)] = k D_f at the largest curing c, or None where there is none.
Factor = Callable[[Divergence], "Fraction | None"]


def identities() -> tuple[Identity, ...]:
    """The claims of T5b that are checked."""
    return (
        Identity(
            "in fractions",
            r"-(f + c(u-1)) \text{ non-decreasing} \iff c \le -f'(\infty)",
            _check_rational,
            threshold,
            _FALSE_THRESHOLDS,
            "exact",
        ),
        Identity(
            "enclosed",
            r"-f'(u) - c \ge 0 \text{ for all } u \iff c \le -f'(\infty)",
            _check_enclosed,
            threshold,
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
                "sign flipped": {case: -c for case, c in _GAUGES.items()},
                "no clip needed": {
                    ("forward_kl", None): -7.0,
                    ("chi2", None): -2.0 * math.expm1(2.0),
                    ("jsd", None): 0.0,
                },
            },
        ),
    )


@functools.cache
def slope_at_infinity(f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    """The limit of `f'`, by sympy."""
    # The logarithm of a quotient is the form in which sympy finds these limits.
    return sympy.limit(sympy.logcombine(sympy.simplify(sympy.diff(right_of_kinks(f), u)), force=True), u, sympy.oo)


def threshold(f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    r"""$-f'(\infty)$, the largest gauge that cures."""
    return -slope_at_infinity(f, u)


_FALSE_THRESHOLDS: dict[str, Threshold] = {
    "sign of f'(∞) flipped": lambda f, u: -threshold(f, u),
    "f'(1) in place of f'(∞)": lambda f, u: right_of_kinks(f).diff(u).subs(u, 1) * -1,
    "half of it": lambda f, u: threshold(f, u) / 2,
    "no more than one below it": lambda f, u: threshold(f, u) - 1,
    "a cure for all": lambda f, u: threshold(f, u) if threshold(f, u).is_finite else f.subs(u, 1) * 0 - 10,
}

_LIMIT = Fraction(10) ** 12


def _check_rational(threshold: Threshold) -> Cases:
    """The weight on rational ratios up to 1e12, at, below and above the largest curing `c`."""
    u = divergences.symbol()
    points = [1 / _LIMIT, *map(Fraction, ("1/9", "1/2", "1", "3/2", "100")), _LIMIT, 2 * _LIMIT]
    for name in RATIONAL:
        f = divergences.divergence(name).expr
        largest = threshold(f, u)
        if largest.is_finite:
            candidates = [(largest - k, True) for k in (0, sympy.Rational(1, 50), 3)]
            candidates += [(largest + k, False) for k in (sympy.Rational(1, 50), 3)]
        else:
            candidates = [(-sympy.Integer(k), False) for k in (0, 1, 7, 1000)]
        for c, cured in candidates:
            values = [values_of(-f - c * u, {u: r}) for r in points]  # a constant changes no order
            yield holds(all(b >= a for a, b in itertools.pairwise(values)) == cured, name, f"c {c}")


def _check_enclosed(threshold: Threshold) -> Cases:
    r"""The sign of $-f'(u) - c$ certified on a grid, for every other entry."""
    u = divergences.symbol()
    points = [interval(r) for r in (1 / _LIMIT, Fraction(1, 9), 1, 2, 100, _LIMIT)]
    for divergence in (d for d in catalogue() if d.name not in RATIONAL):
        f = divergence.expr
        largest, slope = threshold(f, u), sympy.diff(f, u)
        finite = bool(largest.is_finite)
        steps = (0, Fraction(1, 20), Fraction(-1, 20)) if finite else (1, 7, 20)
        bound = enclose(largest, {}) if finite else interval(0)
        for step in steps:
            slopes = [-enclose(slope, {u: r}) - bound + interval(step) for r in points]
            cured = finite and step >= 0
            certified = all(s.a > 0 for s in slopes) if cured else any(s.b < 0 for s in slopes)
            yield holds(certified, divergence, f"bound - c {step}" if finite else f"minus c {step}")


def _check_catalogue(sign: float) -> Cases:
    r"""The limits by sympy against the catalogue's `slope_at_infinity`."""
    u = divergences.symbol()
    for divergence in catalogue():
        claimed = sign * divergence.slope_at_infinity
        found = slope_at_infinity(divergence.expr, u)
        if math.isinf(claimed):
            yield holds(found.is_infinite is True and claimed > 0, divergence, "infinite")
        else:
            yield holds(bool(found.is_finite), divergence, "finite")
            yield close(torch.tensor(float(found)), torch.tensor(claimed), divergence, "value")


def _clipped_threshold(divergence: Divergence, clip: float) -> float:
    r"""$-f'(e^C)$."""
    at = torch.tensor([clip], dtype=torch.float64)
    return -float(divergence.log_slope(at) * (-at).exp())


def _check_clipped(threshold: Callable[[Divergence, float], float]) -> Cases:
    r"""The slope of the weight on $\log u \le C$ under the largest curing `c`: zero at the clip, positive below."""
    for divergence in smooth_catalogue():
        for clip in (0.5, 2.0, 6.0):
            grid = torch.linspace(-8.0, clip, 200, dtype=torch.float64)
            slope = divergence.log_slope(grid) * (-grid).exp()
            largest = threshold(divergence, clip)
            rise, size = -slope - largest, max(1.0, abs(largest))
            # All of these are strictly convex, so the slope at the clip is met there alone.
            zero_at_clip, rises_below = abs(float(rise[-1])) <= 1e-12 * size, bool((rise[:-1] > 0).all())
            yield holds(zero_at_clip and rises_below, divergence, f"C {clip}")


def _check_forward_kl(least: Callable[[Fraction], Fraction]) -> Cases:
    r"""$-(u\log u) - c(u-1)$ on $\log u \le C$, certified at $u = e^C$, where its slope is least."""
    for clip in (Fraction(1, 3), Fraction(2), Fraction(6)):
        for step in (Fraction(-1, 100), Fraction(1, 100)):
            c = least(clip) + step
            tops = [clip * k / 4 for k in (-8, 0, 1, 2, 3, 4)]
            slopes = [-(iv.log(iv.exp(interval(t))) + 1) - interval(c) for t in tops]
            certified = all(s.a > 0 for s in slopes) if step < 0 else any(s.b < 0 for s in slopes)
            yield holds(certified, f"C {clip}", f"c {c}")


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
        cured = -f - threshold(f, u) * u  # up to a constant, which is no force
        parallel = []
        for student, teacher in rational_distributions():
            if at_kink(divergence, student, teacher):
                continue
            own = u * sympy.diff(f, u) - f
            mine, theirs = (in_logits(student, at_atoms(weight, student, teacher)) for weight in (cured, own))
            if k is not None:
                yield same(mine, [k * v for v in theirs], divergence, student, teacher)
            elif len(student) > 2:  # with two tokens all gradients are parallel
                parallel.append(all(a * theirs[0] == b * mine[0] for a, b in zip(mine, theirs, strict=True)))
        if k is None:
            yield holds(not all(parallel), divergence)


def _check_factor_enclosed(factor: Factor) -> Cases:
    r"""$-f'(u) - c - k\,u f''(u)$ encloses zero at every ratio, or excludes it for every k."""
    u = divergences.symbol()
    points = (Fraction(1, 7), Fraction(2, 3), Fraction(3), Fraction(50))
    for divergence in (d for d in _curable() if not kinked(d)):
        f, k = divergence.expr, factor(divergence)
        bound = enclose(threshold(f, u), {})
        cured = [-enclose(sympy.diff(f, u), {u: interval(r)}) - bound for r in points]
        own = [enclose(u * sympy.diff(f, u, 2), {u: interval(r)}) for r in points]
        if k is None:
            # Slopes with different quotients at two ratios are proportional for no k.
            first, *others = (a / b for a, b in zip(cured, own, strict=True))
            yield holds(any(other.b < first.a or other.a > first.b for other in others), divergence)
        else:
            for i, r in enumerate(points[1:], start=1):
                yield overlap(cured[i], interval(k) * own[i], divergence, f"u {r}")


@functools.cache
def _ends(name: str, clip: float | None, c: float) -> tuple[bool, bool]:
    """After the flow under a gauge of `c`: whether all far students are nearer to the teacher, and whether one is not.

    Those that have not moved are neither nearer nor further away.
    """
    divergence = divergences.divergence(name)

    def weight(log_u: Tensor) -> Tensor:
        t = log_u if clip is None else log_u.clamp(-clip, clip)
        return -divergence.generator(t) - c * torch.expm1(t)

    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()
    path = distance(flow(far_students(), log_q, weight, 12.0, 100), log_q)
    return bool((path[-1] < path[0]).all()), bool((path[-1] > path[0] + 1.0).any())


# Curing gauges by divergence and clip of the log-ratio.
_GAUGES: dict[tuple[str, float | None], float] = {
    ("jsd", None): -0.5 * math.log(2.0),
    ("le_cam", None): -1.0,
    ("hellinger", None): -1.0,
    ("total_variation", None): -0.5,
    ("forward_kl", 6.0): -7.0,
    ("chi2", 2.0): -2.0 * math.expm1(2.0),
}


def _check_cured(gauges: Mapping[tuple[str, float | None], float]) -> Cases:
    """Far students leave in the usual gauge and come back in the curing one."""
    for (name, clip), c in gauges.items():
        yield holds(_ends(name, clip, 0.0) == (False, True), name, f"clip {clip}", "usual gauge")
        yield holds(_ends(name, clip, c) == (True, False), name, f"clip {clip}", f"c {c:.4g}")
