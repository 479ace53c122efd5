"""A statement of the theory together with the check that could refute it, and a false twin that it does refute."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ALGEBRA", "Identity", "IdentityResult", "Tally"]

# Exact identities in float64, relative to the larger of one and the numbers compared.
ALGEBRA = 1e-12


class Tally:
    """The largest error met so far, and over how many cases."""

    def __init__(self) -> None:
        self.error = 0.0
        self.cases = 0

    def compare(self, left: Any, right: Any) -> None:
        """Add one case: two tensors, or lists of tensors, that should be equal."""
        lefts, rights = (left, right) if isinstance(left, list) else ([left], [right])
        self.cases += 1
        for a, b in zip(lefts, rights, strict=True):
            size = max(1.0, float(b.abs().max()))
            gap = float((a - b).abs().max()) / size
            self.error = max(self.error, gap if gap == gap else float("inf"))

    def require(self, holds: bool) -> None:
        """Add one case that is either right or wrong."""
        self.cases += 1
        if not holds:
            self.error = float("inf")


@dataclass(frozen=True)
class Identity:
    """One machine-checked identity.

    Attributes:
        theorem: its name in the theory, such as `T1`.
        name: what it says, in a few words.
        statement: the formula, in LaTeX.
        check: measures how far a formula is from the truth on every case it enumerates.
        formula: the claimed right-hand side, in the form that `check` takes.
        twins: false right-hand sides by description; the same check must refute each.
        tolerance: largest error that is rounding.
    """

    theorem: str
    name: str
    statement: str
    check: Callable[[Any], Tally]
    formula: Any
    twins: Mapping[str, Any]
    tolerance: float = ALGEBRA

    def run(self) -> IdentityResult:
        """Check the formula and every twin."""
        start = time.perf_counter()
        tally = self.check(self.formula)
        twins = {description: self.check(twin).error for description, twin in self.twins.items()}
        return IdentityResult(
            theorem=self.theorem,
            name=self.name,
            statement=self.statement,
            error=tally.error,
            tolerance=self.tolerance,
            cases=tally.cases,
            twins=twins,
            seconds=time.perf_counter() - start,
        )


@dataclass(frozen=True)
class IdentityResult:
    """What a check found.

    Attributes:
        theorem: as in `Identity`.
        name: as in `Identity`.
        statement: as in `Identity`.
        error: largest error over all cases.
        tolerance: largest error that is rounding.
        cases: how many comparisons.
        twins: largest error of each false twin.
        seconds: how long it took.
    """

    theorem: str
    name: str
    statement: str
    error: float
    tolerance: float
    cases: int
    twins: dict[str, float]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the identity holds on at least one case, to rounding."""
        return self.cases > 0 and self.error <= self.tolerance

    @property
    def survivors(self) -> list[str]:
        """False twins that the check failed to refute."""
        # A twin must miss by far more than rounding, or the check could not tell.
        return [name for name, error in self.twins.items() if error <= 1e3 * self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether the identity holds and every twin is refuted."""
        return self.holds and not self.survivors and bool(self.twins)
