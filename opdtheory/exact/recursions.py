"""The recursions of the objectives on one tree: what its levels contribute, given what lies below."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.exact.tree import Tree, pointwise, row_gradient

__all__ = ["Swept", "swept_up", "tree_gradient", "tree_value"]


def tree_value(tree: Tree, divergence: Divergence, objective: str, gamma: float = 1.0) -> Tensor:
    """What the levels of a tree contribute to `exact_value`, 0-d."""
    total = torch.zeros((), dtype=torch.float64)
    for n in range(tree.horizon):
        if objective == "sequence":
            total += _complete_terms(tree, divergence, n)
        else:
            discount = gamma ** (tree.first + n) if objective == "token_return" else 1.0
            if gamma == 0.0 and discount == 0.0:
                break
            rows = tree.rows_divergence(divergence, n)
            # A divergence that is infinite stays so, however small its factor.
            total += torch.where(torch.isinf(rows), rows, discount * tree.reach(n) * rows).sum()
    return total


def _complete_terms(tree: Tree, divergence: Divergence, level: int) -> Tensor:
    r"""The terms of $D_f(Q\|P)$ from sequences that end at a level."""
    shape = tree.log_p[level].shape
    log_p, log_q = tree.prefix_log_p[level + 1].view(shape), tree.prefix_log_q[level + 1].view(shape)
    log_u, ends = tree.prefix_log_u[level + 1].view(shape), tree.ends(level)
    if tree.cut or level + 1 < tree.horizon:
        # Above the last level, only one token ends a sequence.
        if tree.eos is None or level in tree.environment:
            return torch.zeros((), dtype=torch.float64)
        log_p, log_q, log_u, ends = (values[:, tree.eos] for values in (log_p, log_q, log_u, ends))
    return torch.where(ends, pointwise(divergence, log_p, log_q, log_u=log_u), 0.0).sum()


class Swept(NamedTuple):
    """What the levels of a tree contribute to the gradient, and what the levels above need.

    Attributes:
        levels: the gradient in the rows of the table.
        above: for each root, the discounted divergences to come (`token_return`) or $E_P[w(U); y$ passes through the
            root$]$ (`sequence`); None for `token_local`, whose rows are independent of each other.
    """

    levels: list[Tensor]
    above: Tensor | None


def swept_up(
    tree: Tree, divergence: Divergence, objective: str, gamma: float = 1.0, below: Tensor | None = None
) -> Swept:
    """The gradient from the last level to the first.

    Args:
        tree: the tree.
        divergence: the divergence.
        objective: one of `OBJECTIVES`.
        gamma: the discount of `token_return`.
        below: for a tree that is cut, the `above` of the trees below, in order.
    """
    if objective == "sequence":
        return _sequence(tree, divergence, below)
    gradient: list[Tensor] = []
    # The discounted sum of the divergences of the rows to come, from each prefix of the level below.
    to_come = torch.zeros(tree.live[-1].shape, dtype=torch.float64) if below is None else below
    for n in reversed(range(tree.horizon)):
        p, reach = tree.log_p[n].exp(), tree.reach(n).unsqueeze(-1)
        row = row_gradient(divergence, tree.log_p[n], tree.log_q[n], p, tree.log_u[n])
        # `token_local` neither discounts a row nor credits a token with the rows that follow.
        if objective == "token_return":
            # At a discount of zero nothing counts that is to come, not even an infinite divergence.
            later = gamma * to_come.view(p.shape) if gamma else torch.zeros_like(p)
            mean_later = (p * later).sum(-1, keepdim=True)
            discount = gamma ** (tree.first + n)
            row = discount * (row + p * (later - mean_later)) if discount or gamma else torch.zeros_like(p)
            to_come = tree.rows_divergence(divergence, n, p) + mean_later.squeeze(-1)
            to_come = torch.where(tree.live[n], to_come, 0.0)
        row = reach * row
        # The row of a prefix that is never reached may be infinite.
        gradient.append(row if math.isfinite(row.sum()) else torch.where(reach > 0, row, 0.0))
    return Swept(gradient[::-1], to_come if objective == "token_return" else None)


def _sequence(tree: Tree, divergence: Divergence, below: Tensor | None) -> Swept:
    gradient: list[Tensor] = []
    # E_P[w(U); y passes through the prefix], summed up from the complete sequences.
    mass = torch.zeros(tree.live[-1].shape, dtype=torch.float64) if below is None else below
    for n in reversed(range(tree.horizon)):
        shape = tree.log_p[n].shape
        log_p, log_q = tree.prefix_log_p[n + 1], tree.prefix_log_q[n + 1]
        possible = ~torch.isneginf(log_p)
        weight = divergence.centred_weight(torch.where(possible, tree.prefix_log_u[n + 1], 0.0))
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
    return Swept(gradient[::-1], mass)


def tree_gradient(tree: Tree, divergence: Divergence, objective: str, gamma: float = 1.0) -> list[Tensor]:
    """`exact_gradient` in the table of logits, on a whole tree and with arguments already checked."""
    return swept_up(tree, divergence, objective, gamma).levels
