"""One thing that a run's tokens say, and what it is said about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from opdtheory.estimators import Estimator
from opdtheory.monitoring.evidence import Evidence
from opdtheory.monitoring.measures import Measured
from opdtheory.monitoring.sums import Number, Sums
from opdtheory.monitoring.weights import Weight

__all__ = ["ALPHA", "CONFIDENCE", "Finding", "Level", "Setting", "share"]

Level = Literal["warning", "note"]

# An interval misses its quantity this rarely, and a test of what is so is wrong as rarely.
ALPHA = 1e-3
CONFIDENCE = 1 - ALPHA


@dataclass(frozen=True)
class Finding:
    """One thing that the tokens say.

    Attributes:
        name: a word for it, such as `collapse`.
        level: `warning` or `note`.
        sentence: what is so and what follows.
        number: the quantity, with its interval.
        quantity: what the number is, with its unit.
        theorem: the theorems that it rests on.
        remedy: what to do; empty if nothing is to be done.
    """

    name: str
    level: Level
    sentence: str
    number: Number
    quantity: str
    theorem: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON values."""
        value, interval = self.number.value, self.number.interval
        return {
            "name": self.name,
            "level": self.level,
            "sentence": self.sentence,
            "number": value if math.isfinite(value) else None,
            "interval": None if interval is None else list(interval),
            "quantity": self.quantity,
            "theorem": self.theorem,
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class Setting:
    """What the findings are about.

    Attributes:
        loss: the estimator in use.
        weight: the weight that it gives a token.
        evidence: the sums of its tokens.
        measured: the weight on these tokens.
        batch_tokens: the tokens of one optimiser step.
    """

    loss: Estimator
    weight: Weight
    evidence: Evidence
    measured: Measured
    batch_tokens: float

    @property
    def importance(self) -> str | None:
        """The importance weights of the estimator."""
        found = self.loss.settings.get("importance")
        return None if found is None else str(found)

    @property
    def sums(self) -> Sums:
        """The sums that the estimator sees, with its importance weights."""
        return self.evidence.as_corrected(self.importance)

    @property
    def label(self) -> str:
        """The estimator in use."""
        return self.loss.label

    @property
    def divergence(self) -> str:
        """The label of the divergence that it is for."""
        return self.loss.claim.divergence.label


def share(number: Number) -> str:
    """A share in per cent, as sentences say it."""
    percent = 100 * number.value
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"
