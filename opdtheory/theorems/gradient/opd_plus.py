"""T1 and T1b: the OPD+ identity and its variational reading."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy
import torch

from opdtheory import divergences
from opdtheory.exact import enumerated_value, exact_gradient
from opdtheory.theorems.instances.cases import (
    Weight,
    at_atoms,
    autograd_gradient,
    catalogue,
    descent,
    every_case,
    irrational_cases,
    perspective,
    rational_cases,
    sampled_gradient,
)
from opdtheory.theorems.instances.one_sample import in_logits, intervals, mean_gradient, softmax
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

SymbolicWeight = Callable[["sympy.Expr", "sympy.Symbol"], "sympy.Expr"]

_TWINS: dict[str, SymbolicWeight] = {
    "sign of f flipped": lambda f, u: u * f.diff(u) + f,
    "u f' dropped (stop-gradient)": lambda f, u: -f,
    "f dropped": lambda f, u: u * f.diff(u),
}


def theorems() -> list[Theorem]:
    """T1 and T1b."""
    return [
        Theorem(
            number="T1",
            name="OPD+ identity",
            meaning=(
                r"The exact gradient of any f-divergence between student and teacher is, up to its sign, a mean over"
                r" the student's own tokens: the score $s = \nabla_\theta\log p_\theta$ of each token, times a weight"
                r" $w_f(u)$ that depends only on its ratio $u = q/p_\theta$, teacher over student. Tokens that the"
                r" student sampled are therefore enough to estimate the gradient without bias, for any parametric"
                r" family."
            ),
            statement=r"\nabla_\theta D_f(q\|p_\theta) = -E_{p_\theta}[w_f(u)\,s];\quad w_f(u) = u f'(u) - f(u)",
            hypotheses=(
                "$f$ is differentiable and $f(1) = 0$",
                r"$p_\theta$ is differentiable in $\theta$ and positive wherever $q$ is",
            ),
            source="OPD+, arXiv 2606.01039",
            advice="Put $u f'(u) - f(u)$ where the code has $-f(u)$; nothing else changes.",
            derivation=(
                Step(
                    r"\frac{\partial}{\partial p}\left[p\,f(q/p)\right] = f(u) - u f'(u) = -w_f(u)",
                    "differentiate one token's term by the product rule and the chain rule. This holds for any $f$,"
                    " because sympy treats it as an undefined function",
                    _per_atom,
                ),
                Step(
                    r"\partial_\theta \sum_i p_i f(q_i/p_i) = -\sum_i p_i\,w_f(u_i)\,\partial_\theta\log p_i",
                    r"add up the first step over the tokens and use $p\,\partial_\theta\log p = \partial_\theta p$."
                    r" Sympy checks three tokens whose probabilities are undefined functions of $\theta$; these stand"
                    r" for any parametric family",
                    _any_family,
                ),
                Step(
                    r"\partial D/\partial z_a = -p_a\,(w_f(u_a) - E_p w_f)",
                    r"for softmax logits $z$, insert the Jacobian $\partial p_b/\partial z_a = p_b(\delta_{ab} -"
                    r" p_a)$: it subtracts from each weight the mean of all weights",
                    _softmax,
                ),
            ),
            identities=(
                Identity(
                    "in fractions",
                    r"\partial D/\partial z_a = -p_a (w_a - E_p w)",
                    _check_rational,
                    _weight,
                    _TWINS,
                    "exact",
                ),
                Identity(
                    "enclosed",
                    r"\partial D/\partial z_a = -p_a (w_a - E_p w)",
                    _check_enclosed,
                    _weight,
                    _TWINS,
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "OPD+ identity",
                    r"\nabla D_f(q\|p) = -E_p[w_f(u)\,s],\quad w_f(u) = u f'(u) - f(u)",
                    _check_identity,
                    lambda d, log_u: d.weight(log_u),
                    {
                        "sign of f flipped": lambda d, log_u: d.log_slope(log_u) + d.generator(log_u),
                        "u f' dropped (stop-gradient)": lambda d, log_u: -d.generator(log_u),
                        "f dropped": lambda d, log_u: d.log_slope(log_u),
                    },
                ),
                Identity(
                    "oracle's closed forms",
                    r"\nabla J = -E_p\left[\textstyle\sum_n A_n s_n\right]\ \text{for each of the three objectives}",
                    _check_oracle,
                    1.0,
                    {"sign flipped": -1.0},
                ),
                Identity(
                    "sampled OPD+ is unbiased",
                    r"E_p[\hat g_{\mathrm{OPD+}}] = \nabla D_f(q\|p)",
                    _check_sampled,
                    "opd_plus",
                    {"stop-gradient instead": "opd"},
                ),
            ),
        ),
        Theorem(
            number="T1b",
            name="variational reading",
            meaning=(
                "The weight is the convex conjugate $f^*$ of the generator, taken at the slope $f'(u)$; in the"
                " language of an f-GAN, the slope is the best critic. The weight never falls as the ratio grows: of"
                " two tokens, the one with the larger ratio never gets the smaller weight."
            ),
            statement=r"w_f(u) = f^*(f'(u));\quad w_f'(u) = u f''(u) \ge 0",
            hypotheses=("$f$ is convex and differentiable, and twice differentiable where $f''$ is written",),
            source="Nowozin et al., f-GAN, arXiv 1606.00709; derived here",
            advice="The weight may be learnt as a critic; it never falls as $u$ grows.",
            derivation=(
                Step(
                    r"\sup_x [x f'(u) - f(x)] \text{ is attained at } x = u \text{ with value } w_f(u)",
                    "the slope in $x$ vanishes at $x = u$, and because $f$ is convex, this makes it a maximum. Sympy"
                    " checks the slope and the value for an undefined $f$",
                    _envelope,
                ),
                Step(
                    r"w_f'(u) = u f''(u)",
                    r"differentiate $w_f = u f' - f$ by the product rule, for any $f$; a convex $f$ has $f'' \ge 0$",
                    _increasing,
                ),
            ),
            identities=(
                Identity(
                    "weights never fall",
                    r"dw_f/d\log u = u^2 f''(u) \ge 0",
                    _check_non_decreasing,
                    1.0,
                    {"sign flipped": -1.0},
                ),
                Identity(
                    "weights are conjugates",
                    r"w_f(u) = f^*(f'(u)) = \sup_x\,[x f'(u) - f(x)]",
                    _check_conjugate,
                    lambda d, log_u: d.weight(log_u),
                    {
                        "-f (stop-gradient)": lambda d, log_u: -d.generator(log_u),
                        "u f'": lambda d, log_u: d.log_slope(log_u),
                    },
                ),
            ),
        ),
    ]


def _check_identity(weight: Weight) -> Cases:
    """The weighted scores against autograd of the enumerated divergence."""
    for divergence, pair in every_case():
        by_autograd = autograd_gradient(pair, enumerated_value, pair[1], divergence)
        yield close(descent(pair, functools.partial(weight, divergence)), by_autograd, divergence, pair)


def _check_oracle(sign: float) -> Cases:
    """The oracle's closed forms against autograd of the enumerated objectives."""
    for divergence, pair in every_case():
        for objective, gamma in (("token_local", 1.0), ("token_return", 1.0), ("token_return", 0.6), ("sequence", 1.0)):
            exact = exact_gradient(*pair, divergence, objective, gamma)
            by_autograd = autograd_gradient(pair, enumerated_value, pair[1], divergence, objective, gamma)
            yield close([sign * level for level in exact], by_autograd, divergence, pair, objective, f"gamma {gamma}")


def _check_sampled(name: str) -> Cases:
    """The sampled estimator, run as a black box on every rollout."""
    for divergence, pair in every_case():
        yield close(sampled_gradient(name, divergence, pair), exact_gradient(*pair, divergence), divergence, pair)


def _check_non_decreasing(sign: float) -> Cases:
    r"""$dw/d\log u = u^2 f'' \ge 0$, by autograd of the weight."""
    grid = torch.linspace(-6, 6, 49, dtype=torch.float64)
    for divergence in catalogue():
        log_u = grid.clone().requires_grad_()
        (slope,) = torch.autograd.grad(sign * divergence.weight(log_u).sum(), log_u)
        yield holds(bool((slope >= 0).all()), divergence, "sign of the slope")
        yield close(slope, sign * divergence.curvature(grid), divergence, "slope")


def _check_conjugate(weight: Weight) -> Cases:
    r"""$f^*(f'(u)) = \sup_x [x f'(u) - f(x)]$: the supremum is the weight, attained at $x = u$ and nowhere exceeded."""
    grid = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for divergence in catalogue():
        slope = divergence.log_slope(grid) * (-grid).exp()
        critic = grid.exp().unsqueeze(-1) * slope - divergence.generator(grid).unsqueeze(-1)
        supremum, claimed = critic.amax(0), weight(divergence, grid)
        # At the kink of the total variation any value of the subdifferential serves.
        smooth = grid.abs() > 1e-9
        yield close(claimed[smooth], supremum[smooth], divergence)


# Exact and rigorous forms.


def _check_rational(weight: SymbolicWeight) -> Cases:
    r"""$\partial D/\partial z_a = -p_a (w_a - E_p w)$ in fractions, sympy's $\partial D/\partial p$ on the left."""
    for divergence, student, teacher in rational_cases():
        term, p, _ = perspective(divergence.expr)
        slopes = at_atoms(sympy.diff(term, p), student, teacher)
        weights = at_atoms(weight(divergence.expr, divergences.symbol()), student, teacher)
        yield same(in_logits(student, slopes), mean_gradient(student, weights), divergence, student, teacher)


def _check_enclosed(weight: SymbolicWeight) -> Cases:
    """The same with intervals of 60 digits around both sides, for every generator with logarithms or roots."""
    for divergence, student, teacher in irrational_cases():
        ps, qs = intervals(student), intervals(teacher)
        term, p, _ = perspective(divergence.expr)
        slopes = at_atoms(sympy.diff(term, p), ps, qs)
        weights = at_atoms(weight(divergence.expr, divergences.symbol()), ps, qs)
        both = zip(in_logits(ps, [-w for w in weights]), in_logits(ps, slopes), strict=True)
        for token, (claimed, slope) in enumerate(both):
            yield overlap(claimed, slope, divergence, student, teacher, f"token {token}")


# The derivation, with f an undefined function.


def _per_atom() -> bool:
    p, q, u = sympy.symbols("p q u", positive=True)
    f = sympy.Function("f")
    left = sympy.diff(p * f(q / p), p).doit()
    right = (f(u) - u * sympy.diff(f(u), u)).subs(u, q / p).doit()
    return sympy.simplify(left - right) == 0


def _any_family() -> bool:
    """Three atoms whose probabilities are undefined functions of a parameter."""
    t, u = sympy.symbols("theta u", positive=True)
    f = sympy.Function("f")
    ps = [sympy.Function(f"p{i}", positive=True)(t) for i in range(3)]
    qs = sympy.symbols("q0:3", positive=True)
    w = u * sympy.diff(f(u), u) - f(u)
    left = sympy.diff(sum(p * f(q / p) for p, q in zip(ps, qs, strict=True)), t)
    scored = [-p * w.subs(u, q / p).doit() * sympy.diff(sympy.log(p), t) for p, q in zip(ps, qs, strict=True)]
    return sympy.simplify(left.doit() - sum(scored).doit()) == 0


def _softmax() -> bool:
    r"""Softmax rows have $\partial p_b/\partial z_a = p_b(\delta_{ab} - p_a)$: any weights give the centred form."""
    (z, p), w = softmax(), sympy.symbols("w0:3", real=True)
    slopes = [sum(v * sympy.diff(b, x) for v, b in zip(w, p, strict=True)) for x in z]
    return all(sympy.simplify(a - b) == 0 for a, b in zip(slopes, in_logits(p, w), strict=True))


def _envelope() -> bool:
    """With the critic $T = f'(u)$, the inner slope vanishes and what is left is the weight."""
    u, x = sympy.symbols("u x", positive=True)
    f = sympy.Function("f")
    objective = x * sympy.diff(f(u), u) - f(x)
    stationary = sympy.diff(objective, x).subs(x, u).doit()
    return (
        sympy.simplify(stationary) == 0
        and sympy.simplify(objective.subs(x, u).doit() - (u * sympy.diff(f(u), u) - f(u))) == 0
    )


def _increasing() -> bool:
    u = sympy.Symbol("u", positive=True)
    f = sympy.Function("f")
    w = u * sympy.diff(f(u), u) - f(u)
    return sympy.simplify(sympy.diff(w, u) - u * sympy.diff(f(u), u, 2)) == 0


def _weight(f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    return u * sympy.diff(f, u) - f
