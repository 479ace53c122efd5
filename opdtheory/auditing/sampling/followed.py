"""The name of what a sampled loss follows: a conjecture from small batches or samples, confirmed on fresh samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from opdtheory.auditing.black_box import BlackBox
from opdtheory.auditing.naming.knob import knob_of
from opdtheory.auditing.records import Identified
from opdtheory.auditing.sampling.fitting import fitted, knob_range, shortened
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.sampling.scout import SIZES, Scout, scouted
from opdtheory.auditing.scenario import Scenario
from opdtheory.choices import FAITHFUL, GRANULARITIES
from opdtheory.errors import InvalidArgumentError, OpdTheoryError
from opdtheory.objective import Objective

__all__ = ["CONFIRMATIONS", "Named", "name_followed", "small_batch"]

# The most fresh streams for conjectures fitted to samples, and the most conjectures tried per fit.
_ROUNDS = 4
_TRIED = 3

# The most fresh streams of one audit: for the conjecture from small batches and those that coincide with it, for the
# nearest catalogue entry, and for what is fitted.
CONFIRMATIONS = len(GRANULARITIES) + 1 + _ROUNDS

# A bias certified below this, as of noise-free samples, leaves no room for a neighbour.
_SHARP = 1e-6

# Gradients that differ by less than this, relative to their length, are equal.
_SAME = 1e-9


@dataclass(frozen=True)
class Named:
    """An objective that fresh samples confirm.

    Attributes:
        objective: the objective.
        identified: its record, with `evidence` and, if a number was fitted, `fitted` and `fitted_range`.
        batches: number of calls of the loss.
    """

    objective: Objective
    identified: Identified
    batches: int


def small_batch(loss: BlackBox, granularity: str, scenario: Scenario) -> Scout | None:
    """The exact findings at the smallest batch size that the loss accepts, below the scenario's; None if none does."""
    for size in (s for s in SIZES if s < scenario.batch_size):
        smaller = replace(scenario, batch_size=size)
        try:
            cases = smaller.pairs()[1:4:2]
        except OpdTheoryError:
            return None
        if (found := scouted(loss, cases, granularity, smaller)) is not None:
            return found
    return None


def name_followed(
    search: Search, scout: Scout | None, restart: Callable[[Objective, int], Search], batch_size: int, margin: float
) -> Named | None:
    """Name what a biased loss follows at the requested batch size, or return None if nothing is confirmed.

    Args:
        search: the search that found it biased.
        scout: the exact findings at a smaller batch size.
        restart: starts a search for an objective on fresh draws, whose seed depends on a number.
        batch_size: the requested batch size.
        margin: relative bias in every direction below which an objective is confirmed.
    """
    spent = 0
    if scout is not None and scout.objective is not None:
        found = _confirmed(restart, scout.objective, 1, margin)
        spent += found.batches
        # The reverse KL's return and sequence objectives coincide (T6c): the one with less noise is kept.
        for number, alike in enumerate(_coincident(scout.objective, search) if _SHARP < found.error <= margin else []):
            other = _confirmed(restart, alike, 10 + number, margin)
            spent += other.batches
            found = other if other.error < found.error else found
        if found.error <= margin:
            source = f"conjectured from batches of {scout.batch_size}, which were enumerated"
            return _named(found, source, batch_size, spent)
    best, source = None, "fitted to samples"
    if (plain := search.plain_name(margin)) is not None:
        best = _confirmed(restart, plain.read(), 2, margin)
        source = "the nearest catalogue entry to the samples"
        spent += best.batches
    if best is None or best.error > _SHARP:
        refined = _refined(search, restart, margin)
        spent += 0 if refined is None else refined.batches
        # A neighbour with a fitted number must be much nearer than the entry without one.
        if refined is not None and (best is None or refined.error < 0.1 * best.error):
            best, source = refined, "fitted to samples"
    return None if best is None or best.error > margin else _named(best, source, batch_size, spent)


@dataclass(frozen=True)
class _Confirmation:
    """What fresh samples say about an objective; the error is infinite if they refute it."""

    search: Search
    scale: float
    error: float
    batches: int


def _confirmed(
    restart: Callable[[Objective, int], Search], objective: Objective, number: int, margin: float
) -> _Confirmation:
    search = restart(objective, number)
    verdict = search.run(margin)
    certified = search.certify() if verdict in FAITHFUL else None
    scale, error = (math.nan, math.inf) if certified is None else certified
    return _Confirmation(search, scale, error, search.batches)


def _coincident(objective: Objective, search: Search) -> list[Objective]:
    """The same divergences at other granularities, if their gradients are equal."""
    if objective.discounted:
        return []
    mine = search.targets(objective)
    others = [replace(objective, granularity=where) for where in GRANULARITIES if where != objective.granularity]
    return [
        other
        for other in others
        if all(
            float((a.vector - b.vector).norm()) <= _SAME * a.size
            for a, b in zip(mine, search.targets(other), strict=True)
        )
    ]


def _refined(search: Search, restart: Callable[[Objective, int], Search], margin: float) -> _Confirmation | None:
    """Fit an objective, draw with it as a control, which reduces the noise, and fit again."""
    best: _Confirmation | None = None
    spent, current = 0, search
    seen: set[Objective] = set()
    for number in range(_ROUNDS):
        objective = _candidate(current)
        if objective is None or objective in seen:
            break
        seen.add(objective)
        try:
            found = _confirmed(restart, objective, 3 + number, margin)
        except InvalidArgumentError:
            break
        spent, current = spent + found.batches, found.search
        if best is None or found.error < best.error:
            best = found
        if best.error <= _SHARP:
            break
    return None if best is None else _Confirmation(best.search, best.scale, best.error, spent)


def _candidate(search: Search) -> Objective | None:
    """The nearest fit that the search does not exclude, with its number as short as the search allows."""
    for objective in fitted(search)[:_TRIED]:
        if not search.excludes(objective):
            knob = knob_of(objective)
            return objective if knob is None else knob.turned(shortened(knob, knob_range(search, knob)))
    return None


def _named(found: _Confirmation, source: str, batch_size: int, spent: int) -> Named:
    search, objective = found.search, found.search.objective
    evidence = f"{source}; confirmed at batch size {batch_size} on {search.rollouts:,} fresh rollouts"
    if search.hidden is not None:
        evidence += f", where a difference in fewer than {100 * search.unseen:.2g}% of calls may be unseen"
    identified = replace(Identified.of(objective, found.scale, found.error), evidence=evidence)
    if (knob := knob_of(objective)) is not None:
        identified = replace(identified, fitted=knob.name, fitted_range=knob_range(search, knob))
    return Named(objective, identified, spent)
