"""T4b: weights that depend on both probabilities, and the Bregman divergences that they descend."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, expected_gradient, random_pair
from opdtheory.theorems.instances.cases import at_atoms, autograd_gradient, rational_distributions, values_of
from opdtheory.theorems.instances.one_sample import centred, in_logits, mean_gradient, row_gradient
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

Potential = Callable[["sympy.Expr"], "sympy.Expr"]
# Convex potentials that take fractions to fractions: a square, a cube, and two that are not powers.
_POTENTIALS: tuple[Potential, ...] = (
    lambda x: x**2 / 2,
    lambda x: x**3 / 6,
    lambda x: x**4 + 3 * x**2,
    lambda x: 1 / (1 + x),
)

# Weights that belong to no Bregman divergence; some of them fall in p.
_OTHERS: tuple[Callable[[sympy.Symbol, sympy.Symbol], sympy.Expr], ...] = (
    lambda p, q: q / p,
    lambda p, q: q - 2 * p,
    lambda p, q: q**2 - p,
    lambda p, q: p - q,
)


def theorems() -> list[Theorem]:
    """T4b."""
    return [
        Theorem(
            number="T4b",
            name="weights beyond the ratio",
            meaning=(
                r"Some rewards depend on both probabilities and not only on their ratio. Their expected gradient is"
                r" still that of a sum over the tokens, which is a Bregman divergence if the weight is a difference"
                r" $\varphi'(q) - \varphi'(p)$. Two simple conditions on the weight make the teacher the minimum."
            ),
            statement=(
                r"\nabla\textstyle\sum_a H(p_a, q_a) = -E_p[A(p, q)\,s] \text{ for } \partial_p H = -A;\quad"
                r" A = \varphi'(q) - \varphi'(p) \text{ is the weight of the Bregman divergence of } \varphi;\quad"
                r" \text{the teacher is the minimum if } A \text{ falls in } p \text{ and } A(x, x) \text{ is"
                r" constant}"
            ),
            hypotheses=(
                "$A$ is differentiable in $p$",
                "for the minimum, the student is a softmax or of another family that reaches $q$; that a constant"
                " $A(x, x)$ is necessary takes three tokens or more",
            ),
            source="PowerOPD, arXiv 2606.17199; density-power divergence, Basu et al. (1998); derived here",
            advice=(
                "For a reward that depends on both probabilities, first check that $A(x, x)$ does not depend on $x$."
            ),
            derivation=(
                Step(
                    r"\partial_\theta H(p, q) = -p\,A(p, q)\,\partial_\theta\log p",
                    "apply the chain rule, with $H$ and $p$ as undefined functions; summing over the tokens gives the"
                    " claim",
                    _chain,
                ),
                Step(
                    r"\partial_p[\varphi(p) - \varphi(q) - \varphi'(q)(p - q)] = -(\varphi'(q) - \varphi'(p))",
                    r"differentiate one token's term of the Bregman divergence, with the potential $\varphi$ as an"
                    r" undefined function",
                    _bregman_weight,
                ),
                Step(
                    r"\varphi = x^{1+\alpha}/(1+\alpha):\quad A = q^\alpha - p^\alpha",
                    r"this potential gives the density-power divergence, also called the beta-divergence; it is convex"
                    r" for positive $\alpha$",
                    _density_power,
                ),
                Step(
                    r"p = q:\quad -p_a(A_a - E_p A) = 0\ \forall q \iff A(x, x) \text{ constant}",
                    "take two tokens with probabilities $x$ and $1 - x$: the teacher stays only if $A(x, x) = A(1 - x,"
                    " 1 - x)$. With a third token, $A(x, x) = A(y, y)$ whenever $x + y < 1$, so $A(x, x)$ is constant."
                    " If $A$ falls in $p$, the sum of $H$ is convex in $p$, and a stationary point is its minimum",
                    _stationary,
                    in_words=True,
                ),
            ),
            identities=(
                Identity(
                    "Bregman weights in fractions",
                    r"\nabla\textstyle\sum_a H_\varphi(p_a, q_a) = -E_p[(\varphi'(q) - \varphi'(p))\,s]",
                    _check_rational,
                    lambda phi, p, q: _slope(phi, q) - _slope(phi, p),
                    {
                        "sign flipped": lambda phi, p, q: _slope(phi, p) - _slope(phi, q),
                        "the potential for its slope": lambda phi, p, q: phi(q) - phi(p),
                        "the teacher's term dropped": lambda phi, p, q: -_slope(phi, p),
                    },
                    "exact",
                ),
                Identity(
                    "when the teacher stays",
                    r"\text{descent} = 0 \text{ at } p = q\ \forall q \iff A(x, x) = \text{const}",
                    _check_fixed_point,
                    _constant_on_diagonal,
                    {"if A falls in p": _falls_in_p, "always": lambda a, p, q: True},
                    "exact",
                ),
                Identity(
                    "the teacher is the minimum",
                    r"\varphi \text{ convex}:\ \textstyle\sum_a H_\varphi(p_a, q_a) > 0 \text{ unless } p = q",
                    _check_minimum,
                    1,
                    {"sign flipped": -1},
                    "exact",
                ),
                Identity(
                    "beyond the ratio",
                    r"A = q^\alpha - p^\alpha:\quad \nabla\textstyle\sum_a H(p_a, q_a) = -E_p[A\,s]",
                    _check_power,
                    lambda p, q, alpha: q**alpha - p**alpha,
                    {
                        "sign flipped": lambda p, q, alpha: p**alpha - q**alpha,
                        "of the ratio alone": lambda p, q, alpha: (q / p) ** alpha - 1,
                    },
                ),
            ),
        ),
    ]


def _check_power(advantage: Callable[[Tensor, Tensor, float], Tensor]) -> Cases:
    r"""For $A = q^\alpha - p^\alpha$: $H = p^{1+\alpha}/(1+\alpha) - q^\alpha p$ and a term of $q$ alone."""

    def bregman(student: TabularPolicy, teacher: TabularPolicy, alpha: float) -> Tensor:
        p, q = (torch.softmax(policy.logits[0], -1) for policy in (student, teacher))
        return (p ** (1 + alpha) / (1 + alpha) - q**alpha * p).sum()

    for alpha in (0.25, 0.5, 1.0, 2.0):
        loss = estimator("power", alpha=alpha)
        for seed in range(3):
            pair = random_pair(5, 1, seed=seed)
            by_autograd = autograd_gradient(pair, bregman, pair[1], alpha)
            yield close(expected_gradient(loss, *pair), by_autograd, loss, f"seed {seed}", "estimator")
            p, q = (torch.softmax(policy.logits[0], -1) for policy in pair)
            yield close(row_gradient(p, advantage(p, q, alpha)), by_autograd[0], loss, f"seed {seed}", "weight")


def _symbols() -> tuple[sympy.Symbol, sympy.Symbol]:
    p, q = sympy.symbols("p q", positive=True)
    return p, q


def _slope(phi: Potential, at: sympy.Symbol) -> sympy.Expr:
    return sympy.diff(phi(at), at)


def _divergence(phi: Potential, p: sympy.Symbol, q: sympy.Symbol) -> sympy.Expr:
    return phi(p) - phi(q) - _slope(phi, q) * (p - q)


def _check_rational(advantage: Callable[[Potential, sympy.Symbol, sympy.Symbol], sympy.Expr]) -> Cases:
    r"""In fractions: the slope of $\sum_a H(p_a, q_a)$ in the logits is $-p_a (A_a - E_p A)$."""
    p, q = _symbols()
    for phi in _POTENTIALS:
        in_p, claimed = sympy.diff(_divergence(phi, p, q), p), advantage(phi, p, q)
        for student, teacher in rational_distributions():
            slopes, weights = (at_atoms(expr, student, teacher) for expr in (in_p, claimed))
            yield same(in_logits(student, slopes), mean_gradient(student, weights), phi(p), student, teacher)


def _advantages(p: sympy.Symbol, q: sympy.Symbol) -> list[sympy.Expr]:
    """Bregman weights and others."""
    return [*(_slope(phi, q) - _slope(phi, p) for phi in _POTENTIALS), *(other(p, q) for other in _OTHERS)]


def _check_fixed_point(stays: Callable[[sympy.Expr, sympy.Symbol, sympy.Symbol], bool]) -> Cases:
    r"""In fractions: the descent $-p_a(A_a - E_p A)$ vanishes at $p = q$ for all of the distributions, or not."""
    p, q = _symbols()
    for advantage in _advantages(p, q):
        teachers = [teacher for _, teacher in rational_distributions()]
        moved = any(any(centred(teacher, at_atoms(advantage, teacher, teacher))) for teacher in teachers)
        yield holds(moved != stays(advantage, p, q), advantage)


def _constant_on_diagonal(advantage: sympy.Expr, p: sympy.Symbol, q: sympy.Symbol) -> bool:
    return bool(sympy.simplify(sympy.diff(advantage.subs(p, q), q)) == 0)


def _falls_in_p(advantage: sympy.Expr, p: sympy.Symbol, q: sympy.Symbol) -> bool:
    slope = sympy.diff(advantage, p)
    return all(values_of(slope, {p: Fraction(a, 8), q: Fraction(b, 8)}) < 0 for a in range(1, 8) for b in range(1, 8))


def _check_minimum(sign: int) -> Cases:
    r"""In fractions: $\sum_a H_\varphi(p_a, q_a) > 0$ unless $p = q$."""
    p, q = _symbols()
    for phi in _POTENTIALS:
        h = _divergence(phi, p, q)
        for student, teacher in rational_distributions():
            yield holds(sign * sum(at_atoms(h, student, teacher)) > 0, phi(p), student, teacher)
            yield holds(not any(at_atoms(h, teacher, teacher)), phi(p), student, teacher, "at the teacher")


# The derivation, with potential and H undefined functions.


def _chain() -> bool:
    r"""$\partial_\theta H(p, q) = -p\,A\,\partial\log p$ if $\partial_p H = -A$."""
    t, x, q = sympy.symbols("theta x q", positive=True)
    h, p = sympy.Function("H"), sympy.Function("p", positive=True)(t)
    advantage = -sympy.diff(h(x, q), x)
    left = sympy.diff(h(p, q), t).doit()
    right = -p * advantage.subs(x, p).doit() * sympy.diff(sympy.log(p), t)
    return sympy.simplify(left - right) == 0


def _bregman_weight() -> bool:
    p, q = _symbols()
    phi = sympy.Function("phi")
    h = phi(p) - phi(q) - sympy.diff(phi(q), q) * (p - q)
    slope = sympy.diff(h, p) - (sympy.diff(phi(p), p) - sympy.diff(phi(q), q))
    return sympy.simplify(slope) == 0 and sympy.simplify(h.subs(p, q).doit()) == 0


def _density_power() -> bool:
    r"""$\varphi = x^{1+\alpha}/(1+\alpha)$ has the slope $x^\alpha$, and is convex for $\alpha > 0$."""
    x, alpha = sympy.symbols("x alpha", positive=True)
    phi = x ** (1 + alpha) / (1 + alpha)
    slope = sympy.simplify(sympy.diff(phi, x) - x**alpha) == 0
    return bool(slope and sympy.simplify(sympy.diff(phi, x, 2)).is_positive)


def _stationary() -> bool:
    """Two atoms: at the teacher the descent is `q(1 - q)(A(q, q) - A(1 - q, 1 - q))`."""
    q, a1, a2 = sympy.symbols("q a1 a2")
    first = q * (a1 - (q * a1 + (1 - q) * a2))
    return sympy.simplify(first - q * (1 - q) * (a1 - a2)) == 0
