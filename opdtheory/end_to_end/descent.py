"""What a trainer descends: the reading and the divergence whose expected gradient is the trainer's, up to a scale."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import optimize
from torch import Tensor

from opdtheory.choices import GRANULARITIES, Granularity
from opdtheory.divergences import Divergence
from opdtheory.divergences.registry import Family, parameter_free, parametric
from opdtheory.end_to_end.claims import claimed_gradient
from opdtheory.end_to_end.played import Played
from opdtheory.end_to_end.readings import DENOMINATORS, KEPT, PLAIN, Denominator, Read, Reading, Shares, shares
from opdtheory.errors import InvalidArgumentError
from opdtheory.objective import Objective

__all__ = ["Descent", "Distance", "descent", "distance", "stopped"]

# Temperatures and parameters are named to this many digits if that is as near.
_DIGITS = 3
_TEMPERATURES = (0.2, 5.0)

# A coefficient of a sum that is this much smaller than the other is rounding.
_ABSENT = 1e-3


@dataclass(frozen=True)
class Distance:
    """How far a gradient is from a multiple of another.

    Attributes:
        scale: the multiple that is nearest.
        error: the distance at that scale, relative to the multiple's length.
        relative_bias: the distance at scale one, relative to the other's length.
        cosine: of the angle between them.
    """

    scale: float
    error: float
    relative_bias: float
    cosine: float


def distance(found: Float[Tensor, "R V"], exact: Float[Tensor, "R V"]) -> Distance:
    """Compare two gradients of the table."""
    size, length, dot = float(exact.norm()), float(found.norm()), float((found * exact).sum())
    if size == 0.0 or length == 0.0:
        return Distance(0.0, float("inf"), length / size if size else float("inf"), 0.0)
    scale = dot / size**2
    error = float((found - scale * exact).norm()) / (abs(scale) * size) if scale else float("inf")
    return Distance(scale, error, float((found - exact).norm()) / size, dot / (size * length))


@dataclass(frozen=True)
class Descent:
    """An objective as read in some way, and its distance from the trainer's gradient.

    Attributes:
        objective: what is descended.
        reading: how the rollouts are read.
        distance: from the trainer's expected gradient.
    """

    objective: Objective
    reading: Reading
    distance: Distance

    def matches(self, tolerance: float) -> bool:
        """Whether the trainer follows it, up to a positive scale and rounding."""
        return self.distance.scale > 0 and self.distance.error <= tolerance


def stopped(followed: Descent) -> bool:
    """Whether a divergence is a detached reward, which descends another one; the reverse KL descends itself (T2)."""
    return followed.reading.stopped and followed.objective.label != "reverse_kl"


class _Search:
    """Gradients of readings; what each reads is looked up once."""

    def __init__(self, played: Played) -> None:
        self.played, self.gradient = played, played.gradient
        self._shares: dict[Reading, Shares] = {}
        self._read: dict[Reading, Read] = {}

    def of(self, reading: Reading, divergence: Divergence) -> Descent:
        key = dataclasses.replace(reading, stopped=False, centred=False)
        if key not in self._read:
            positions = dataclasses.replace(key, student_temperature=1.0, teacher_temperature=1.0)
            if positions not in self._shares:
                self._shares[positions] = shares(self.played, positions)
            self._read[key] = Read.of(self.played, key, self._shares[positions])
        exact = self._read[key].gradient(divergence, reading.stopped, reading.centred)
        return Descent(Objective.of(divergence, self._granularity(divergence)), reading, distance(self.gradient, exact))

    def _granularity(self, divergence: Divergence) -> Granularity:
        """At the teacher's own answers, the forward KL of tokens is that of sequences (T6)."""
        sequence = self.played.pair.teacher_answers and divergence.name == "forward_kl"
        return "sequence" if sequence else "token_local"

    def plain(self, divergence: Divergence) -> Tensor:
        """The gradient of one objective as it should be read."""
        if PLAIN not in self._read:
            self.of(PLAIN, divergence)
        return self._read[PLAIN].gradient(divergence)

    def whole(self, divergence: Divergence, granularity: str) -> Descent:
        exact = claimed_gradient(self.played.pair, divergence, granularity)
        return Descent(Objective.of(divergence, granularity), PLAIN, distance(self.gradient, exact))


def descent(played: Played, claim: Objective, tolerance: float) -> Descent | None:
    """What the trainer descends; if nothing matches, the catalogue objective that is nearest.

    Simple explanations come first: the claim as it is, the claim read in one other way, another objective, the claim
    at another temperature, the claim read in two other ways, a signed sum of two objectives, another objective read in
    another way, a member of a family.

    Args:
        played: the outcomes.
        claim: what is claimed.
        tolerance: the largest error of a match.
    """
    search = _Search(played)
    nearest: Descent | None = None
    for found in _explanations(search, claim):
        if found.matches(tolerance):
            return found
        if found.reading == PLAIN and found.objective.terms == claim.terms and found.distance.error <= tolerance:
            return None  # the claim itself, uphill
        plain = found.reading == PLAIN and found.distance.scale > 0 and len(found.objective.terms) == 1
        if plain and (nearest is None or found.distance.error < nearest.distance.error):
            nearest = found
    return nearest


def _explanations(search: _Search, claim: Objective) -> Iterator[Descent]:
    own = claim.divergence
    others = [entry for entry in parameter_free() if entry != own]
    given = search.played.pair.teacher_answers
    if given and claim.granularity == "sequence":
        yield search.whole(own, "sequence")
    if given or claim.granularity == "token_local":
        yield search.of(PLAIN, own)
        for reading in _once():
            yield search.of(reading, own)
            yield from _other_constants(search, reading, own)
    for entry, granularity in itertools.product([own, *others], GRANULARITIES):
        yield search.of(PLAIN, entry) if granularity == "token_local" else search.whole(entry, granularity)
    for entry in [own, *others]:
        yield search.of(dataclasses.replace(PLAIN, stopped=True), entry)
    yield from _at_temperatures(search, own)
    for reading in _twice():
        yield search.of(reading, own)
        yield from _other_constants(search, reading, own)
    yield from _sums(search, [own, *others])
    for reading, entry in itertools.product(_once(), others):
        yield search.of(reading, entry)
        yield from _other_constants(search, reading, entry)
    for reading in (dataclasses.replace(each, stopped=True) for each in _once()):
        for entry in [own, *others]:
            yield search.of(reading, entry)
    yield from _of_families(search)


def _other_constants(search: _Search, reading: Reading, entry: Divergence) -> Iterator[Descent]:
    """The same with other constants in the advantage, which matter where denominators vary with the tokens."""
    if reading.sampled:
        yield search.of(dataclasses.replace(reading, centred=True), entry)
        if entry.name == "reverse_kl":  # as a detached reward it is itself, but for a constant
            yield search.of(dataclasses.replace(reading, stopped=True), entry)


def _once() -> Iterator[Reading]:
    """Readings with one deviation; that only sampled tokens are scored matters beside a denominator that varies."""
    for denominator in itertools.islice(DENOMINATORS, 1, None):
        yield Reading(denominator=denominator)
        yield Reading(denominator=denominator, sampled=True)
    yield from _positions()


def _positions() -> Iterator[Reading]:
    for keep in itertools.islice(KEPT, 1, None):
        yield Reading(keep=keep)
        yield Reading(keep=keep, sampled=True)
    for shift in (1, -1):
        yield Reading(shift=shift)
        yield Reading(teacher_shift=shift)
        yield Reading(teacher_shift=shift, sampled=True)
    for prompt in (1, -1):
        yield Reading(prompt=prompt)
    yield Reading(after=True)
    for student, teacher in ((True, True), (False, True), (True, False)):
        yield Reading(student_padding=student, teacher_padding=teacher)


def _twice() -> Iterator[Reading]:
    """Another denominator and one more deviation."""
    for reading in _positions():
        for denominator in itertools.islice(DENOMINATORS, 1, None):
            yield dataclasses.replace(reading, denominator=denominator)
    for reading, prompt in itertools.product((Reading(shift=1), Reading(shift=-1)), (0, 1, -1)):
        some: tuple[Denominator, ...] = ("rollouts", "tokens", "micro-batch")
        for denominator, after in itertools.product(some, (False, True)):
            yield dataclasses.replace(reading, denominator=denominator, prompt=prompt, after=after)
    for prompt in (1, -1):
        yield Reading(prompt=prompt, after=True)


def _sums(search: _Search, entries: list[Divergence]) -> Iterator[Descent]:
    """Signed sums of two objectives, as the difference of two KLs that k3 as a reward descends."""
    entries = [entry for entry in entries if entry.name != "jeffreys"]  # a sum itself
    gradients = [search.plain(entry) for entry in entries]
    for (first, one), (second, other) in itertools.combinations(zip(entries, gradients, strict=True), 2):
        both = torch.stack([one.flatten(), other.flatten()], dim=1)
        solution = torch.linalg.lstsq(both, search.gradient.flatten().unsqueeze(-1)).solution.flatten()
        size = float(solution.abs().min())
        if size < _ABSENT * float(solution.abs().max()) or not size:
            continue
        terms = [(float(c) / size, entry) for c, entry in zip(solution, (first, second), strict=True)]
        objective = Objective(tuple(sorted(terms, key=lambda term: -term[0])))
        summed = sum((c * g for (c, _), g in zip(terms, (one, other), strict=True)), torch.zeros_like(one))
        yield Descent(objective, PLAIN, distance(search.gradient, summed))


def _at_temperatures(search: _Search, divergence: Divergence) -> Iterator[Descent]:
    """The claim with softened models: the student, the teacher or both, at the temperature that fits best."""
    for ours, theirs in ((True, True), (True, False), (False, True)):

        def at(value: float, ours: bool = ours, theirs: bool = theirs) -> Descent:
            reading = Reading(student_temperature=value if ours else 1.0, teacher_temperature=value if theirs else 1.0)
            return search.of(reading, divergence)

        yield _fitted(at, *_TEMPERATURES)


def _of_families(search: _Search) -> Iterator[Descent]:
    for family in parametric():
        low, high = family.sought

        def at(value: float, family: Family = family) -> Descent:
            return search.of(PLAIN, family(value))

        try:
            yield _fitted(at, low, high)
        except InvalidArgumentError:
            continue


def _fitted(at: Callable[[float], Descent], low: float, high: float) -> Descent:
    """The best value of a parameter, rounded if that is as good."""

    def error(value: float) -> float:
        found = at(float(value))
        return found.distance.error if found.distance.scale > 0 else 10.0 + found.distance.error

    grid = [low + (high - low) * n / 24 for n in range(1, 24)]
    start = min(grid, key=error)
    step = (high - low) / 24
    best = optimize.minimize_scalar(
        error, bounds=(max(low, start - step), min(high, start + step)), method="bounded", options={"xatol": 1e-10}
    )
    short = round(float(best.x), _DIGITS)
    value = short if error(short) <= max(2 * float(best.fun), 1e-6) else float(best.x)
    return at(value)
