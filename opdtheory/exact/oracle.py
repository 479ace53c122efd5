"""Exact values and gradients of the three objectives (theory: the table of objectives, T1, T6)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import GRANULARITIES
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import chain
from opdtheory.exact.finite_state import FiniteStatePolicy
from opdtheory.exact.policies import Policy
from opdtheory.exact.recursions import tree_gradient
from opdtheory.exact.subtrees import SWEEP_BUDGET, swept_gradient, swept_value
from opdtheory.exact.tree import Tree, check_pair, row_gradient
from opdtheory.objective import check_objective

__all__ = [
    "OBJECTIVES",
    "exact_gradient",
    "exact_value",
    "full_vocabulary_variance",
    "tree_gradient",
]

# The contract's word here for what an audit calls a granularity.
OBJECTIVES = GRANULARITIES


def exact_value(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    objective: str = "token_local",
    gamma: float = 1.0,
    budget: int = SWEEP_BUDGET,
) -> Float[Tensor, ""]:
    r"""The objective itself, in nats for the KL divergences, by a sweep over the prefix tree.

    $$\textstyle \sum_n E_{h_n\sim p} D_f(q\|p)(h_n), \quad E_p\sum_n\gamma^{n-1} f(u_n), \quad D_f(Q\|P)$$

    for `token_local`, `token_return` and `sequence`. Tokens that an environment wrote add nothing but count as
    positions of the discount (T6f). Two `FiniteStatePolicy` are handled by dynamic programming, at any horizon.

    Args:
        student: the policy `p`.
        teacher: the policy `q`.
        divergence: an object or a catalogue name.
        objective: `token_local`, `token_return` or `sequence`.
        gamma: the discount of `token_return`.
        budget: the largest number of sequences to enumerate.

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
        if isinstance(student, FiniteStatePolicy) and isinstance(teacher, FiniteStatePolicy):
            return chain.value(student, teacher, divergence, objective, gamma)
        return swept_value(student, teacher, divergence, objective, gamma, budget)


def exact_gradient(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    objective: str = "token_local",
    gamma: float = 1.0,
    budget: int = SWEEP_BUDGET,
) -> list[Tensor]:
    r"""The gradient to descend, in closed form: $-E_p[\sum_n A_n s_n]$ with the exact weight $A_n$.

    $A_n$ is $w_f(u_n)$ for `token_local` (T1), $\gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n}f(u_m)]$ for
    `token_return` and $w_f(U)$ for `sequence` (T6). It is exactly zero where an environment writes.

    Args:
        student: the policy `p`.
        teacher: the policy `q`.
        divergence: an object or a catalogue name.
        objective: `token_local`, `token_return` or `sequence`.
        gamma: the discount of `token_return`.
        budget: the largest number of sequences to enumerate.

    Returns:
        A list like `student.parameters()` (for a `TabularPolicy`, like `student.logits`), with the sign that
        `loss.backward()` would leave.

    Raises:
        InvalidArgumentError: a wrong name, policies that do not match, or a divergence that is infinite between them
            and so has no gradient.
        BudgetExceededError: more sequences than `budget`.
    """
    divergence = as_divergence(divergence)
    check_objective(objective, gamma)
    check_pair(student, teacher)
    if isinstance(student, FiniteStatePolicy) and isinstance(teacher, FiniteStatePolicy):
        with torch.no_grad():
            gradient = chain.gradient(student, teacher, divergence, objective, gamma)
    else:
        with torch.no_grad():
            levels = swept_gradient(student, teacher, divergence, objective, gamma, budget)
        gradient = student.pull_back(levels)
    # A sum is finite only if its terms are, and takes no memory; where it overflows, the terms decide.
    if not all(math.isfinite(g.sum()) or bool(torch.isfinite(g).all()) for g in gradient):
        raise InvalidArgumentError(
            "divergence",
            f"{divergence.label} between these policies is infinite or overflows: a token has zero or vanishing "
            "probability under one of them only (T10)",
        )
    return gradient


def full_vocabulary_variance(student: Policy, teacher: Policy, divergence: str | Divergence) -> float:
    r"""Trace of the covariance of one rollout's whole-vocabulary gradient of `token_local` (T7c).

    Given its prefix, the gradient of each row is known, so that only the prefix is random:
    $\sum_h P(h)(1 - P(h))\,|\nabla D_f(h)|^2$ over the rows, which are disjoint parameters.

    Raises:
        InvalidArgumentError: as `exact_gradient`.
    """
    divergence = as_divergence(divergence)
    tree = Tree.build(student, teacher)
    total = 0.0
    for n in range(tree.horizon):
        reach = tree.reach(n)
        norms = row_gradient(divergence, tree.log_p[n], tree.log_q[n], log_u=tree.log_u[n]).square().sum(-1)
        total += float(torch.where(reach > 0, reach * (1.0 - reach) * norms, 0.0).sum())
    return total
