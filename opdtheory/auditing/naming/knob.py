"""The one fitted number of an objective: a family's parameter, a discount, or the ratio of two coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences.registry import Family, parametric
from opdtheory.exact.tree import Tree
from opdtheory.objective import Objective

__all__ = ["Knob", "discount_basis", "discount_nodes", "knob_of"]

# The factor up to which the ratio of two coefficients is varied, either way.
_FAR_RATIO = 100.0


@dataclass(frozen=True)
class Knob:
    """The one fitted number of an objective.

    Attributes:
        name: name of the number.
        value: the fitted value.
        turned: returns the objective with another value.
        low: lower end of the interval that is searched.
        high: upper end of that interval.
    """

    name: str
    value: float
    turned: Callable[[float], Objective]
    low: float
    high: float


def knob_of(objective: Objective) -> Knob | None:
    """The fitted number of an objective, or None if there is none."""
    (first, named), *others = objective.terms
    if others:
        (second, other), *_ = others

        def mixed(ratio: float) -> Objective:
            return replace(objective, terms=((first, named), (first * ratio, other)))

        ratio = second / first
        ends = sorted((ratio / _FAR_RATIO, ratio * _FAR_RATIO))
        return Knob(f"{other.label} per {named.label}", ratio, mixed, ends[0], ends[1])
    if objective.discounted:
        return Knob("gamma", objective.gamma, lambda gamma: replace(objective, gamma=gamma), 0.0, 1.0)
    for family in parametric():
        if named.name == family.name and named.parameters:

            def member(value: float, family: Family = family) -> Objective:
                return Objective.of(family(value), objective.granularity, objective.gamma)

            return Knob(family.parameter, named.parameters[family.parameter], member, *family.sought)
    return None


def discount_nodes(trees: list[Tree]) -> list[float]:
    """Discounts whose gradients determine all others: the gradient is a polynomial of degree below the horizon."""
    nodes: list[float] = np.linspace(0.0, 1.0, max(tree.horizon for tree in trees)).tolist()
    return nodes


def discount_basis(nodes: list[float], gamma: float) -> Float[Tensor, " nodes"]:
    """The weights of the nodes' gradients in the gradient at discount `gamma` (Lagrange)."""
    weights = [math.prod((gamma - m) / (n - m) for m in nodes if m != n) for n in nodes]
    return torch.tensor(weights, dtype=torch.float64)
