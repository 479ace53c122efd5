"""A theorem: its derivation, the checks that could refute it, and the false twins that they do refute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import sympy

__all__ = [
    "ALGEBRA",
    "Cases",
    "Comparison",
    "Identity",
    "IdentityResult",
    "Kind",
    "Step",
    "StepResult",
    "Theorem",
    "TheoremResult",
    "close",
    "furthest",
    "holds",
    "overlap",
    "same",
]

# Exact identities in float64, relative to the larger of one and the numbers compared.
ALGEBRA = 1e-12

# How a check decides: by sympy, in rational arithmetic, by intervals that enclose both sides, or in float64.
Kind = Literal["symbolic", "exact", "rigorous", "numeric"]
_TOLERANCES: dict[Kind, float] = {"symbolic": 0.0, "exact": 0.0, "rigorous": 0.0, "numeric": ALGEBRA}


@dataclass(frozen=True)
class Comparison:
    """One case of a check: how far apart its two sides are, and where.

    Attributes:
        error: the distance; 0 or infinity where nothing is rounded.
        where: what identifies the case, such as a divergence, a pair of policies, a step.
    """

    error: float
    where: tuple[object, ...] = ()

    @property
    def label(self) -> str:
        """The case in words: `chi2, 3 tokens x 3 steps, gamma 0.6`."""
        return ", ".join(filter(None, map(_named, self.where)))


Cases: TypeAlias = Iterator[Comparison]


def close(left: Any, right: Any, *where: object) -> Comparison:
    """Compare two tensors, or two lists of tensors, that should be equal in float64.

    The error is relative to the largest number on the right, or to one if all are smaller; NaN is infinitely far, and
    so are tensors of different shapes.
    """
    lefts, rights = (left, right) if isinstance(left, list) else ([left], [right])
    error = 0.0
    for a, b in zip(lefts, rights, strict=True):
        gap = float((a - b).abs().max()) / max(1.0, float(b.abs().max())) if a.shape == b.shape else math.inf
        error = max(error, gap if gap == gap else math.inf)
    return Comparison(error, where)


def same(left: Any, right: Any, *where: object) -> Comparison:
    """Compare two exact numbers, or two sequences of them, that should be equal."""
    lefts, rights = (left, right) if isinstance(left, (list, tuple)) else ([left], [right])
    return holds(len(lefts) == len(rights) and all(a == b for a, b in zip(lefts, rights, strict=True)), *where)


def overlap(left: Any, right: Any, *where: object) -> Comparison:
    """Compare two `mpmath.iv` intervals that enclose the same number if the claim is right.

    Disjoint intervals refute it; overlapping ones leave at most their joint width as an error.
    """
    gap = left - right
    low, high = float(gap.a), float(gap.b)  # rounding to float keeps the signs
    width = (high - low) / max(1.0, abs(float(right.a)))
    return Comparison(width if low <= 0.0 <= high else math.inf, where)


def holds(statement: bool, *where: object) -> Comparison:
    """Record a statement that is either right or wrong."""
    return Comparison(0.0 if statement else math.inf, where)


def _named(value: Any) -> str:
    """A part of a label; empty for what has no short name, such as a tensor."""
    label = getattr(value, "label", None)
    if isinstance(label, str):
        return label
    if isinstance(value, (str, bool, int, float, Fraction, sympy.Basic)):
        return str(value)
    if isinstance(value, (tuple, list)):
        parts = [_named(part) for part in value]
        if value and hasattr(value[0], "vocab_size"):
            return parts[0]  # both policies of a pair have the same sizes
        return f"({', '.join(parts)})" if all(parts) else ""
    if hasattr(value, "vocab_size"):
        ends = "" if value.eos is None else f", eos {value.eos}"
        return f"{value.vocab_size} tokens x {value.horizon} steps{ends}"
    return ""


@dataclass(frozen=True)
class Step:
    r"""One step of a derivation.

    Attributes:
        says: the step's formula, in LaTeX.
        why: what it follows from, in whole sentences.
        holds: whether the machine confirms it: a difference simplifies to zero, or an inequality is decided.
        in_words: whether `why` is the proof, and `holds` confirms only a lemma or an instance of it.
    """

    says: str
    why: str
    holds: Callable[[], bool]
    in_words: bool = False

    def run(self) -> StepResult:
        """Ask the machine to confirm the step."""
        return StepResult(self.says, self.why, bool(self.holds()), self.in_words)


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step; attributes as in `Step`."""

    says: str
    why: str
    holds: bool
    in_words: bool


@dataclass(frozen=True)
class Identity:
    """One machine-checked claim.

    Attributes:
        name: what it says, in a few words.
        statement: the formula, in LaTeX.
        check: yields, for each case it enumerates, how far a formula is from the truth.
        formula: the claimed right-hand side, in the form that `check` takes.
        twins: false right-hand sides by description; the same check must refute each.
        kind: how the check decides.
        tolerance: largest error that is rounding (default: `ALGEBRA` in float64, else 0).
    """

    name: str
    statement: str
    check: Callable[[Any], Cases]
    formula: Any
    twins: Mapping[str, Any]
    kind: Kind = "numeric"
    tolerance: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.tolerance):
            object.__setattr__(self, "tolerance", _TOLERANCES[self.kind])

    def run(self, theorem: str = "") -> IdentityResult:
        """Check the formula and every twin; `theorem` is the number to report."""
        start = time.perf_counter()
        cases = list(self.check(self.formula))
        worst = max(cases, key=lambda case: case.error, default=Comparison(0.0))
        return IdentityResult(
            theorem=theorem,
            name=self.name,
            statement=self.statement,
            error=worst.error,
            tolerance=self.tolerance,
            cases=len(cases),
            twins={description: furthest(self.check(twin)) for description, twin in self.twins.items()},
            seconds=time.perf_counter() - start,
            kind=self.kind,
            worst=worst.label if worst.error > 0.0 else "",
        )


def furthest(cases: Cases) -> float:
    """The largest error. The search stops at infinity, which no later case can exceed."""
    error = 0.0
    for case in cases:
        error = max(error, case.error)
        if error == math.inf:
            break
    return error


@dataclass(frozen=True)
class IdentityResult:
    """What a check found.

    Attributes:
        theorem: the theorem's number, such as `T1`.
        name: as in `Identity`.
        statement: as in `Identity`.
        error: the largest error over all cases.
        tolerance: as in `Identity`.
        cases: number of comparisons.
        twins: the largest error of each false twin; a check may stop at the first infinite one.
        seconds: how long it took.
        kind: as in `Identity`.
        worst: the case with the largest error; empty if every error is zero.
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
    worst: str = ""

    @property
    def holds(self) -> bool:
        """Whether the identity holds to rounding, on one case or more."""
        return self.cases > 0 and self.error <= self.tolerance

    @property
    def failure(self) -> str:
        """Where the identity fails, `worst: chi2, gamma 0.6`; empty if it holds or the case has no label."""
        return f"worst: {self.worst}" if self.worst and not self.holds else ""

    @property
    def survivors(self) -> list[str]:
        """The false twins that the check failed to refute."""
        # A twin must miss by far more than rounding, or the check could not tell it from the formula.
        return [name for name, error in self.twins.items() if error <= 1e3 * self.tolerance]

    @property
    def passed(self) -> bool:
        """Whether the identity holds and every twin is refuted."""
        return self.holds and not self.survivors and bool(self.twins)


@dataclass(frozen=True)
class Theorem:
    r"""A named statement of the theory.

    Formulas in `meaning`, `hypotheses`, `advice` and the steps' `why` stand between dollar signs, in LaTeX.

    Attributes:
        number: such as `T1`.
        name: in a few words.
        meaning: what it says, in one to three sentences that a student can follow.
        statement: in LaTeX and words; a semicolon and a wide space end a line.
        hypotheses: what it assumes.
        source: the paper or textbook it comes from, or "derived here".
        advice: what a practitioner should do about it.
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
    identities: tuple[Identity, ...] = ()
    meaning: str = ""

    def run(self) -> TheoremResult:
        """Verify every step and run every check."""
        start = time.perf_counter()
        steps = [step.run() for step in self.derivation]
        results = [identity.run(self.number) for identity in self.identities]
        return TheoremResult(self.number, self.name, steps, results, time.perf_counter() - start)


@dataclass(frozen=True)
class TheoremResult:
    """What the steps and checks of a theorem found.

    Attributes:
        number: as in `Theorem`.
        name: as in `Theorem`.
        steps: one result per step of the derivation.
        identities: one result per check.
        seconds: how long all of them took.
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
