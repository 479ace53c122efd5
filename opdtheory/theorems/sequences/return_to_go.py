"""T6g: the return-to-go as usually implemented is the gradient of no objective."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, random_pair
from opdtheory.theorems.instances.cases import Pair, catalogue
from opdtheory.theorems.instances.trees import (
    Linear,
    RationalTree,
    Row,
    field_of,
    product,
    rational_tree,
    reach,
    total,
)
from opdtheory.theorems.instances.two_steps import weight_at
from opdtheory.theorems.sequences.objectives import return_weight
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["practised_field", "theorems"]

ONE = Fraction(1)
GAMMAS = (Fraction(0), Fraction(1, 4), Fraction(9, 10), ONE)

Factor = Callable[[Fraction, int], Fraction]


def theorems() -> list[Theorem]:
    """T6g."""
    theorem = Theorem(
        number="T6g",
        name="the usual return-to-go is the gradient of no objective",
        meaning=(
            r"A discounted return-to-go is usually computed without the outer factor $\gamma^{n-1}$. For $\gamma < 1$"
            r" the direction that this gives is the gradient of no function at all, so there is no objective that must"
            r" fall while a training follows it."
        ),
        statement=(
            r"G = -E_p\Big[\sum_n s_n\big(w_f(u_n) - \sum_{m>n}\gamma^{m-n} f(u_m)\big)\Big];\quad"
            r" G \text{ is the gradient of a function of } \theta \text{ for all } p, q \iff \gamma = 1 \text{ (or one"
            r" token)}"
        ),
        hypotheses=(
            "there is a logit for every history and token; a family with fewer parameters may hide the asymmetry",
            r"there are at least two tokens, $p \ne q$ in a row after the first, and $f$ is strictly convex at 1",
            r"$0 \le \gamma < 1$; at $\gamma = 0$ this is the per-token weight of T6b, whose direction is a gradient"
            r" only if the prefixes are held fixed",
        ),
        source="derived here",
        advice=(
            r"Multiply by $\gamma^{n-1}$ if you mean the discount, or take $\gamma = 1$: then an objective exists and"
            r" must fall."
        ),
        derivation=(
            Step(
                r"\partial_h G_k - \partial_k G_h = (\gamma - 1)\,\partial_k P(h)\,\partial_h D_f(h)",
                "the derivatives of a gradient are symmetric. Let $k$ be a logit of the first row and $h$ one of a row"
                " after one token: $G_k$ discounts the cost at $h$ and $G_h$ does not, so their mixed derivatives"
                " differ",
                _step_symmetry,
            ),
            Step(
                r"\partial_{h,1} D_f(h) = -p(1-p)\,(w_f(u_1) - w_f(u_2)) \ne 0",
                "this is the slope of the divergence of a row of two tokens. The weight never falls (T1b), and it"
                " takes different values on the two sides of 1 if $f$ is strictly convex there; so the mixed"
                " derivatives of the first step do differ",
                _step_not_zero,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "with the outer discount",
                r"\partial_i G_j = \partial_j G_i \text{ for } A_n = \gamma^{n-1}[\dots],\ f \text{ free}",
                _check_symmetric,
                True,
                {"without it": False},
                "exact",
            ),
            Identity(
                "the asymmetry",
                r"\partial_h G_k - \partial_k G_h = (\gamma^{|h|-|k|} - 1)\,\partial_k P(h)\,\partial_h V(h),"
                r"\ f \text{ free}",
                _check_asymmetry,
                lambda gamma, depth: gamma**depth - 1,
                {
                    "sign flipped": lambda gamma, depth: 1 - gamma**depth,
                    "one step's discount for all": lambda gamma, depth: gamma - 1,
                    "none: a gradient": lambda gamma, depth: Fraction(0),
                },
                "exact",
            ),
            Identity(
                "certified not zero",
                r"\partial_i G_j \ne \partial_j G_i \text{ for some } i, j,\ \gamma \in \{0, \tfrac14, \tfrac9{10}\}",
                _check_certified,
                (False, GAMMAS[:3]),
                {"with the outer discount": (True, GAMMAS[:3]), "at γ = 1": (False, GAMMAS[3:])},
                "rigorous",
            ),
            Identity(
                "by automatic differentiation",
                r"\partial_i G_j = \partial_j G_i \text{ with } \gamma^{n-1}, \text{ at } \gamma = 0.6",
                _check_by_autograd,
                (True, 0.6),
                {"practised": (False, 0.6), "practised at γ = 0": (False, 0.0)},
            ),
        ),
    )
    return [theorem]


def _few_trees() -> tuple[RationalTree, ...]:
    """Two and three tokens, the latter with and without an end."""
    return (rational_tree(2, 2, seed=1), rational_tree(2, 3, eos=1, seed=4), rational_tree(3, 2, eos=0, seed=5))


@functools.cache
def _jacobian(tree: RationalTree, gamma: Fraction, outer: bool) -> list[list[Linear]]:
    """`[j][i]`: derivative of the field's entry `i` in logit `j`, f free."""
    weight = return_weight(gamma, outer=outer)
    return [[entry.slope for entry in field_of(tree, weight, seed)] for seed in tree.logits]


def _check_symmetric(outer: bool) -> Cases:
    """The Jacobian of the field is symmetric, f free."""
    for tree in _few_trees():
        for gamma in GAMMAS:
            jacobian = _jacobian(tree, gamma, outer)
            for i, logit in enumerate(tree.logits):
                yield same([row[i] for row in jacobian], jacobian[i], tree, f"gamma {gamma}", logit)


def _check_asymmetry(factor: Factor) -> Cases:
    r"""$\partial_h G_k - \partial_k G_h = (\gamma^{|h|-|k|} - 1)\,\partial_k P(h)\,\partial_h V(h)$; `k` begins `h`."""
    for tree in _few_trees():
        for gamma in GAMMAS:
            jacobian = _jacobian(tree, gamma, outer=False)
            for i, early in enumerate(tree.logits):
                for j, late in enumerate(tree.logits):
                    start = len(early.history)
                    depth = len(late.history) - start
                    if depth < 0:
                        continue
                    claimed: Linear | Fraction = Fraction(0)
                    if depth > 0 and late.history[:start] == early.history:
                        score = Fraction(late.history[start] == early.token) - tree.student[early.history][early.token]
                        moved = reach(tree.student, late.history) * score
                        claimed = factor(gamma, depth) * moved * _slope_to_come(tree, gamma, late)
                    yield same(jacobian[j][i] - jacobian[i][j], claimed, tree, f"gamma {gamma}", early, late)


@functools.cache
def _slope_to_come(tree: RationalTree, gamma: Fraction, logit: Row) -> Linear:
    r"""Derivative of $V(h) = E[\sum_{m \ge |h|} \gamma^{m-|h|} f(u_m) \mid h]$ in one of the row's own logits."""
    start, rows, terms = logit.history, tree.rows(logit), []
    for history, row in rows.items():
        if history[: len(start)] == start:
            met = product([rows[history[:n]][history[n]] for n in range(len(start), len(history))])
            costs = (p * p.under(q).f() for p, q in zip(row, tree.teacher[history], strict=True))
            terms.append((met * total(costs)).scaled(gamma ** (len(history) - len(start))))
    return total(terms).slope


def _check_certified(claim: tuple[bool, tuple[Fraction, ...]]) -> Cases:
    """For every divergence some pair of mixed derivatives differs: an interval excludes zero, or fractions do."""
    outer, gammas = claim
    for tree in (rational_tree(2, 2, seed=1), rational_tree(3, 2, eos=0, seed=5)):
        for gamma in gammas:
            jacobian = _jacobian(tree, gamma, outer)
            gaps = [jacobian[j][i] - jacobian[i][j] for i in range(len(jacobian)) for j in range(i)]
            for divergence in catalogue():
                differs = any(gap.terms and not gap.vanishes(divergence) for gap in gaps)
                yield holds(differs, tree, f"gamma {gamma}", divergence)


def practised_field(
    pair: Pair, divergence: Divergence, gamma: float, outer: bool = False
) -> Callable[[Tensor], Tensor]:
    r"""$G(z) = -E_{p_z}[\sum_n A_n s_n]$ as a differentiable function of all logits in one vector.

    Args:
        pair: student and teacher; only the shapes of the student's logits are used.
        divergence: the divergence whose weight and generator enter $A_n$.
        gamma: the discount of later rewards.
        outer: whether to multiply $A_n$ by $\gamma^{n-1}$, which makes it the gradient of an objective.
    """
    shapes = [z.shape for z in pair[0].logits]

    def policy(z: Tensor) -> TabularPolicy:
        parts = z.split([shape.numel() for shape in shapes])
        return TabularPolicy([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], eos=pair[0].eos)

    def field(z: Tensor) -> Tensor:
        rollouts = Enumeration.build(policy(z), pair[1]).rollouts()
        mask, log_u = rollouts.mask, rollouts.log_u
        rewards, steps = mask * divergence.generator(log_u), torch.arange(mask.shape[1], dtype=mask.dtype)
        decay = torch.tril(gamma ** (steps.unsqueeze(1) - steps).clamp_min(0), diagonal=-1)
        advantage = divergence.weight(log_u) - rewards @ decay
        if outer:
            advantage = advantage * gamma**steps
        chance = (mask * rollouts.student_logprobs).sum(-1, keepdim=True).exp()
        # The scores differentiate a second copy of the logits, which keeps probabilities and weights constant.
        twin = z.clone()
        scored = Enumeration.build(policy(twin), pair[1]).rollouts().student_logprobs
        (inner,) = torch.autograd.grad(-(mask * chance * advantage * scored).sum(), twin, create_graph=True)
        return inner

    return field


def _check_by_autograd(claim: tuple[bool, float]) -> Cases:
    """The Jacobian in float64: symmetric only with the outer discount, or without any."""
    outer, gamma = claim
    for divergence in map(divergences.divergence, ("reverse_kl", "forward_kl", "jsd", "chi2")):
        for pair in (random_pair(3, 2, seed=2), random_pair(2, 3, seed=3), random_pair(3, 2, eos=0, seed=4)):
            at = torch.cat([z.flatten() for z in pair[0].logits])
            field = practised_field(pair, divergence, gamma, outer)
            exact = torch.cat([g.flatten() for g in exact_gradient(*pair, divergence, "token_return", gamma)])
            yield close(field(at.clone().requires_grad_()).detach(), exact, divergence, pair, "gradient")
            jacobian = torch.autograd.functional.jacobian(field, at)
            yield close(jacobian, jacobian.T, divergence, pair, "Jacobian")


def _step_symmetry() -> bool:
    """Two tokens: the first row's softmax, and two later rows whose divergences are undefined functions."""
    z0, z1, gamma = sympy.symbols("z_0 z_1 gamma", real=True)
    y0, y1 = sympy.symbols("y_0 y_1", real=True)
    p = [1 / (1 + sympy.exp(z1 - z0)), 1 / (1 + sympy.exp(z0 - z1))]
    d = [sympy.Function("D0")(y0), sympy.Function("D1")(y1)]
    # The first row's own divergence does not depend on the later logits.
    first = gamma * p[0] * (d[0] - p[0] * d[0] - p[1] * d[1])
    return all(
        sympy.simplify(
            sympy.diff(first, y)
            - sympy.diff(chance * sympy.diff(later, y), z0)
            - (gamma - 1) * sympy.diff(chance, z0) * sympy.diff(later, y)
        )
        == 0
        for chance, later, y in zip(p, d, (y0, y1), strict=True)
    )


def _step_not_zero() -> bool:
    r"""The row's slope $-p(1-p)(w_1 - w_2)$ for two tokens, f undefined."""
    y, q = sympy.symbols("y q", positive=True)
    f = sympy.Function("f")
    p = 1 / (1 + sympy.exp(-y))
    slope = sympy.diff(p * f(q / p) + (1 - p) * f((1 - q) / (1 - p)), y)
    claimed = -p * (1 - p) * (weight_at(f, q / p) - weight_at(f, (1 - q) / (1 - p)))
    return sympy.simplify((slope - claimed).doit()) == 0
