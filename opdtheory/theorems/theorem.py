"""A statement of the theory: its derivation, the checks that could refute it, and false twins that they do refute."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ALGEBRA", "Identity", "IdentityResult", "Kind", "Step", "StepResult", "Tally", "Theorem", "TheoremResult"]

# Exact identities in float64, relative to the larger of one and the numbers compared.
ALGEBRA = 1e-12

# How a check decides: by sympy, in rational arithmetic, by intervals that enclose both sides, or in float64.
Kind = Literal["symbolic", "exact", "rigorous", "numeric"]


class Tally:
    """The largest error met so far, and over how many cases."""

    def __init__(self) -> None:
        self.error = 0.0
        self.cases = 0

    def compare(self, left: Any, right: Any) -> None:
        """Add one case: two tensors, or lists of tensors, that should be equal in float64."""
        lefts, rights = (left, right) if isinstance(left, list) else ([left], [right])
        self.cases += 1
        for a, b in zip(lefts, rights, strict=True):
            size = max(1.0, float(b.abs().max()))
            gap = float((a - b).abs().max()) / size
            self.error = max(self.error, gap if gap == gap else float("inf"))

    def equal(self, left: Any, right: Any) -> None:
        """Add one case: two exact numbers, or sequences of them, that should be the same."""
        lefts, rights = (left, right) if isinstance(left, (list, tuple)) else ([left], [right])
        self.require(len(lefts) == len(rights) and all(a == b for a, b in zip(lefts, rights, strict=True)))

    def enclose(self, left: Any, right: Any) -> None:
        """Add one case: two `mpmath.iv` intervals that enclose the same number, if the claim is right.

        Disjoint intervals refute it; overlapping ones leave at most their joint width as an error.
        """
        self.cases += 1
        gap = left - right
        low, high = float(gap.a), float(gap.b)  # rounding to float keeps the signs
        width = (high - low) / max(1.0, abs(float(right.a)))
        self.error = max(self.error, width if low <= 0.0 <= high else float("inf"))

    def require(self, holds: bool) -> None:
        """Add one case that is either right or wrong."""
        self.cases += 1
        if not holds:
            self.error = float("inf")


@dataclass(frozen=True)
class Step:
    r"""One step of a derivation.

    Attributes:
        says: the step's formula, in LaTeX.
        why: what it follows from.
        holds: whether the machine confirms it: a difference simplifies to zero, or an inequality is decided.
        in_words: whether `why` is the proof and `holds` confirms a lemma or an instance of it only.
    """

    says: str
    why: str
    holds: Callable[[], bool]
    in_words: bool = False

    def run(self) -> StepResult:
        """Let the machine look at the step."""
        return StepResult(self.says, self.why, bool(self.holds()), self.in_words)


@dataclass(frozen=True)
class StepResult:
    """What became of a step; attributes as in `Step`."""

    says: str
    why: str
    holds: bool
    in_words: bool


@dataclass(frozen=True)
class Identity:
    """One machine-checked claim.

    Attributes:
        theorem: the theorem's number, such as `T1`.
        name: what it says, in a few words.
        statement: the formula, in LaTeX.
        check: measures how far a formula is from the truth on every case it enumerates.
        formula: the claimed right-hand side, in the form that `check` takes.
        twins: false right-hand sides by description; the same check must refute each.
        kind: how the check decides.
        tolerance: largest error that is rounding; 0 where there is none.
    """

    theorem: str
    name: str
    statement: str
    check: Callable[[Any], Tally]
    formula: Any
    twins: Mapping[str, Any]
    kind: Kind = "numeric"
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
            kind=self.kind,
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
        kind: as in `Identity`.
    """

    theorem: str
    name: str
    statement: str
    error: float
    tolerance: float
    cases: int
    twins: dict[str, float]
    seconds: float
    kind: Kind = "numeric"

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


@dataclass(frozen=True)
class Theorem:
    r"""A named statement of the theory.

    Attributes:
        number: such as `T1`.
        name: in a few words.
        statement: in LaTeX and words.
        hypotheses: what it assumes.
        source: the paper or textbook it comes from, or that it was derived here.
        advice: what a practitioner does with it.
        derivation: the steps from the hypotheses to the statement.
        identities: the checks.
    """

    number: str
    name: str
    statement: str
    hypotheses: tuple[str, ...]
    source: str
    advice: str
    derivation: tuple[Step, ...] = ()
    identities: tuple[Identity, ...] = field(default=())

    def run(self) -> TheoremResult:
        """Verify every step and run every check."""
        start = time.perf_counter()
        steps = [step.run() for step in self.derivation]
        results = [identity.run() for identity in self.identities]
        return TheoremResult(self.number, self.name, steps, results, time.perf_counter() - start)


@dataclass(frozen=True)
class TheoremResult:
    """What the checks of a theorem found.

    Attributes:
        number: as in `Theorem`.
        name: as in `Theorem`.
        steps: of the derivation.
        identities: of the checks.
        seconds: how long all took.
    """

    number: str
    name: str
    steps: list[StepResult]
    identities: list[IdentityResult]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every step and identity holds and every twin is refuted."""
        return all(step.holds for step in self.steps) and all(result.passed for result in self.identities)

    def of(self, kind: Kind) -> list[IdentityResult]:
        """The checks of one kind."""
        return [result for result in self.identities if result.kind == kind]
