"""Exact values and gradients of the three objectives (theory: the table of objectives, T1, T6)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import chain
from opdtheory.exact.policies import MarkovPolicy, Policy
from opdtheory.exact.tree import LEAF_BUDGET, Tree, check_pair, pointwise, row_gradient

__all__ = [
    "OBJECTIVES",
    "check_objective",
    "exact_gradient",
    "exact_value",
    "full_vocabulary_variance",
    "tree_gradient",
]

OBJECTIVES = ("token_local", "token_return", "sequence")


def check_objective(objective: str, gamma: float = 1.0) -> None:
    """Refuse an unknown objective, and a discount where there is nothing to discount.

    Raises:
        InvalidArgumentError: `objective` is not one of `OBJECTIVES`, or `gamma` is outside [0, 1]
            or given for another objective than `token_return`.
    """
    if objective not in OBJECTIVES:
        raise InvalidArgumentError("objective", f"is {objective!r}; one of {', '.join(OBJECTIVES)} is needed")
    if not 0.0 <= gamma <= 1.0:
        raise InvalidArgumentError("gamma", f"is {gamma!r}; it must lie in [0, 1]")
    if gamma != 1.0 and objective != "token_return":
        raise InvalidArgumentError("gamma", f"is {gamma!r}, but {objective} has no discount")


def exact_value(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    objective: str = "token_local",
    gamma: float = 1.0,
    budget: int = LEAF_BUDGET,
) -> Float[Tensor, ""]:
    r"""The objective itself, in nats for the KL divergences, by a sweep over the prefix tree.

    $$\textstyle \sum_n E_{h_n\sim p} D_f(q\|p)(h_n), \quad E_p\sum_n\gamma^{n-1} f(u_n), \quad D_f(Q\|P)$$

    for `token_local`, `token_return` and `sequence`. Tokens that an environment wrote add nothing and count as
    positions of the discount (T6f). Two `MarkovPolicy` are handled by dynamic programming, at any horizon.

    Args:
        student: the policy `p`.
        teacher: the policy `q`.
        divergence: an object or a catalogue name.
        objective: which of the three.
        gamma: discount of `token_return`.
        budget: largest number of sequences to enumerate.

    Returns:
        A 0-d float64 tensor; `inf` where the divergence is infinite (T10).

    Raises:
        InvalidArgumentError: a wrong name, or policies that do not match.
        BudgetExceededError: more sequences than `budget`.
    """
    divergence = as_divergence(divergence)
    check_objective(objective, gamma)
    check_pair(student, teacher)
    with torch.no_grad():
        if isinstance(student, MarkovPolicy) and isinstance(teacher, MarkovPolicy):
            return chain.value(student, teacher, divergence, objective, gamma)
        return _tree_value(Tree.build(student, teacher, budget), divergence, objective, gamma)


def exact_gradient(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    objective: str = "token_local",
    gamma: float = 1.0,
    budget: int = LEAF_BUDGET,
) -> list[Tensor]:
    r"""The gradient to descend, in closed form: $-E_p[\sum_n A_n s_n]$ with the exact weight $A_n$.

    $A_n$ is $w_f(u_n)$ for `token_local` (T1), $\gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n}f(u_m)]$ for
    `token_return` and $w_f(U)$ for `sequence` (T6). It is exactly zero where an environment writes.

    Args:
        student: the policy `p`.
        teacher: the policy `q`.
        divergence: an object or a catalogue name.
        objective: which of the three.
        gamma: discount of `token_return`.
        budget: largest number of sequences to enumerate.

    Returns:
        A list like `student.parameters()` (for a `TabularPolicy`, like `student.logits`), in the sign
        that `loss.backward()` would leave.

    Raises:
        InvalidArgumentError: a wrong name, policies that do not match, or a divergence that is
            infinite between them and so has no gradient.
        BudgetExceededError: more sequences than `budget`.
    """
    divergence = as_divergence(divergence)
    check_objective(objective, gamma)
    check_pair(student, teacher)
    if isinstance(student, MarkovPolicy) and isinstance(teacher, MarkovPolicy):
        with torch.no_grad():
            gradient = chain.gradient(student, teacher, divergence, objective, gamma)
    else:
        with torch.no_grad():
            levels = tree_gradient(Tree.build(student, teacher, budget), divergence, objective, gamma)
        gradient = student.pull_back(levels)
    if not all(torch.isfinite(g).all() for g in gradient):
        raise InvalidArgumentError(
            "divergence",
            f"{divergence.label} between these policies is infinite or overflows: a token has zero or vanishing "
            "probability under one of them only (T10)",
        )
    return gradient


def _tree_value(tree: Tree, divergence: Divergence, objective: str, gamma: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for n in range(tree.horizon):
        if objective == "sequence":
            children = tree.log_p[n].shape
            terms = pointwise(
                divergence, tree.prefix_log_p[n + 1].view(children), tree.prefix_log_q[n + 1].view(children)
            )
            total += terms[tree.ends(n)].sum()
        else:
            discount = gamma**n if objective == "token_return" else 1.0
            total += discount * (tree.reach(n) * tree.rows_divergence(divergence, n)).sum()
    return total


def tree_gradient(tree: Tree, divergence: Divergence, objective: str, gamma: float = 1.0) -> list[Tensor]:
    """`exact_gradient` in the table of logits, on a tree that is already built and with checked arguments."""
    if objective == "sequence":
        return _sequence_gradient(tree, divergence)
    gradient: list[Tensor] = []
    # Discounted sum of the divergences of the rows still to come, from each prefix of the level below.
    to_come = torch.zeros(tree.live[-1].shape, dtype=torch.float64)
    for n in reversed(range(tree.horizon)):
        log_p, reach = tree.log_p[n], tree.reach(n).unsqueeze(-1)
        row = row_gradient(divergence, log_p, tree.log_q[n])
        # `token_local` neither discounts a row nor lets a token answer for the rows that follow.
        if objective == "token_return":
            p, later = log_p.exp(), gamma * to_come.view(log_p.shape)
            mean_later = (p * later).sum(-1, keepdim=True)
            row = gamma**n * (row + p * (later - mean_later))
            to_come = tree.rows_divergence(divergence, n) + mean_later.squeeze(-1)
            to_come = torch.where(tree.live[n], to_come, 0.0)
        gradient.append(torch.where(reach > 0, reach * row, 0.0))
    return gradient[::-1]


def _sequence_gradient(tree: Tree, divergence: Divergence) -> list[Tensor]:
    gradient: list[Tensor] = []
    # E_P[w(U); y passes through the prefix], summed upwards from the complete sequences.
    mass = torch.zeros(tree.live[-1].shape, dtype=torch.float64)
    for n in reversed(range(tree.horizon)):
        shape = tree.log_p[n].shape
        log_p, log_q = tree.prefix_log_p[n + 1], tree.prefix_log_q[n + 1]
        possible = ~torch.isneginf(log_p)
        weight = divergence.weight(torch.where(possible, log_q - log_p, 0.0))
        complete = torch.where(possible, log_p.exp() * weight, 0.0)
        if math.isinf(divergence.slope_at_infinity):
            complete = torch.where(~possible & ~torch.isneginf(log_q), torch.inf, complete)
        complete = complete.view(shape)
        through = torch.where(tree.ends(n), complete, mass.view(shape))
        mass = through.sum(-1)
        if n in tree.environment:
            gradient.append(torch.zeros_like(through))
        else:
            gradient.append(-(through - tree.log_p[n].exp() * mass.unsqueeze(-1)))
    return gradient[::-1]


def full_vocabulary_variance(student: Policy, teacher: Policy, divergence: str | Divergence) -> float:
    r"""Trace of the covariance of one rollout's whole-vocabulary gradient of `token_local` (T7c).

    Given its prefix each row's gradient is known, so only the prefix is random:
    $\sum_h P(h)(1 - P(h))\,|\nabla D_f(h)|^2$ over the rows, which are disjoint parameters.

    Raises:
        InvalidArgumentError: as `exact_gradient`.
    """
    divergence = as_divergence(divergence)
    tree = Tree.build(student, teacher)
    total = 0.0
    for n in range(tree.horizon):
        reach = tree.reach(n)
        norms = row_gradient(divergence, tree.log_p[n], tree.log_q[n]).square().sum(-1)
        total += float(torch.where(reach > 0, reach * (1.0 - reach) * norms, 0.0).sum())
    return total
