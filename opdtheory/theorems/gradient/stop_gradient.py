"""T2: the bias of the stop-gradient estimator, in the gradient and in the value."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import TabularPolicy, enumerated_value, exact_gradient, random_pair
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    Weight,
    at_atoms,
    autograd_gradient,
    catalogue,
    descent,
    every_case,
    interval,
    perspective,
    rational_cases,
    rational_distributions,
    sampled_gradient,
    strictly_convex,
    two_atoms,
)
from opdtheory.theorems.instances.one_sample import expectation, in_logits, intervals, mean_gradient, softmax
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T2."""

    def log_slope(f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
        return u * sympy.diff(f, u)

    return [
        Theorem(
            number="T2",
            name="bias of stop-gradient",
            meaning=(
                "A loss that detaches the reward $-f(u)$ misses a term of the gradient: the one that says how the"
                " reward itself changes with the student. For the reverse KL the missing term always vanishes; for"
                " any other divergence there are students and teachers for which it does not. There the value of"
                " the loss misleads too, as its slope is not that of the divergence."
            ),
            statement=(
                r"g_{sg} = \nabla D_f + E_p[u f'(u)\,s];\quad \text{the bias vanishes for all } p, q \iff"
                r" f = -c\log u;\quad E_{p_\theta}[f(u_{\theta_0})] - D_f(\theta)"
                r" = E_p[u f'(u)\,s]\cdot(\theta - \theta_0) + O(|\theta - \theta_0|^2)"
            ),
            hypotheses=(
                "$f$ is continuous, differentiable away from $u = 1$, and $f(1) = 0$",
                "there are at least two tokens, and $p$ and $q$ are positive and otherwise free",
                r"for the last line, $f$ and $p_\theta$ are twice differentiable; with one derivative the remainder is"
                r" only $o(|\theta - \theta_0|)$",
            ),
            source="OPD+, arXiv 2606.01039; Tang & Munos, arXiv 2506.09477; the converse and the value derived here",
            advice=(
                "Use $-f(u)$ as a detached reward for the reverse KL only; elsewhere its step and its loss curve"
                " mislead."
            ),
            derivation=(
                Step(
                    r"\partial_p[p\,f(q/p_0)]_{p_0 = p} - \partial_p[p\,f(q/p)] = u f'(u)",
                    "the product rule has a term for the ratio, which freezing the ratio drops. This holds for any"
                    " $f$, token by token; the sum over tokens is the bias",
                    _frozen_slope,
                ),
                Step(
                    r"u f'(u) = \text{const} \implies E_p[u f'(u)\,s] = \text{const}\cdot E_p[s] = 0",
                    'the score has mean zero, so a constant $u f\'(u)$ adds nothing. This proves the "if" direction',
                    _constant_has_no_bias,
                ),
                Step(
                    r"p_1 = \frac{u_2 - 1}{u_2 - u_1},\ p_2 = \dots = p_{1+m} = \frac{1 - p_1}{m}:"
                    r"\quad \text{bias in } z_1 = p_1(1 - p_1)\,(u_1 f'(u_1) - u_2 f'(u_2))",
                    "for the converse, any two ratios $u_1 < 1 < u_2$ occur together: some $p$ and $q$ on $1 + m$"
                    " tokens have them. The bias in the first logit is then the difference of $u f'(u)$ between the"
                    " two ratios",
                    _every_pair_of_ratios,
                ),
                Step(
                    r"u_1 f'(u_1) = u_2 f'(u_2)\ \forall u_1 < 1 < u_2 \implies u f'(u) = -c \implies f = -c\log u",
                    "without bias, the two ratios have the same $u f'(u)$. Fix $u_2$ and move $u_1$, then the other"
                    " way round: $u f'(u)$ is one constant, and integrating gives the logarithm. This proves \"only"
                    ' if"',
                    _only_logarithm,
                    in_words=True,
                ),
                Step(
                    r"p f(q/p_0) - p f(q/p) = u_0 f'(u_0)\,(p - p_0)"
                    r" - \tfrac12\,\tfrac{q^2}{p_0^3} f''(u_0)\,(p - p_0)^2 + \dots",
                    "expand one token's term of the frozen value and of the divergence around $p_0$, where they"
                    " agree. To first order they differ by the same vector as the gradients, and the next term is"
                    " negative: the frozen value falls below its tangent",
                    _value_to_second_order,
                ),
            ),
            identities=(
                Identity(
                    "the bias in fractions",
                    r"\partial_{z_a}: g_{sg} - \nabla D_f = p_a\,(k_a - E_p k),\ k = u f'(u)",
                    _check_rational,
                    log_slope,
                    {
                        "no bias": lambda f, u: sympy.Integer(0),
                        "w_f for u f'": lambda f, u: u * sympy.diff(f, u) - f,
                        "sign flipped": lambda f, u: -u * sympy.diff(f, u),
                    },
                    "exact",
                ),
                Identity(
                    "the frozen value lies below its tangent",
                    r"E_p[f(u_0)] - D_f(p) \le \textstyle\sum_a (p_a - p_{0,a})\,u_{0,a} f'(u_{0,a})",
                    _check_below_tangent,
                    operator.le,
                    {"above": operator.ge},
                    "exact",
                ),
                Identity(
                    "the bias certified",
                    r"p_1 p_2\,(u_1 f'(u_1) - u_2 f'(u_2)) \ne 0 \iff f \ne -c\log u",
                    _check_certified,
                    _slope_varies,
                    {
                        "unbiased for every f": lambda f, u: False,
                        "unbiased for none": lambda f, u: True,
                        "unbiased if f'(1) = 0": lambda f, u: bool(sympy.diff(f, u).subs(u, 1) != 0),
                    },
                    "rigorous",
                ),
                Identity(
                    "bias of stop-gradient",
                    r"g_{sg} = \nabla D_f + E_p[u f'(u)\,s]",
                    _check_bias,
                    lambda d, log_u: d.log_slope(log_u),
                    {
                        "no bias": lambda d, log_u: torch.zeros_like(log_u),
                        "w_f for u f'": lambda d, log_u: d.weight(log_u),
                        "sign flipped": lambda d, log_u: -d.log_slope(log_u),
                    },
                ),
                Identity(
                    "bias of the frozen value",
                    r"\nabla_\theta\left(E_{p_\theta}[f(u_{\theta_0})] - D_f(\theta)\right) = E_p[u f'(u)\,s]",
                    _check_value_bias,
                    lambda d, log_u: d.log_slope(log_u),
                    {
                        "no bias": lambda d, log_u: torch.zeros_like(log_u),
                        "sign flipped": lambda d, log_u: -d.log_slope(log_u),
                    },
                ),
                Identity(
                    "the remainder needs a second derivative",
                    r"f = |u - 1|^{3/2},\ q = (\tfrac12, \tfrac12),\ p_t = (\tfrac12 + t, \tfrac12 - t):\ D_f/t^2 \ge"
                    r" t^{-1/2}, \text{ with no bias at } t = 0",
                    _check_remainder,
                    lambda t: 1 / iv.sqrt(t),
                    {"bounded": lambda t: iv.mpf(4), "linear": lambda t: 1 / t},
                    "rigorous",
                ),
                Identity(
                    "unbiased only for the reverse KL",
                    r"\text{bias} = 0\ \forall p, q \iff u f'(u) = \text{const}",
                    _check_unbiased_iff,
                    _constant_slope,
                    {
                        "unbiased for every f": lambda d: True,
                        "unbiased for none": lambda d: False,
                        "unbiased if f'(1) = 0": _flat_at_one,
                    },
                ),
            ),
        ),
    ]


def _check_bias(bias: Weight) -> Cases:
    r"""$g_{sg} - g_{exact} = E_p[u f'(u) s]$, the left-hand side from the black-box estimator."""
    for divergence, pair in every_case():
        stopped, exact = sampled_gradient("opd", divergence, pair), exact_gradient(*pair, divergence)
        predicted = [-level for level in descent(pair, functools.partial(bias, divergence))]
        yield close([s - e for s, e in zip(stopped, exact, strict=True)], predicted, divergence, pair)


def _check_value_bias(bias: Weight) -> Cases:
    r"""The first-order gap $E_{p_\theta}[f(u_{\theta_0})] - D_f(\theta)$ on one-step policies."""

    def gap(student: TabularPolicy, teacher: TabularPolicy, d: Divergence) -> Tensor:
        log_p, log_q = (torch.log_softmax(policy.logits[0], -1) for policy in (student, teacher))
        frozen = d.generator(log_q - log_p.detach())
        return (log_p.exp() * frozen).sum() - enumerated_value(student, teacher, d)

    for divergence in catalogue():
        for seed in range(3):
            pair = random_pair(5, 1, seed=seed)
            predicted = [-level for level in descent(pair, functools.partial(bias, divergence))]
            yield close(autograd_gradient(pair, gap, pair[1], divergence), predicted, divergence, f"seed {seed}")


def _check_unbiased_iff(unbiased: Callable[[Divergence], bool]) -> Cases:
    """Stop-gradient is unbiased on two atoms with `u_1 < 1 < u_2` exactly for the generators claimed."""
    for divergence in catalogue():
        worst = 0.0
        for pair in two_atoms()[:3]:
            gap = sampled_gradient("opd", divergence, pair)[0] - exact_gradient(*pair, divergence)[0]
            worst = max(worst, float(gap.abs().max()))
        yield holds((worst < 1e-12) == unbiased(divergence) and not 1e-12 <= worst < 1e-6, divergence)


def _constant_slope(divergence: Divergence) -> bool:
    grid = torch.linspace(-3, 3, 13, dtype=torch.float64)
    slope = divergence.log_slope(grid)
    return bool((slope.diff().abs() < 1e-12).all())


def _flat_at_one(divergence: Divergence) -> bool:
    return abs(float(divergence.log_slope(torch.zeros(1, dtype=torch.float64)))) < 1e-12


# Exact and rigorous forms.


def _check_rational(bias: Callable[[sympy.Expr, sympy.Symbol], sympy.Expr]) -> Cases:
    r"""$g_{sg} - g_{exact}$ in fractions: one term of $p f(q/p)$ differentiated with the ratio frozen, and in full."""
    u, frozen = divergences.symbol(), sympy.Symbol("frozen", positive=True)
    for divergence, student, teacher in rational_cases():
        term, p, q = perspective(divergence.expr)
        stopped = sympy.diff(p * divergence.expr.subs(u, q / frozen), p).subs(frozen, p)
        gaps = at_atoms(stopped - sympy.diff(term, p), student, teacher)
        claimed = [-k for k in at_atoms(bias(divergence.expr, u), student, teacher)]
        yield same(in_logits(student, gaps), mean_gradient(student, claimed), divergence, student, teacher)


def _check_below_tangent(claim: Callable[[Fraction, Fraction], bool]) -> Cases:
    r"""In fractions: $E_p[f(u_0)] - D_f(p) \le \sum_a (p_a - p_{0,a})\,u_{0,a} f'(u_{0,a})$, equal only at the start.

    Where a generator is not strictly convex, as the total variation's is not, it may be equal elsewhere too.
    """
    students = [p for pair in rational_distributions() for p in pair]
    for divergence, start, teacher in rational_cases():
        f, slope = divergence.expr, divergences.symbol() * sympy.diff(divergence.expr, divergences.symbol())
        frozen, slopes = at_atoms(f, start, teacher), at_atoms(slope, start, teacher)
        strict = strictly_convex(divergence)
        for student in (p for p in students if len(p) == len(start)):
            gap = expectation(student, frozen) - expectation(student, at_atoms(f, student, teacher))
            tangent = expectation(student, slopes) - expectation(start, slopes)
            where = (divergence, start, teacher, student)
            yield holds(claim(gap, tangent), *where, "order")
            yield holds(not strict or (tangent == gap) == (student == start), *where, "equality")


def _check_certified(biased: Callable[[sympy.Expr, sympy.Symbol], bool]) -> Cases:
    r"""The bias $p_1 p_2 (k(u_1) - k(u_2))$, $k = u f'$, on two rational atoms: an interval that excludes zero.

    Where no bias is claimed, every interval must hold zero and be narrow. Each is compared with the library's own
    slope in float64, so that what is certified is the bias and no other number.
    """
    u = divergences.symbol()
    atoms = [(student, teacher) for student, teacher in rational_distributions() if len(student) == 2]
    for divergence in catalogue():
        f = divergence.expr
        certified, vanishing = False, True
        for student, teacher in atoms:
            p, q = (student, teacher) if divergence.name in RATIONAL else (intervals(student), intervals(teacher))
            first, second = at_atoms(u * sympy.diff(f, u), p, q)
            gap = interval(first - second) if divergence.name in RATIONAL else first - second
            bias = interval(student[0] * student[1]) * gap
            error = abs(float(bias.mid) - _first_logit_bias(divergence, student, teacher))
            yield holds(error < 1e-12, divergence, student, teacher)
            certified = certified or bool(bias.a > 0 or bias.b < 0)
            vanishing = vanishing and bool(abs(bias).b < 1e-40)
        yield holds(certified if biased(f, u) else vanishing, divergence)


def _check_remainder(growth: Callable[[Any], Any]) -> Cases:
    """The divergence over the square of the distance, enclosed, is within a factor of four of the growth claimed.

    The frozen value and the bias are zero where the student is the teacher, so the divergence is the whole remainder.
    """
    for k in range(2, 14):
        t = iv.mpf(1) / 4**k
        ratios = [t / (iv.mpf(1) / 2 + t), t / (iv.mpf(1) / 2 - t)]
        value = t * iv.sqrt(ratios[0]) + t * iv.sqrt(ratios[1])  # p |q/p - 1| is t for both tokens
        multiple = value / t**2 / growth(t)
        yield holds(bool(multiple.a >= 1 and multiple.b <= 4), f"t = 4^-{k}")


def _first_logit_bias(divergence: Divergence, student: Distribution, teacher: Distribution) -> float:
    r"""$E_p[u f'(u) s]$ along the first logit, by its definition."""
    p, q = (torch.tensor([float(a) for a in side], dtype=torch.float64) for side in (student, teacher))
    score = torch.eye(len(p), dtype=torch.float64)[0] - p[0]
    return (p * divergence.log_slope(q.log() - p.log()) * score).sum().item()


def _slope_varies(f: sympy.Expr, u: sympy.Symbol) -> bool:
    # At two ratios that no pair of the check has; for -c log u the difference vanishes exactly.
    slope = u * sympy.diff(f, u)
    return bool(sympy.simplify(slope.subs(u, sympy.Rational(1, 3)) - slope.subs(u, 7)) != 0)


# The derivation, with f an undefined function.


def _frozen_slope() -> bool:
    """The slope of `p f(q/p)` with the ratio held at its value, less the slope in full."""
    p, frozen, q, u = sympy.symbols("p frozen q u", positive=True)
    f = sympy.Function("f")
    stopped = sympy.diff(p * f(q / frozen), p).subs(frozen, p)
    gap = stopped - sympy.diff(p * f(q / p), p).doit()
    claimed = (u * sympy.diff(f(u), u)).subs(u, q / p).doit()
    return sympy.simplify(gap - claimed) == 0


def _constant_has_no_bias() -> bool:
    """Softmax of three tokens: a constant in place of `u f'` leaves nothing."""
    (z, p), c = softmax(), sympy.Symbol("c")
    return all(sympy.simplify(sum(c * sympy.diff(value, x) for value in p)) == 0 for x in z)


def _every_pair_of_ratios() -> bool:
    r"""$u_1 < 1 < u_2$ are the ratios of a pair on $1 + m$ tokens with bias $p_1(1-p_1)(k_1 - k_2)$ in $z_1$."""
    below, above = sympy.symbols("below above", positive=True)  # u_1 = 1/(1 + below), u_2 = 1 + above
    m = sympy.Symbol("m", positive=True, integer=True)
    k1, k2 = sympy.symbols("k1 k2")
    u1, u2 = 1 / (1 + below), 1 + above
    p1 = sympy.simplify((u2 - 1) / (u2 - u1))
    other = sympy.simplify((1 - p1) / m)
    teacher_adds_up = sympy.simplify(p1 * u1 + m * other * u2 - 1) == 0
    bias = p1 * (k1 - (p1 * k1 + m * other * k2))
    form = sympy.simplify(bias - p1 * (1 - p1) * (k1 - k2)) == 0
    return bool(teacher_adds_up and form and p1.is_positive and sympy.factor(other).is_positive)


def _only_logarithm() -> bool:
    """The differential equation `u f' = -c` with `f(1) = 0`."""
    u, c = sympy.symbols("u c", positive=True)
    f = sympy.Function("f")
    solution = sympy.dsolve(u * f(u).diff(u) + c, f(u), ics={f(1): 0}).rhs
    return sympy.simplify(solution + c * sympy.log(u)) == 0


def _value_to_second_order() -> bool:
    """The gap vanishes at the start, has slope `u f'` there and curvature `-q^2 f''/p^3`."""
    p, frozen, q, u = sympy.symbols("p frozen q u", positive=True)
    f = sympy.Function("f")
    gap = p * f(q / frozen) - p * f(q / p)
    slope = sympy.diff(gap, p).doit().subs(frozen, p).doit()
    second = sympy.diff(gap, p, 2).doit()
    claimed = (u * sympy.diff(f(u), u)).subs(u, q / p).doit()
    curvature = (-(q**2) / p**3 * sympy.diff(f(u), u, 2)).subs(u, q / p).doit()
    return (
        gap.subs(frozen, p) == 0
        and sympy.simplify(slope - claimed) == 0
        and sympy.simplify(second.subs(frozen, p).doit() - curvature) == 0
    )
