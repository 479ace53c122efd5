"""Results that are read by attribute or by key, and turn into plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, TypeAlias

from torch import Tensor

from opdtheory.choices import Granularity, Verdict
from opdtheory.divergences import divergence as as_divergence
from opdtheory.objective import Objective

__all__ = [
    "ABSENT",
    "FINITE_ITEMS",
    "Interval",
    "Count",
    "Finite",
    "Identified",
    "Keyed",
    "Positive",
    "VariableLengths",
    "plain",
]

# Annotations that add to the JSON schema of a field: fragments of the schema itself.
Finite: TypeAlias = Annotated[float, ("type", "number")]
Count: TypeAlias = Annotated[int, ("minimum", 0)]
Positive: TypeAlias = Annotated[int, ("minimum", 1)]
Interval: TypeAlias = tuple[float, float]
FINITE_ITEMS = ("items", {"type": "number"})

# Metadata of a field that is absent, as a key and in JSON, while it is None.
ABSENT = {"absent": True}


class Keyed(Mapping[str, Any]):
    """Base class of frozen dataclasses whose fields are keys too: `result.scale` is `result["scale"]`.

    A field with the metadata `ABSENT` is not a key while it is None.
    """

    def __getitem__(self, key: str) -> Any:
        if key not in list(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        for each in fields(self):  # type: ignore[arg-type]
            if not (each.metadata.get("absent") and getattr(self, each.name) is None):
                yield each.name

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True, eq=False)
class Identified(Keyed):
    """The catalogue objective, or signed sum of a few, that matches a loss's expected gradient best.

    Attributes:
        objective: its catalogue name, or the sum as text.
        granularity: `token_local`, `token_return` or `sequence`.
        parameters: parameters of a family, by name.
        scale: the multiple of its gradient that is nearest to the loss's.
        error: distance at that scale, relative to the loss's gradient: the worst over the panel for a match, the root
            mean square for the nearest miss.
        gamma: the discount, if one was fitted.
        terms: coefficient by catalogue name, for a signed sum.
        evidence: in a sampled audit, where the name comes from and what confirms it.
        fitted: in a sampled audit, the name of the number that was fitted.
        fitted_range: in a sampled audit, the values around the fitted one that no direction excludes.
    """

    objective: str
    granularity: Granularity
    parameters: dict[str, Finite]
    scale: float
    error: float
    gamma: Finite | None = field(default=None, metadata=ABSENT)
    terms: dict[str, Finite] | None = field(default=None, metadata=ABSENT)
    evidence: str | None = field(default=None, metadata=ABSENT)
    fitted: str | None = field(default=None, metadata=ABSENT)
    fitted_range: tuple[Finite, Finite] | None = field(default=None, metadata=ABSENT)

    @classmethod
    def of(cls, found: Objective, scale: float, error: float) -> Identified:
        """The record of an objective followed at a scale; the coefficients of a sum include the scale."""
        gamma = found.gamma if found.discounted else None
        granularity: Any = found.granularity
        if len(found.terms) > 1:
            terms = {d.label: scale * c for c, d in found.terms}
            return cls(found.label, granularity, {}, 1.0, error, gamma, terms)
        named = found.divergence
        return cls(named.name, granularity, {**named.parameters}, scale, error, gamma)

    def read(self) -> Objective:
        """The objective itself, at its own scale."""
        gamma = 1.0 if self.gamma is None else self.gamma
        if self.terms is None:
            return Objective.of(as_divergence(self.objective, **self.parameters), self.granularity, gamma)
        terms = tuple((c, as_divergence(name)) for name, c in self.terms.items())
        return Objective(terms, self.granularity, gamma)

    @property
    def label(self) -> str:
        """The name with its parameters."""
        parameters = ", ".join(f"{key}={value:.6g}" for key, value in self.parameters.items())
        return f"{self.objective}({parameters})" if parameters else self.objective

    @property
    def where(self) -> str:
        """The granularity, with the discount if one was fitted."""
        return self.granularity if self.gamma is None else f"{self.granularity}, gamma={self.gamma:.6g}"


@dataclass(frozen=True, eq=False)
class VariableLengths(Keyed):
    """Whether a finding at fixed length holds when rollouts may end early.

    Attributes:
        verdict: verdict against the objective that the loss follows at fixed length.
        relative_bias: worst over two pairs, at the best scale.
    """

    verdict: Verdict
    relative_bias: float


def plain(value: object) -> Any:
    """The value as `json.dumps` takes it; infinite numbers and NaN become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
