"""What a trainer is asked: the claim, and the settings in which it is held to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opdtheory.choices import HISTORIES, METHODS, Histories
from opdtheory.end_to_end.claims import claimed_gradient
from opdtheory.end_to_end.odometer import Draws
from opdtheory.end_to_end.pair import TrainerPair
from opdtheory.end_to_end.played import Played
from opdtheory.end_to_end.readings import PLAIN, Reading, gradient_of
from opdtheory.errors import InvalidArgumentError, check_between
from opdtheory.objective import Objective

__all__ = ["Asked", "Player", "claimed"]

Player = Callable[[TrainerPair, Draws | None], Played]


@dataclass(frozen=True)
class Asked:
    """The claim, and how it is asked.

    Attributes:
        claim: the objective.
        histories: whose prefixes it is about.
        variants: whether other settings are asked too.
        tolerance: relative error that counts as rounding.
        settings: arguments of `trainer_pair`.
        method: `exact`, `monte_carlo`, or `auto`: exact where the outcomes fit the budget.
    """

    claim: Objective
    histories: Histories
    variants: bool
    tolerance: float
    settings: dict[str, Any]
    method: str = "auto"

    def __post_init__(self) -> None:
        check_between("tolerance", self.tolerance, 0.0, 1.0)
        if self.method not in METHODS:
            raise InvalidArgumentError("method", f"must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.histories not in HISTORIES:
            raise InvalidArgumentError("histories", f"must be one of {', '.join(HISTORIES)}, got {self.histories!r}")


def claimed(played: Played, asked: Asked, reading: Reading) -> Tensor:
    """The claimed gradient: by the oracle, or at the sampler's histories, or as the mean that is claimed."""
    divergence = asked.claim.divergence
    if reading == PLAIN and (asked.claim.granularity != "token_local" or asked.histories == "student"):
        return claimed_gradient(played.pair, divergence, asked.claim.granularity)
    return gradient_of(played, reading, asked.claim)
