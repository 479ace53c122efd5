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
            meaning=(
                r"Some losses with a detached reward can be cured by adding a multiple of $u - 1$ to the generator,"
                r" which makes their weight non-decreasing. This is possible only if $f'$ stays bounded as $u$ grows,"
                r" as for the JSD, or if the ratio is clipped, which the forward KL and $\chi^2$ need. Even then"
                r" another divergence than the intended one is descended, unless the generator belongs to the alpha"
                r" family and the gauge is exactly the right one."
            ),
            statement=(
                r"-(f + c(u-1)) \text{ is non-decreasing on } (0, \infty) \iff c \le -f'(\infty);\quad"
                r" \text{it is non-decreasing on } \log u \le C \iff c \le -f'(e^C);\quad"
                r" \text{the loss descends } V[-f - c(u-1)];\quad"
                r" \text{this is } k D_f,\ k > 0, \iff f \text{ is the } \alpha\text{-generator with } \alpha = 1 -"
                r" 1/k \text{ up to scale and gauge, and } c = -f'(\infty)"
            ),
            hypotheses=(
                "$f$ is convex, and differentiable where it has no kink",
                r"$C$ may have either sign; under the clip only ratios $u \le e^C$ occur",
            ),
            source="derived here",
            advice=(
                r"Prefer OPD+; where only the reward may change, add $f'(\infty)(u - 1)$ to it, under a clip"
                r" $f'(e^C)(u - 1)$, and know that another divergence is descended."
            ),
            derivation=(
                Step(
                    r"V[-f - c(u-1)]'' = -\frac{f' + c}{u}",
                    "T4 says that $V[w]'' = w'/u$; insert $w = -f - c(u-1)$, with $f$ as an undefined function",
                    _slope_of_weight,
                ),
                Step(
                    r"f' + c \le 0 \text{ on } (0, \infty) \iff c \le -\sup f' = -f'(\infty)",
                    r"$f'$ never falls, so its supremum is its limit; on $\log u \le C$ the supremum is the value at"
                    r" $e^C$. The machine checks on a grid that no generator of the catalogue has a slope above its"
                    r" limit",
                    _supremum,
                    in_words=True,
                ),
                Step(
                    r"f'(\infty) = \tfrac12\log 2 \text{ for the JSD};\quad"
                    r" f'(\infty) = 1 \text{ for } \mathrm{Hellinger}^2 \text{ and Le Cam};\quad"
                    r" f'(\infty) = \tfrac12 \text{ for } \tfrac12|u-1|;\quad"
                    r" f'(\infty) = \infty \text{ for } u\log u \text{ and } \chi^2",
                    "sympy takes the limits. Where the limit is finite a cure exists; where it is infinite none does",
                    _named_limits,
                ),
                Step(
                    r"f'(e^C) = C + 1 \text{ for } u\log u;\quad f'(e^C) = 2(e^C - 1) \text{ for } \chi^2",
                    "insert $u = e^C$ into the slopes of the two generators, which have no cure without a clip",
                    _clipped_limits,
                ),
                Step(
                    r"-(f' + c) = k\,u f'' \iff f' = -c + A u^{-1/k}",
                    r"the loss descends $k D_f$ if its weight has $k$ times the slope of $w_f$, which is $u f''$ by"
                    r" T1b. Variation of the constant $A$ finds all solutions: they are the alpha family with $\alpha"
                    r" = 1 - 1/k < 1$, in the gauge in which the slope vanishes at infinity",
                    _proportional,
                ),
                Step(
                    r"k = 2 \text{ for } \mathrm{Hellinger}^2;\quad"
                    r" k = \tfrac12 \text{ for Neyman's } \chi^2;\quad"
                    r" k = 1 \text{ for the reverse KL};\quad"
                    r" \text{none for the JSD and Le Cam}",
                    r"sympy divides the left side by $u f''$ at $c = -f'(\infty)$ and sees whether $u$ drops out",
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
