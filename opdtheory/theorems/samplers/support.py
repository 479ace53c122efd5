"""T10: tokens to which one of the two models gives probability zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import sympy
import torch
from mpmath import iv

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, exact_value
from opdtheory.exact.tree import Tree
from opdtheory.theorems.instances.cases import (
    Pair,
    catalogue,
    enclose,
    interval,
    pairs,
    perspective,
    right_of_kinks,
    sampled_gradient,
)
from opdtheory.theorems.instances.two_steps import weight_at
from opdtheory.theorems.theorem import ALGEBRA, Cases, Identity, Step, Theorem, close, holds

__all__ = ["theorems"]

Limits = Callable[[Divergence], tuple[float, float]]


def theorems() -> list[Theorem]:
    """T10."""
    return [
        Theorem(
            number="T10",
            name="support",
            meaning=(
                r"A token that one of the two models excludes still counts in the divergence. If the teacher excludes"
                r" it, it counts $f(0^+)$ per unit of the student's probability, which is infinite for the reverse"
                r" KL. If the student excludes it, it counts $f'(\infty)$ per unit of the teacher's probability, and"
                r" no rollout of the student ever shows it."
            ),
            statement=(
                r"q_a \to 0:\ p_a f(q_a/p_a) \to f(0^+)\,p_a;\quad"
                r" p_a \to 0:\ p_a f(q_a/p_a) \to f'(\infty)\,q_a, \text{ which no rollout of the student sees}"
            ),
            hypotheses=(r"$f$ is convex; $f'(\infty)$ is the limit of its slope for large $u$, which may be infinite",),
            source="Csiszar (1967); derived here",
            advice=(
                r"A sampled value misses $f'(\infty)$ times the teacher's mass that the student never samples: add it"
                r" from the logits, or choose $f$ with $f'(\infty) = 0$. Where $f'(\infty)$ is infinite, sum over the"
                r" vocabulary, or compare with a mixture of teacher and student, as a skew divergence does."
            ),
            derivation=(
                Step(
                    r"p f(q/p) = q\,f(u)/u \to q\,f'(\infty)",
                    r"insert $p = q/u$ and let $p$ tend to zero, so that $u$ grows without bound. A convex $f$ has a"
                    r" slope at infinity, and $f(u)/u$ has the same limit by l'Hôpital's rule; the machine confirms"
                    r" the rearrangement. As $q$ tends to zero, $u$ does too, and $f(0^+)$ is the limit of $f(u)$",
                    _boundary,
                    in_words=True,
                ),
                Step(
                    r"p\,w_f(q/p) = q\,(f'(u) - f(u)/u) \to 0 \text{ if } f'(\infty) < \infty",
                    r"both terms in the bracket tend to $f'(\infty)$, so the pull on a vanishing token vanishes with"
                    r" it",
                    _pull_per_mass,
                ),
            ),
            identities=(
                Identity(
                    "limits of every entry",
                    r"\lim_{q \to 0} p f(q/p) = f(0^+) p, \quad \lim_{p \to 0} p f(q/p) = f'(\infty) q",
                    _check_limits,
                    lambda d: (d.at_zero, d.slope_at_infinity),
                    {
                        "nothing is missed": lambda d: (d.at_zero, 0.0),
                        "the two exchanged": lambda d: (d.slope_at_infinity, d.at_zero),
                        "nothing enters": lambda d: (0.0, d.slope_at_infinity),
                    },
                    "symbolic",
                    ALGEBRA,
                ),
                Identity(
                    "approach, enclosed",
                    r"|p f(q/p) - f'(\infty) q| < 10^{-15} \text{ at } p = 10^{-60}, \text{ or beyond every bound}",
                    _check_approach,
                    lambda d: d.slope_at_infinity,
                    {"nothing is missed": lambda d: 0.0, "always finite": lambda d: min(d.slope_at_infinity, 2.0)},
                    "rigorous",
                ),
                Identity(
                    "what a sampled value misses",
                    r"E_p\Big[\sum_n f(u_n)\Big] + f'(\infty) \sum_n E_p\, q(p = 0 \mid h_n) = D_f",
                    _check_value,
                    lambda d: d.slope_at_infinity,
                    {"nothing": lambda d: 0.0, "f(0) in place of f'(inf)": lambda d: min(d.at_zero, 1e3)},
                ),
                Identity(
                    "pull of a vanishing token, enclosed",
                    r"p\, w_f(q/p)/q \to \lim w_f(u)/u: 0 \text{ if } f'(\infty) < \infty, 1 \text{ for } u \log u",
                    _check_lost_pull,
                    _lost_pull,
                    {"always nothing": lambda d: 0.0, "as much as the value": lambda d: d.slope_at_infinity},
                    "rigorous",
                ),
                Identity(
                    "gradient on the student's support",
                    r"E_p[\hat g_{\mathrm{OPD+}}] = \nabla D_f \text{ where } p_a = 0 < q_a,\ f'(\infty) < \infty",
                    _check_narrow_gradient,
                    1.0,
                    {"sign flipped": -1.0},
                ),
            ),
        ),
    ]


def _check_limits(claim: Limits) -> Cases:
    r"""Limits by sympy of $p f(q/p)$ as $q \to 0$ and as $p \to 0$, per unit of the mass that stays."""
    for divergence in catalogue():
        term, p, q = perspective(divergence.expr)
        found = (sympy.limit(term, q, 0, "+") / p, sympy.limit(term, p, 0, "+") / q)
        for vanishing, limit, claimed in zip("qp", found, claim(divergence), strict=True):
            value = float(sympy.simplify(limit))
            finite = (torch.tensor(x if abs(x) < torch.inf else -1.0, dtype=torch.float64) for x in (value, claimed))
            yield close(*finite, divergence, f"{vanishing} to 0")


def _check_approach(claim: Callable[[Divergence], float]) -> Cases:
    r"""$p f(q/p)$ in intervals at $p = 10^{-60}$: within $10^{-15}$ of $f'(\infty) q$, or beyond every bound."""
    for divergence in catalogue():
        term, p, q = perspective(divergence.expr)
        for mass in (Fraction(1, 7), Fraction(2, 5)):
            near, nearer = (
                enclose(term, {p: interval(Fraction(1, 10**digits)), q: interval(mass)}) for digits in (40, 60)
            )
            limit = claim(divergence)
            # The slowest infinite one grows like log(1/p) q, by half from 40 digits to 60: no bound holds.
            reached = (
                0 < near.a and (near * 4 / 3).b < nearer.a
                if limit == torch.inf
                else abs(nearer - iv.mpf(limit) * interval(mass)).b < 1e-15
            )
            yield holds(bool(reached), divergence, f"q {mass}")


@functools.cache
def _narrow_pairs() -> tuple[Pair, ...]:
    """Students that never write the last token, with teachers that do."""
    found = []
    for student, teacher in pairs()[:3]:
        logits = [level.clone() for level in student.logits]
        for level in logits:
            level[:, -1] = -torch.inf
        found.append((TabularPolicy(logits, eos=student.eos), teacher))
    return tuple(found)


def _unseen(pair: Pair) -> float:
    r"""$\sum_n E_{h_n \sim p}\, q(\text{tokens with } p = 0 \mid h_n)$."""
    tree = Tree.build(*pair)
    levels = range(tree.horizon)
    unseen = (tree.reach(n).unsqueeze(-1) * tree.log_q[n].exp() * torch.isneginf(tree.log_p[n]) for n in levels)
    return float(sum(level.sum() for level in unseen))


def _check_value(missing: Callable[[Divergence], float]) -> Cases:
    r"""The mean of $\sum_n f(u_n)$ over every rollout of the student, and what `exact_value` adds to it."""
    for divergence in catalogue():
        if divergence.slope_at_infinity == torch.inf:
            continue
        for pair in _narrow_pairs():
            every = Enumeration.build(*pair)
            rollouts = every.rollouts()
            log_u = torch.where(rollouts.mask > 0, rollouts.log_u, 0.0)
            sampled = (every.probability * (rollouts.mask * divergence.generator(log_u)).sum(-1)).sum()
            yield close(sampled + missing(divergence) * _unseen(pair), exact_value(*pair, divergence), divergence, pair)
    for pair in _narrow_pairs():
        yield holds(float(exact_value(*pair, "forward_kl")) == torch.inf, "forward_kl", pair)


def _check_lost_pull(claim: Callable[[Divergence], float]) -> Cases:
    r"""$p\, w_f(q/p)$ in intervals at $p = 10^{-60}$, per unit of q: a finite $f'(\infty)$ leaves nothing."""
    u = divergences.symbol()
    for divergence in catalogue():
        f = right_of_kinks(divergence.expr)
        term, p, q = perspective(u * sympy.diff(f, u) - f)
        pull = enclose(term / q, {p: interval(Fraction(1, 10**60)), q: interval(Fraction(2, 5))})
        limit = claim(divergence)
        yield holds(pull.a > 1e30 if limit == torch.inf else abs(pull - iv.mpf(limit)).b < 1e-15, divergence)


def _lost_pull(divergence: Divergence) -> float:
    r"""$\lim w_f(u)/u$: 0 where $f'(\infty)$ is finite, 1 for $u \log u$, infinite for faster growth."""
    log_u = torch.tensor([650.0], dtype=torch.float64)
    if divergence.slope_at_infinity < torch.inf:
        return 0.0
    ratio = float(divergence.weight(log_u / 2)) / float((log_u / 2).exp())
    return torch.inf if ratio > 1e9 else round(ratio, 6)


def _check_narrow_gradient(sign: float) -> Cases:
    """On the student's own support sampled OPD+ has the exact gradient: the missing term is constant in the logits."""
    for divergence in catalogue():
        if divergence.slope_at_infinity < torch.inf:
            for pair in _narrow_pairs()[:2]:
                sampled = [sign * level for level in sampled_gradient("opd_plus", divergence, pair)]
                yield close(sampled, exact_gradient(*pair, divergence), divergence, pair)


# The derivation.


def _boundary() -> bool:
    r"""At $u = q/p$ the term $p f(q/p)$ is $q f(u)/u$."""
    p, q, u = sympy.symbols("p q u", positive=True)
    f = sympy.Function("f")
    return sympy.simplify((p * f(q / p) - q * (f(u) / u).subs(u, q / p)).doit()) == 0


def _pull_per_mass() -> bool:
    u = sympy.Symbol("u", positive=True)
    f = sympy.Function("f")
    return sympy.simplify((weight_at(f, u) / u - (sympy.diff(f(u), u) - f(u) / u)).doit()) == 0
