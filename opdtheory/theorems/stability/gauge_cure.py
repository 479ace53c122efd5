"""T5b: when a change of gauge makes stop-gradient descend a genuine divergence, and which one."""

from __future__ import annotations

import math

import sympy
import torch

from opdtheory import divergences
from opdtheory.theorems.instances.cases import catalogue
from opdtheory.theorems.stability import gauge_checks as checks
from opdtheory.theorems.theorem import Step, Theorem

__all__ = ["theorems"]


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
            hypotheses=(
                "f convex and differentiable where it has no kink",
                "C of either sign; only ratios u <= e^C occur",
            ),
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
                    "machine checks the catalogue on a grid",
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
            identities=checks.identities(),
        )
    ]


# What is descended.


# Simulated.


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
    found = [checks.slope_at_infinity(divergences.divergence(name).expr, u) for name in named]
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
        found[name] = sympy.simplify(-(sympy.diff(f, u) + checks.threshold(f, u)) / (u * sympy.diff(f, u, 2)))
    constant = {name: value for name, value in found.items() if not value.has(u)}
    return constant == {"hellinger": 2, "neyman_chi2": sympy.Rational(1, 2), "reverse_kl": 1}
