"""What a loss may follow: a catalogue objective, one of a family, one under a discount, or a signed sum of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from opdtheory.auditing.naming.formula import label_of_terms
from opdtheory.auditing.scenario import Case
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.divergences.registry import Family, parametric
from opdtheory.exact import exact_gradient

__all__ = ["Aim", "Knob"]

# How far the ratio of two coefficients is followed, in either direction.
_FAR_RATIO = 100.0


@dataclass(frozen=True)
class Aim:
    r"""An objective $\sum_i c_i J_i$, of one granularity and discount; mostly a single one with $c = 1$.

    Attributes:
        terms: coefficients with their divergences.
        granularity: `token_local`, `token_return` or `sequence`.
        gamma: discount, for `token_return`.
    """

    terms: tuple[tuple[float, Divergence], ...]
    granularity: str
    gamma: float = 1.0

    @classmethod
    def of(cls, divergence: Divergence, granularity: str, gamma: float = 1.0) -> Aim:
        """A single objective."""
        return cls(((1.0, divergence),), granularity, gamma)

    @classmethod
    def read(cls, identified: dict[str, Any]) -> Aim:
        """The objective that an audit's `identified` names, at its own scale."""
        granularity = identified["granularity"]
        if "terms" in identified:
            parts = tuple((c, as_divergence(name)) for name, c in identified["terms"].items())
            return cls(parts, granularity, identified.get("gamma", 1.0))
        named = as_divergence(identified["objective"], **identified["parameters"])
        return cls.of(named, granularity, identified.get("gamma", 1.0))

    @property
    def label(self) -> str:
        """Its name, such as `jsd` or `reverse_kl - forward_kl`."""
        if len(self.terms) == 1:
            return self.terms[0][1].label
        return label_of_terms({d.label: c for c, d in self.terms})

    @property
    def discounted(self) -> bool:
        """Whether the discount says anything."""
        return self.granularity == "token_return" and self.gamma != 1.0

    def gradient(self, case: Case) -> list[Tensor]:
        """Its exact gradient on a pair, by level.

        Raises:
            InvalidArgumentError: it is infinite there.
        """
        parts = [
            [c * level for level in exact_gradient(case.student, case.teacher, d, self.granularity, gamma=self.gamma)]
            for c, d in self.terms
        ]
        return [sum(levels[1:], levels[0]) for levels in zip(*parts, strict=True)]

    def record(self, scale: float, error: float) -> dict[str, Any]:
        """As the `identified` of an audit."""
        discount = {"gamma": self.gamma} if self.discounted else {}
        if len(self.terms) == 1:
            (_, named), terms = self.terms[0], {}
            name, parameters = named.name, {**named.parameters}
        else:
            name, parameters = self.label, {}
            terms = {"terms": {d.label: scale * c for c, d in self.terms}}
            scale = 1.0
        where = {"objective": name, "granularity": self.granularity, "parameters": parameters}
        return {**where, **discount, **terms, "scale": scale, "error": error}

    def knob(self) -> Knob | None:
        """The number in it that was fitted, or None if there is none."""
        (first, named), *others = self.terms
        if others:
            (second, other), *_ = others

            def mixed(ratio: float) -> Aim:
                return replace(self, terms=((first, named), (first * ratio, other)))

            ratio = second / first
            ends = sorted((ratio / _FAR_RATIO, ratio * _FAR_RATIO))
            return Knob(f"{other.label} per {named.label}", ratio, mixed, ends[0], ends[1])
        if self.discounted:
            return Knob("gamma", self.gamma, lambda gamma: replace(self, gamma=gamma), 0.0, 1.0)
        for family in parametric():
            if named.name == family.name and named.parameters:

                def member(value: float, family: Family = family) -> Aim:
                    return Aim.of(family(value), self.granularity, self.gamma)

                return Knob(family.parameter, named.parameters[family.parameter], member, *family.sought)
        return None


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
    turned: Callable[[float], Aim]
    low: float
    high: float
