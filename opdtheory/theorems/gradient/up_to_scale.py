"""T2b: the generators whose stop-gradient estimator is exact up to scale, in one gauge each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction

import sympy

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import exact_gradient
from opdtheory.theorems.gradient.gauge import gauged_reward
from opdtheory.theorems.instances.cases import (
    at_atoms,
    descent,
    enclose,
    pairs,
    rational_distributions,
    smooth_catalogue,
)
from opdtheory.theorems.instances.one_sample import centred, weight_of
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T2b."""
    return [
        Theorem(
            number="T2b",
            name="exact up to scale",
            meaning=(
                "A loss that detaches the reward may still follow the exact gradient of its divergence up to a"
                " constant factor $k$. It does so for every student and teacher only if the generator, after some"
                " multiple of $u - 1$ is added, is a power of the ratio or its logarithm; and it goes downhill only if"
                " the exponent $a$ is below one."
            ),
            statement=(
                r"g_{sg}[f + c(u-1)] = k\,\nabla D_f \text{ for all } p, q \iff f + c(u-1) = b\,(u^a - 1),\ a = 1 -"
                r" 1/k \ (\text{or } -b\log u,\ k = 1)"
            ),
            hypotheses=(
                "$f$ is smooth and $f(1) = 0$",
                "$k$ does not depend on $p$ and $q$",
                "there are at least two tokens",
            ),
            source="derived here",
            advice=(r"With detached rewards, drop the linear term of an alpha-divergence whose $\alpha$ is below one."),
            derivation=(
                Step(
                    r"g_{sg} = k\,\nabla D_f\ \forall p, q \iff f + k\,w_f = \text{const}",
                    r"write $f$ for the generator with its multiple of $u - 1$, which moves $w_f$ by a constant only."
                    r" Since $g_{sg} = E_p[f(u)\,s]$, the difference of the two sides is then $E_p[h(u)\,s]$ with $h ="
                    r" f + k\,w_f$. As in T2, two tokens can have any two ratios on either side of one, and their"
                    r" gradients agree only if $h$ is the same at both; so $h$ is constant",
                    _affine,
                    in_words=True,
                ),
                Step(
                    r"f + k(u f' - f) = \text{const},\ f(1) = 0 \iff f = b\,(u^a - 1),\ a = 1 - 1/k",
                    "this is a linear differential equation of the first order, so its solutions with $f(1) = 0$"
                    " differ in the factor $b$ only. The case $a = 0$ is the logarithm of T2",
                    _powers_solve,
                ),
                Step(
                    r"k = 1/(1 - a) > 0 \iff a < 1",
                    r"the loss descends the divergence if the factor $k$ is positive. For $a$ above one, as for"
                    r" $\chi^2$ written as $u^2 - 1$, the detached reward ascends the divergence exactly",
                    _sign_of_scale,
                ),
            ),
            identities=(
                Identity(
                    "Neyman's chi2 in fractions",
                    r"f = 1/u - 1:\quad g_{sg} = \tfrac12\nabla D_f",
                    _check_rational,
                    (Fraction(-1), Fraction(1, 2)),
                    {
                        "its usual gauge": (Fraction(0), Fraction(1, 2)),
                        "scale one": (Fraction(-1), Fraction(1)),
                        "scale minus one half": (Fraction(-1), Fraction(-1, 2)),
                    },
                    "exact",
                ),
                Identity(
                    "no other generator",
                    r"\exists\,c, k:\ f + c(u-1) + k\,w_f = \text{const} \iff f \text{ is a power or } \log u",
                    _check_certified,
                    _powers,
                    {
                        "the reverse KL alone": lambda label: label == "reverse_kl",
                        "every generator": lambda label: True,
                        "also the forward KL": lambda label: _powers(label) or label == "forward_kl",
                    },
                    "rigorous",
                ),
                Identity(
                    "alpha-divergences without their linear term",
                    r"c = 1/(\alpha - 1):\quad g_{sg} = \nabla D_\alpha/(1 - \alpha)",
                    _check_alpha,
                    lambda alpha: 1.0 / (1.0 - alpha),
                    {
                        "scale one": lambda alpha: 1.0,
                        "sign flipped": lambda alpha: 1.0 / (alpha - 1.0),
                    },
                ),
            ),
        ),
    ]


def _check_rational(claim: tuple[Fraction, Fraction]) -> Cases:
    r"""Neyman's $\chi^2$ in fractions: with gauge and scale, $p_a(f_a - E_p f) = -k\,p_a(w_a - E_p w)$."""
    gauge, scale = claim
    # Up to a constant, which is no force.
    reward = -divergences.divergence("neyman_chi2").expr - gauge * divergences.symbol()
    weight = scale * weight_of("neyman_chi2")
    for student, teacher in rational_distributions():
        rewards, weights = (centred(student, at_atoms(expr, student, teacher)) for expr in (reward, weight))
        yield same(rewards, weights, student, teacher)


_POINTS = tuple(Fraction(a, b) for a, b in ((1, 9), (1, 2), (3, 1), (7, 1), (20, 1)))


def _check_certified(some_gauge: Callable[[str], bool]) -> Cases:
    """The smooth divergences without a right gauge are exactly those claimed."""
    for divergence in smooth_catalogue():
        yield holds(_certified(divergence) != some_gauge(divergence.label), divergence)


@functools.cache
def _certified(divergence: Divergence) -> bool:
    r"""Whether intervals show $f, u, w_f, 1$ independent at rational ratios, so that no gauge and scale fits.

    Where $w_f$ is itself linear in $u$, it is $f, u, 1$.
    """
    u = divergences.symbol()
    f = divergence.expr
    columns = [f, u, divergences.weight_of(f), sympy.Integer(1)]
    if sympy.diff(columns[2], u, 2) == 0:
        del columns[2]
    for points in itertools.combinations(_POINTS, len(columns)):
        rows = sympy.Matrix([[column.subs(u, sympy.Rational(x)) for column in columns] for x in points])
        determinant = enclose(rows.det(method="laplace"), {})
        if bool(determinant.a > 0 or determinant.b < 0):
            return True
    return False


def _powers(label: str) -> bool:
    """The alpha family without its two KLs' limit at one: log u and the powers of u."""
    named = {"reverse_kl", "hellinger", "chi2", "neyman_chi2", "alpha", "skew_reverse_kl(lam=0.0)"}
    return label != "alpha(alpha=1.0)" and (label in named or label.split("(")[0] == "alpha")


def _check_alpha(scale: Callable[[float], float]) -> Cases:
    r"""For the alpha-divergences in the gauge $c = 1/(\alpha - 1)$, $g_{sg} = \nabla D/(1 - \alpha)$."""
    for alpha in (-1.5, -1.0, 0.0, 0.3, 0.5, 2.0, 2.5):
        divergence = divergences.divergence("alpha", alpha=alpha)
        c = 1.0 / (alpha - 1.0)  # the catalogue's generators have f'(1) = 0
        for pair in pairs():
            gauged = descent(pair, functools.partial(gauged_reward, divergence, c))
            exact = exact_gradient(*pair, divergence)
            yield close(gauged, [scale(alpha) * level for level in exact], divergence, pair)


def _affine() -> bool:
    """On two atoms the bias of the scaled direction is `p_1 p_2 (h(u_1) - h(u_2))` with `h = f + k w`."""
    p, h1, h2 = sympy.symbols("p h1 h2")
    return sympy.expand(p * (h1 - (p * h1 + (1 - p) * h2)) - p * (1 - p) * (h1 - h2)) == 0


def _powers_solve() -> bool:
    r"""$f + k(u f' - f)$ with $k = 1/(1 - a)$ is constant for $f = b(u^a - 1)$ and nothing else with $f(1) = 0$."""
    u, a, b = sympy.Symbol("u", positive=True), sympy.Symbol("a", real=True), sympy.Symbol("b")
    k = 1 / (1 - a)
    f = b * (u**a - 1)
    constant = f.subs(u, 1) == 0 and sympy.simplify(sympy.diff(f + k * (u * sympy.diff(f, u) - f), u)) == 0
    # Two solutions with f(1) = 0 differ in b only: of the homogeneous equation every solution over u^a is constant.
    g = sympy.Function("g")(u)
    homogeneous = sympy.solve(g + k * (u * g.diff(u) - g), g.diff(u))[0]
    unique = sympy.simplify((g / u**a).diff(u).subs(g.diff(u), homogeneous)) == 0
    return bool(constant and unique)


def _sign_of_scale() -> bool:
    """`b(u^a - 1)` with `b = 1/(a(a - 1))` is convex for every `a`, and `k = 1/(1 - a)` positive for `a < 1` only."""
    u, below, above = sympy.symbols("u below above", positive=True)
    a = sympy.Symbol("a", real=True)
    curvature = sympy.simplify(sympy.diff(u**a / (a * (a - 1)), u, 2) - u ** (a - 2)) == 0
    k = 1 / (1 - a)
    return bool(curvature and k.subs(a, 1 - below).is_positive and sympy.simplify(k.subs(a, 1 + above)).is_negative)
