"""T3: the gauge of the generator, which the divergence does not see and stop-gradient does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import enumerated_value, exact_gradient, expected_gradient, random_pair
from opdtheory.exact.tree import Tree
from opdtheory.theorems.gradient.control_variate import Shift, return_loss
from opdtheory.theorems.instances.cases import (
    Pair,
    at_atoms,
    catalogue,
    descent,
    every_case,
    rational_cases,
    rational_distributions,
    sampled_gradient,
)
from opdtheory.theorems.instances.one_sample import expectation, in_logits, minus, ratios, score
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, furthest, holds, same

__all__ = ["gauged_reward", "theorems"]

GAUGE = Fraction(7, 10)


def theorems() -> list[Theorem]:
    """T3."""
    return [
        Theorem(
            number="T3",
            name="gauge",
            meaning=(
                "Adding $c(u - 1)$ to the generator, a change of gauge, leaves the divergence as it is and moves its"
                " exact weight by a constant only. A loss that detaches the reward $-f(u)$ does notice it: two ways of"
                " writing the same divergence then train in different directions. Under an exact weight the gauge"
                " moves nothing but the variance."
            ),
            statement=(
                r"D_{f + c(u-1)} = D_f;\quad"
                r" w_{f + c(u-1)} = w_f + c;\quad"
                r" g_{sg}[f + c(u-1)] = g_{sg}[f] - c\,\nabla\mathrm{KL}(q\|p);\quad"
                r" \textstyle\sum_{m>n} f(u_m) \text{ gains the martingale } c\sum_{m>n}(u_m - 1)"
            ),
            hypotheses=("$E_p[u] = 1$, which holds if $p$ is positive wherever $q$ is",),
            source="derived here",
            advice=(
                "Under an exact weight, choose the gauge for low variance; under $-f(u)$ it decides what is learnt."
            ),
            derivation=(
                Step(
                    r"E_p[f(u) + c(u - 1)] = E_p[f(u)] + c\,(\textstyle\sum q - \sum p)",
                    "since $p u = q$ for every token, the extra term adds up to $c$ times the difference of two sums"
                    " that both equal one",
                    _value_unmoved,
                ),
                Step(
                    r"w_{f + c(u-1)} = w_f + c",
                    "insert $f + c(u - 1)$ into $u f' - f$: it adds $u c - c(u - 1) = c$, for any $f$. A constant"
                    " weight is a baseline and does not move the gradient",
                    lambda: furthest(_check_weight_shift(lambda u, c: c)) == 0.0,
                ),
                Step(
                    r"E_p[c(u - 1)\,s] = c\,E_q[s] = -c\,\nabla\mathrm{KL}(q\|p)",
                    r"the gauge adds this term to the stop-gradient direction $g_{sg}[f] = E_p[f(u)\,s]$. Since $p u ="
                    r" q$ and $E_p[s] = 0$, it is $c\,E_q[s]$, and $-E_q[s]$ is the gradient of the forward KL. This"
                    r" holds for any family, because sympy treats the probabilities as undefined functions of $\theta$",
                    _direction_moved,
                ),
                Step(
                    r"E[(u_m - 1)\,s_n] = E\left[s_n\,E[u_m - 1 \mid h_m]\right] = 0,\quad m > n",
                    "given the history $h_m$, the earlier score $s_n$ is known and $u_m$ has mean one. The terms"
                    " $c(u_m - 1)$ of later tokens are therefore martingale differences, and by the tower property"
                    " they add nothing to the expected gradient",
                    _later_ratios_vanish,
                    in_words=True,
                ),
            ),
            identities=(
                Identity(
                    "the weight moves by a constant",
                    r"w_{f + c(u-1)} - w_f = c",
                    _check_weight_shift,
                    lambda u, c: c,
                    {"nothing": lambda u, c: 0 * c, "c u": lambda u, c: c * u, "-c": lambda u, c: -c},
                    "symbolic",
                ),
                Identity(
                    "the value in fractions",
                    r"D_{f + c(u-1)} = D_f",
                    _check_rational_value,
                    lambda u: u - 1,
                    {"c u for c (u - 1)": lambda u: u, "c (u - 1)^2": lambda u: (u - 1) ** 2},
                    "exact",
                ),
                Identity(
                    "the direction in fractions",
                    r"g_{sg}[f + c(u-1)] - g_{sg}[f] = -c\,(p - q)\ \text{in the logits}",
                    _check_rational_direction,
                    lambda p, q: p - q,
                    {
                        "not moved": lambda p, q: Fraction(0),
                        "sign flipped": lambda p, q: q - p,
                        "weighted by p": lambda p, q: p * (p - q),
                    },
                    "exact",
                ),
                Identity(
                    "later ratios are a martingale",
                    r"E[u_2\,s_1] = 0 = E[s_1], \text{ and so } E[c\,(1 - (u_2 - 1))\,s_1] = 0",
                    _check_martingale,
                    lambda u1, u2: u2,
                    {
                        "the token's own ratio too": lambda u1, u2: 1 - (u1 - 1) - (u2 - 1),
                        "the product of ratios": lambda u1, u2: u1 * u2 - 1,
                        "the square of the later ratio": lambda u1, u2: u2**2 - 1,
                    },
                    "exact",
                ),
                Identity(
                    "the gauge leaves the value",
                    r"D_{f + c(u-1)} = D_f",
                    _check_value,
                    torch.expm1,
                    {"c u for c (u - 1)": torch.exp, "c log u for c (u - 1)": lambda log_u: log_u},
                ),
                Identity(
                    "the gauge moves stop-gradient",
                    r"g_{sg}[f + c(u-1)] - g_{sg}[f] = -c\,\nabla\mathrm{KL}(q\|p)",
                    _check_direction,
                    "forward_kl",
                    {"the reverse KL instead": "reverse_kl"},
                ),
                Identity(
                    "the gauge is a free control variate",
                    r"E\left[\textstyle\sum_n \gamma^{n-1} (w_f - \sum_{m>n}\gamma^{m-n}(f + c(u_m - 1)))\,s_n\right]"
                    r"\ \text{does not depend on } c",
                    _check_return,
                    torch.expm1,
                    {"c log u for c (u - 1)": lambda log_u: log_u, "c (u - 1)^2": lambda log_u: log_u.expm1() ** 2},
                ),
            ),
        ),
    ]


def gauged_reward(divergence: Divergence, c: float, log_u: Tensor) -> Tensor:
    r"""The detached reward $-(f(u) + c(u - 1))$."""
    return -(divergence.generator(log_u) + c * torch.expm1(log_u))


def _shifted_value(pair: Pair, divergence: Divergence, shift: Shift) -> Tensor:
    tree = Tree.build(*pair)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(tree.horizon):
        log_u = tree.log_q[n] - tree.log_p[n]
        rows = (tree.log_p[n].exp() * (divergence.generator(log_u) + float(GAUGE) * shift(log_u))).sum(-1)
        total = total + (tree.reach(n) * rows).sum()
    return total


def _check_value(shift: Shift) -> Cases:
    r"""$D_{f + c(u-1)} = D_f$."""
    for divergence, pair in every_case():
        yield close(_shifted_value(pair, divergence, shift), enumerated_value(*pair, divergence), divergence, pair)


def _check_direction(direction: str) -> Cases:
    r"""A change of gauge moves the stop-gradient direction by $-c\,\nabla KL(q\|p)$."""
    c = float(GAUGE)
    for divergence, pair in every_case():
        gauged = descent(pair, functools.partial(gauged_reward, divergence, c))
        moved = minus(gauged, sampled_gradient("opd", divergence, pair))
        yield close(moved, [-c * level for level in exact_gradient(*pair, direction)], divergence, pair)


def _check_return(shift: Shift) -> Cases:
    """The `token_return` estimator keeps its expected gradient in every gauge, with a discount and without."""
    for divergence in catalogue()[::2]:
        for gamma, eos in ((1.0, None), (0.6, 0)):
            pair = random_pair(3, 2, eos=eos, seed=2)
            gauged = expected_gradient(return_loss(divergence, float(GAUGE), gamma, shift), *pair)
            yield close(gauged, exact_gradient(*pair, divergence, "token_return", gamma), divergence, f"gamma {gamma}")


# Exact forms.


def _check_rational_value(shift: Callable[[Fraction], Fraction]) -> Cases:
    r"""$D_{f + c(u-1)} = D_f$ in fractions."""
    for divergence, student, teacher in rational_cases():
        values = at_atoms(divergence.expr, student, teacher)
        gauged = [v + GAUGE * shift(r) for v, r in zip(values, ratios(student, teacher), strict=True)]
        yield same(expectation(student, gauged), expectation(student, values), divergence, student, teacher)


def _check_rational_direction(forward_kl: Callable[[Fraction, Fraction], Fraction]) -> Cases:
    r"""In fractions: $p_a\,(\Delta f_a - E_p \Delta f)$ is $-c\,\partial KL(q\|p)/\partial z_a = -c\,(p_a - q_a)$."""
    for divergence, student, teacher in rational_cases():
        f = divergence.expr
        for c in (GAUGE, -GAUGE, Fraction(3)):
            gauged = f + c * divergences.symbol()  # up to a constant, which moves nothing
            plain, moved = (in_logits(student, at_atoms(expr, student, teacher)) for expr in (f, gauged))
            claimed = [-c * forward_kl(a, b) for a, b in zip(student, teacher, strict=True)]
            yield same(minus(moved, plain), claimed, divergence, student, teacher, f"c {c}")


def _check_martingale(extra: Callable[[Fraction, Fraction], Fraction]) -> Cases:
    r"""Two tokens in fractions: what the gauge adds to the first token's weight has no part along its score."""
    distributions = [pair for pair in rational_distributions() if len(pair[0]) == 2] + [
        (other, student) for student, other in rational_distributions() if len(student) == 2
    ]
    for first in distributions:
        for rows in itertools.permutations(distributions, 2):  # of the second token, given the first
            for logit in range(2):
                total = Fraction(0)
                for a, (p1, q1) in enumerate(zip(*first, strict=True)):
                    for p2, q2 in zip(*rows[a], strict=True):
                        total += p1 * p2 * extra(q1 / p1, q2 / p2) * score(first[0], a)[logit]
                yield same(total, Fraction(0), first, rows, f"logit {logit}")


# Symbolic forms, with f an undefined function.


def _check_weight_shift(shift: Callable[[sympy.Symbol, sympy.Symbol], sympy.Expr]) -> Cases:
    """$w_{f + c(u-1)} - w_f$ for an undefined f."""
    u, c = sympy.symbols("u c", positive=True)
    f = sympy.Function("f")
    plain, gauged = f(u), f(u) + c * (u - 1)
    moved = (u * gauged.diff(u) - gauged) - (u * plain.diff(u) - plain)
    yield holds(gauged.subs(u, 1) == f(1) and sympy.simplify(moved - shift(u, c)) == 0, "f undefined")


def _value_unmoved() -> bool:
    """Three atoms: the extra term adds up to `sum q - sum p`."""
    c = sympy.Symbol("c")
    p, q = sympy.symbols("p0:3", positive=True), sympy.symbols("q0:3", positive=True)
    extra = sum(a * c * (b / a - 1) for a, b in zip(p, q, strict=True))
    return sympy.simplify(extra - c * (sum(q) - sum(p))) == 0


def _direction_moved() -> bool:
    r"""$E_p[(u - 1)s] = E_q[s]$, and $\partial KL(q\|p) = -E_q[s]$, for atoms undefined in a parameter."""
    t = sympy.Symbol("theta")
    first, second = (sympy.Function(f"p{i}", positive=True)(t) for i in range(2))
    p = [first, second, 1 - first - second]
    q = sympy.symbols("q0:3", positive=True)
    scores = [sympy.diff(sympy.log(a), t) for a in p]
    left = sum(a * (b / a - 1) * s for a, b, s in zip(p, q, scores, strict=True))
    kl = sum(b * sympy.log(b / a) for a, b in zip(p, q, strict=True))
    return sum(p) == 1 and sympy.simplify(left + sympy.diff(kl, t)) == 0


def _later_ratios_vanish() -> bool:
    """Given the history, `u_m - 1` has mean `sum q - sum p = 0`; two tokens, rows free, any score of the first."""
    p1, p2, q2, s = (sympy.symbols(f"{name}0:2") for name in ("p", "r", "t", "s"))
    rows = [((p2[a], 1 - p2[a]), (q2[a], 1 - q2[a])) for a in range(2)]
    extra = sum(p1[a] * s[a] * sum(pb * (qb / pb - 1) for pb, qb in zip(*rows[a], strict=True)) for a in range(2))
    return sympy.simplify(extra) == 0
