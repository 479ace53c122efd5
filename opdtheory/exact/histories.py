r"""The token-local objective at other histories than the student's, and between softened distributions (T15, T16)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import check_between
from opdtheory.exact.policies import Policy
from opdtheory.exact.recursions import tree_gradient
from opdtheory.exact.tree import LEAF_BUDGET, Roots, Tree, check_leaves, check_pair

__all__ = ["local_gradient", "local_tree"]


def local_gradient(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    histories: Policy | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> list[Tensor]:
    r"""The exact gradient of $\sum_n E_{h_n\sim\mathrm{sg}(\nu)} D_f(q_\sigma(\cdot|h_n)\,\|\,p_\tau(\cdot|h_n))$.

    The histories are those of a policy $\nu$, which is not differentiated. The distributions are softened,
    $p_\tau = \mathrm{softmax}(z_p/\tau)$ and $q_\sigma = \mathrm{softmax}(z_q/\sigma)$, and the gradient is the one in
    the student's own logits $z_p$, which carries $1/\tau$; no factor $\tau^2$ is put in.

    Args:
        student: the policy `p`.
        teacher: the policy `q`.
        divergence: an object, a catalogue name or a sum.
        histories: the policy that draws the prefixes (default: the student at temperature one).
        student_temperature: $\tau$, above 0.
        teacher_temperature: $\sigma$, above 0.

    Returns:
        A list like `student.tables()`.

    Raises:
        InvalidArgumentError: a wrong name, a temperature that is not above 0, or policies that do not match.
        BudgetExceededError: more than $2^{24}$ sequences.

    Example:
        >>> import opdtheory as opd
        >>> pair = opd.random_pair(3, 2)
        >>> plain = opd.exact_gradient(*pair, "jsd")
        >>> max(float((a - b).abs().max()) for a, b in zip(local_gradient(*pair, "jsd"), plain)) < 1e-15
        True
    """
    divergence = as_divergence(divergence)
    with torch.no_grad():
        tree = local_tree(student, teacher, histories, student_temperature, teacher_temperature)
        levels = tree_gradient(tree, divergence, "token_local")
    return [level / student_temperature for level in levels]


def local_tree(
    student: Policy,
    teacher: Policy,
    histories: Policy | None = None,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> Tree:
    """The tree of the softened pair whose prefixes have the probabilities of `histories`; see `local_gradient`.

    Only its token-local objective has a meaning: the prefixes' probabilities are not the student's.

    Raises:
        InvalidArgumentError: as `local_gradient`.
        BudgetExceededError: as `local_gradient`.
    """
    check_between("student_temperature", student_temperature)
    check_between("teacher_temperature", teacher_temperature)
    visiting = student if histories is None else histories
    check_pair(student, teacher)
    check_pair(student, visiting, "histories")
    check_leaves(student, LEAF_BUDGET)
    roots = Roots.empty()
    tables = [z.detach() / student_temperature for z in student.tables()]
    theirs = [z.detach() / teacher_temperature for z in teacher.tables()]
    softened = Tree.grown(tables, theirs, roots, student.eos, student.environment)
    return replace(softened, prefix_log_p=Tree.build(visiting, visiting).prefix_log_p)
