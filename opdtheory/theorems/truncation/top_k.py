r"""T9: the terms of a divergence on the k likeliest tokens $S$, which is held fixed: where the mass goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import TabularPolicy
from opdtheory.theorems.instances.cases import (
    at_atoms,
    catalogue,
    interval,
    kept,
    perspective,
    rational_distributions,
    sampled_gradient,
)
from opdtheory.theorems.instances.minimisers import TEACHER, critical_ratio, minimise
from opdtheory.theorems.instances.one_sample import in_logits, intervals
from opdtheory.theorems.instances.two_steps import weight_at
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

# Gauges of chi2 in which its critical ratio, the root of u^2 - 1 + c, is rational.
_CHI2_GAUGES = ((Fraction(-3), Fraction(2)), (Fraction(0), Fraction(1)), (Fraction(15, 16), Fraction(1, 4)))

_STARTS = ((0.0, 0.0, 0.0, 0.0), (-1.0, 2.0, 0.5, 1.5))

# Critical ratios of 0, e, 1, 1, below 1 and above 1. At a kink the minimisers would fill an interval, so none has one.
_DESCENDED: dict[str, dict[str, float]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {},
    "chi2": {},
    "skew_forward_kl": {"lam": 0.3},
    "skew_reverse_kl": {"lam": 0.3},
}


def theorems() -> list[Theorem]:
    """T9."""
    return [
        Theorem(
            number="T9",
            name="truncated terms",
            meaning=(
                "A loss may sum the terms of a divergence over a set $S$ of tokens only, such as the teacher's $k$"
                " likeliest. Its minimiser is the teacher divided by one constant on $S$, and that constant is 1 only"
                " for generators with $f'(1) = 0$. The forward KL draws all mass into $S$; the reverse KL leaves only"
                " $q(S)/e$ there and pushes the rest out."
            ),
            statement=(
                r"\min_p \sum_{a \in S} p_a f(q_a/p_a) \text{ is attained at } p = q/\max(u_0, q(S)) \text{ on }"
                r" S;\quad"
                r" w_f(u_0) = 0"
            ),
            hypotheses=(
                "$S$ is fixed and not the whole vocabulary",
                "$f$ is strictly convex, and $u_0 = 0$ where $w_f > 0$ throughout",
                "the student can put mass outside $S$",
            ),
            source="derived here",
            advice=(
                r"Never sum plain KL terms over the top $k$: use a generator with $f'(1) = 0$ (the reverse KL's terms"
                r" are then $p\log(p/q) - p + q$), renormalise, or keep a bucket for the tail."
            ),
            derivation=(
                Step(
                    r"\partial_{p_a}\Big[\sum_S p f(q/p) + \lambda \big(\sum_a p_a - 1\big)\Big] = \lambda - w_f(u_a)"
                    r" \text{ on } S, \quad \lambda \text{ outside}",
                    r"a multiplier $\lambda$ keeps the sum of the probabilities at one. This holds for any $f$,"
                    r" because sympy treats it as an undefined function",
                    _lagrange,
                ),
                Step(
                    r"\partial_p^2\,[p f(q/p)] = q^2 f''(q/p)/p^3 \ge 0",
                    "the problem is convex, so the conditions of Karush, Kuhn and Tucker are sufficient for the"
                    " minimum",
                    _convex,
                ),
                Step(
                    r"w_f(q(S)) \ge 0:\ \lambda = w_f(q(S)) \text{ and no tail};\quad"
                    r" \text{else } \lambda = 0,\ u = u_0 \text{ and } p(S) = q(S)/u_0",
                    r"on $S$ the slope vanishes, so $w_f(u_a) = \lambda$, and $u$ is constant on $S$ because"
                    r" $w_f' = u f'' > 0$. Without mass outside $S$ it is $u = q(S)$. Mass outside $S$ needs"
                    r" $\lambda = 0$, and an empty tail needs $\lambda \ge 0$. The machine confirms $w_f' = u f''$,"
                    r" $w_f(1) = f'(1)$, and that $f + c(u-1)$ has the weight $w_f + c$",
                    _level,
                    in_words=True,
                ),
                Step(
                    r"f = u \log u:\quad p = q/q(S),\quad \text{value } q(S)\,\log q(S)",
                    "for the forward KL, $w_f = u$ has no root, so the tail is empty",
                    _forward,
                ),
                Step(
                    r"f = -\log u:\quad u_0 = e,\quad p = q/e,\quad \text{value } -q(S)/e",
                    r"for the reverse KL, $w_f = \log u - 1$ has the root $e$, and $q(S) < e$",
                    _reverse,
                ),
            ),
            identities=(
                Identity(
                    "minimisers in fractions",
                    r"p = q/\max(u_0, q(S)) \text{ on } S \text{ for } (u-1)^2 + c(u-1)",
                    _check_critical_in_fractions,
                    lambda b, inside, critical: b / max(critical, inside),
                    {
                        "the teacher itself": lambda b, inside, critical: b,
                        "the teacher conditioned on S": lambda b, inside, critical: b / inside,
                        "the critical ratio, whatever q(S)": lambda b, inside, critical: b / critical,
                    },
                    "exact",
                ),
                Identity(
                    "(a) forward KL",
                    r"p = q/q(S),\quad \sum_S q \log(q/p) = q(S)\,\log q(S) < 0",
                    functools.partial(_check_kl, "forward_kl"),
                    lambda b, inside: (b / inside, inside * iv.log(inside)),
                    {
                        "the teacher is a fixed point": lambda b, inside: (b, interval(0)),
                        "the reverse KL's minimiser": lambda b, inside: (b / iv.e, -inside / iv.e),
                        "another value": lambda b, inside: (b / inside, iv.log(inside)),
                    },
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "(b) reverse KL",
                    r"p = q/e \text{ on } S,\quad \sum_S p \log(p/q) = -q(S)/e",
                    functools.partial(_check_kl, "reverse_kl"),
                    lambda b, inside: (b / iv.e, -inside / iv.e),
                    {
                        "the teacher is a fixed point": lambda b, inside: (b, interval(0)),
                        "the forward KL's minimiser": lambda b, inside: (b / inside, inside * iv.log(inside)),
                        "another value": lambda b, inside: (b / iv.e, -1 / iv.e),
                    },
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "descent ends there",
                    r"\text{Newton's method on the logits ends at } p = q/\max(u_0, q(S)) \text{ from every start}",
                    _check_descended,
                    max,
                    {
                        "the teacher itself": lambda critical, inside: 1.0,
                        "the teacher conditioned on S": lambda critical, inside: inside,
                    },
                ),
                Identity(
                    "the pull at the teacher",
                    r"\partial_{z_b} \big[\sum_S p f(q/p)\big]_{p=q} = -f'(1)\, q_b\, (1_S(b) - q(S)): "
                    r"\text{ zero iff } f'(1) = 0",
                    _check_at_teacher,
                    lambda slope: -slope,
                    {
                        "no pull": lambda slope: 0.0,
                        "a pull for every generator": lambda slope: -1.0,
                        "sign flipped": lambda slope: slope,
                    },
                ),
            ),
        ),
    ]


def _check_critical_in_fractions(distribution_on: Callable[[Fraction, Fraction, Fraction], Fraction]) -> Cases:
    """Chi2 in three gauges: the claimed distribution is stationary, and no distribution of a grid lies below it."""
    u = divergences.symbol()
    for shift, critical in _CHI2_GAUGES:
        f = divergences.divergence("chi2").expr + sympy.Rational(shift.numerator, shift.denominator) * (u - 1)
        term, p, _ = perspective(f)
        slope = sympy.diff(term, p)
        for _, teacher, k in kept():
            where = (f"gauge {shift}", teacher, f"k {k}")
            qs, inside = teacher[:k], sum(teacher[:k], Fraction(0))
            head = [distribution_on(b, inside, critical) for b in qs]
            rest = 1 - sum(head)
            yield holds(rest >= 0, *where, "mass outside")
            # However the rest is spread, its slope is zero.
            slopes = in_logits([*head, rest], [*at_atoms(slope, head, qs), Fraction(0)])
            yield same(slopes, [Fraction(0)] * (k + 1), *where, "slopes")
            lowest = sum(at_atoms(term, head, qs))
            for other, _ in rational_distributions():
                if len(other) == len(teacher):
                    yield holds(lowest <= sum(at_atoms(term, other[:k], qs)), *where, "no lower than at", other)


def _check_kl(name: str, claim: Callable[[Any, Any], tuple[Any, Any]]) -> Cases:
    """A KL's claimed distribution on S and value, in intervals: every slope in the logits encloses zero."""
    term, p, _ = perspective(divergences.divergence(name).expr)
    slope = sympy.diff(term, p)
    for _, teacher, k in kept():
        where = (teacher, f"k {k}")
        inside, qs = interval(sum(teacher[:k])), intervals(teacher[:k])
        head = [claim(b, inside)[0] for b in qs]
        rest = interval(1) - sum(head)
        slopes = in_logits([*head, rest], [*at_atoms(slope, head, qs), interval(0)])
        for b, entry in enumerate(slopes):
            yield overlap(entry, interval(0), *where, f"logit {b}")
        minimum = claim(qs[0], inside)[1]
        yield overlap(sum(at_atoms(term, head, qs)), minimum, *where, "value")
        # The teacher's own value is zero, or -log 1: the minimum is certified to lie below.
        yield holds(minimum.b < 0, *where, "below the teacher")


@functools.cache
def _minimisers(divergence: Divergence, k: int) -> tuple[Tensor, ...]:
    """Where Newton's method on the logits ends from each start; cached, since every twin needs it again."""
    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()

    def loss(z: Tensor) -> Tensor:
        log_p = z.log_softmax(-1)[:k]
        return (log_p.exp() * divergence.generator(log_q[:k] - log_p)).sum()

    return tuple(minimise(loss, torch.tensor(start, dtype=torch.float64)).softmax(-1) for start in _STARTS)


def _check_descended(level: Callable[[float, float], float]) -> Cases:
    """The minimisers found by descent from every start against the closed form `p = q / level` on S."""
    q = torch.tensor(TEACHER, dtype=torch.float64)
    for name, parameters in _DESCENDED.items():
        divergence = divergences.divergence(name, **parameters)
        claimed = q[:2] / level(critical_ratio(divergence), float(q[:2].sum()))
        for start, found in enumerate(_minimisers(divergence, 2)):
            yield close(found[:2], claimed, divergence, f"start {start}")


def _check_at_teacher(pull: Callable[[float], float]) -> Cases:
    r"""The library's truncated loss at the teacher: $-f'(1)\, q_b (1_S(b) - q(S))$ in each logit."""
    q = torch.tensor(TEACHER, dtype=torch.float64)
    teacher = TabularPolicy([q.log().unsqueeze(0)])
    on = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for divergence in catalogue()[::2]:
        slope = float(divergence.log_slope(torch.zeros(1, dtype=torch.float64)))
        claimed = pull(slope) * q * (on - q[:2].sum())
        gradient = sampled_gradient("topk_truncated", divergence, (teacher, teacher), k=2)
        yield close(gradient, [claimed.unsqueeze(0)], divergence)


# The derivation.


def _lagrange() -> bool:
    """Two tokens in S and one outside, f undefined: the slopes of the Lagrangian."""
    p0, p1, p2, q0, q1, multiplier = sympy.symbols("p0 p1 p2 q0 q1 lambda", positive=True)
    f = sympy.Function("f")
    lagrangian = p0 * f(q0 / p0) + p1 * f(q1 / p1) + multiplier * (p0 + p1 + p2 - 1)
    on = [sympy.diff(lagrangian, p) - multiplier + weight_at(f, q / p) for p, q in ((p0, q0), (p1, q1))]
    mass = sympy.diff(lagrangian, multiplier)
    return (
        all(sympy.simplify(each.doit()) == 0 for each in on)
        and sympy.diff(lagrangian, p2) == multiplier
        and mass == p0 + p1 + p2 - 1
    )


def _convex() -> bool:
    p, q, u = sympy.symbols("p q u", positive=True)
    f = sympy.Function("f")
    second = q**2 / p**3 * sympy.diff(f(u), u, 2).subs(u, q / p)
    return sympy.simplify((sympy.diff(p * f(q / p), p, 2) - second).doit()) == 0


def _forward() -> bool:
    q0, q1, multiplier = sympy.symbols("q0 q1 lambda", positive=True)
    # w_f = u is positive, so lambda = q/p > 0 on S, and a positive slope outside S empties the tail.
    found = sympy.solve(q0 / multiplier + q1 / multiplier - 1, multiplier)
    value = sum(q * sympy.log(q / (q / found[0])) for q in (q0, q1))
    return found == [q0 + q1] and sympy.simplify(value - (q0 + q1) * sympy.log(q0 + q1)) == 0


def _reverse() -> bool:
    q0, q1, u = sympy.symbols("q0 q1 u", positive=True)
    f = -sympy.log(u)
    found = sympy.solve(u * sympy.diff(f, u) - f, u)
    value = sum(q / sympy.E * sympy.log((q / sympy.E) / q) for q in (q0, q1))
    return found == [sympy.E] and sympy.simplify(value + (q0 + q1) / sympy.E) == 0


def _level() -> bool:
    u, c = sympy.symbols("u c", real=True)
    f = sympy.Function("f")
    w = u * sympy.diff(f(u), u) - f(u)
    g = f(u) + c * (u - 1)
    shifted = u * sympy.diff(g, u) - g
    return (
        sympy.simplify(sympy.diff(w, u) - u * sympy.diff(f(u), u, 2)) == 0
        and g.subs(u, 1) == f(1)
        and sympy.simplify(shifted - w - c) == 0
        and sympy.simplify(w.subs(u, 1).doit() - sympy.diff(f(u), u).subs(u, 1) + f(1)) == 0
    )
