"""The one fitted number of an objective: a family's parameter, a discount, or the ratio of two coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from opdtheory.divergences.registry import Family, parametric
from opdtheory.objective import Objective

__all__ = ["Knob", "knob_of"]

# How far the ratio of two coefficients is followed, in either direction.
_FAR_RATIO = 100.0


@dataclass(frozen=True)
class Knob:
    """The one fitted number of an objective.

    Attributes:
        name: what it is.
        value: what was fitted.
        turned: the objective with another value.
        low: end of the interval in which it is sought.
        high: its other end.
    """

    name: str
    value: float
    turned: Callable[[float], Objective]
    low: float
    high: float


def knob_of(objective: Objective) -> Knob | None:
    """The number in an objective that was fitted, or None if there is none."""
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
