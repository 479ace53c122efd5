"""Trees of any size: the few levels at the top, and below them some subtrees at a time.

Subtrees are small enough for the caches, which makes this the faster way for trees that fit into memory too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.exact.policies import Policy
from opdtheory.exact.recursions import swept_up, tree_value
from opdtheory.exact.tree import Roots, Tree, check_leaves

__all__ = ["SWEEP_BUDGET", "swept_gradient", "swept_value"]

# Sequences that a sweep may visit: half a minute, and 1 GB for a gradient.
SWEEP_BUDGET = 2**27

# Sequences below the roots that are evaluated at once: a handful of arrays of 512 kB.
_AT_ONCE = 2**16


def swept_value(
    student: Policy, teacher: Policy, divergence: Divergence, objective: str, gamma: float, budget: int
) -> Tensor:
    """`exact_value` on the tree of a pair, with arguments already checked, except the budget."""
    check_leaves(student, budget)
    top = _top(student, teacher)
    total = tree_value(top, divergence, objective, gamma)
    for _, below in _subtrees(student, teacher, top):
        total += tree_value(below, divergence, objective, gamma)
    return total


def swept_gradient(
    student: Policy, teacher: Policy, divergence: Divergence, objective: str, gamma: float, budget: int
) -> list[Tensor]:
    """`exact_gradient` in the table of logits, with arguments as in `swept_value`."""
    check_leaves(student, budget)
    top, size = _top(student, teacher), student.vocab_size
    levels = [torch.zeros(size**n, size, dtype=torch.float64) for n in range(top.horizon, student.horizon)]
    above = torch.zeros(top.live[-1].shape, dtype=torch.float64) if top.cut else None
    for start, subtrees in _subtrees(student, teacher, top):
        swept = swept_up(subtrees, divergence, objective, gamma)
        for whole, part in zip(levels, swept.levels, strict=True):
            first = start * (len(part) // len(subtrees.live[0]))
            whole[first : first + len(part)] = part
        if above is not None and swept.above is not None:
            above[start : start + len(swept.above)] = swept.above
    return swept_up(top, divergence, objective, gamma, above).levels + levels


def _top(student: Policy, teacher: Policy) -> Tree:
    """The levels above the subtrees; all levels of a small tree."""
    size, depth = student.vocab_size, student.horizon
    if size**depth > _AT_ONCE:
        depth -= 1
        while size ** (student.horizon - depth + 1) <= _AT_ONCE:
            depth -= 1
    return _grown(student, teacher, Roots.empty(), 0, 0, depth)


def _subtrees(student: Policy, teacher: Policy, top: Tree) -> Iterator[tuple[int, Tree]]:
    """The number of the first root and the trees below some neighbouring roots, without roots that have all ended."""
    if not top.cut:
        return
    roots = Roots(top.prefix_log_p[-1], top.prefix_log_q[-1], top.prefix_log_u[-1], top.live[-1])
    each = max(1, _AT_ONCE // student.vocab_size ** (student.horizon - top.horizon))
    for start in range(0, len(roots.live), each):
        some = Roots(*(values[start : start + each] for values in roots))
        if some.live.any():
            yield start, _grown(student, teacher, some, start, top.horizon, student.horizon)


def _grown(student: Policy, teacher: Policy, roots: Roots, start: int, first: int, stop: int) -> Tree:
    """The levels `first` to `stop` below some neighbouring prefixes, the first of which has the number `start`."""

    def tables(policy: Policy) -> list[Tensor]:
        widths = (policy.vocab_size ** (n - first) for n in range(first, stop))
        return [policy.rows(first + n, start * w, (start + len(roots.live)) * w) for n, w in enumerate(widths)]

    environment = tuple(n - first for n in student.environment if first <= n < stop)
    cut = stop < student.horizon
    return Tree.grown(tables(student), tables(teacher), roots, student.eos, environment, first, cut)
