"""The name of what a sampled loss follows: a conjecture from small batches or from the samples, then fresh samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opdtheory.auditing.black_box import BlackBox
from opdtheory.auditing.naming.objective import Aim
from opdtheory.auditing.sampling.fitting import fitted, knob_range, shortened
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.sampling.scout import SIZES, Scout, scouted
from opdtheory.auditing.scenario import Case
from opdtheory.errors import InvalidArgumentError, OpdTheoryError
from opdtheory.exact import OBJECTIVES

__all__ = ["Named", "name_followed", "small_batch"]

# Fresh streams that may be spent on conjectures fitted to samples, and how many of one fit are tried.
_ROUNDS = 4
_TRIED = 3

# Bias certified below this leaves no room for a neighbour: noise-free samples, to rounding.
_SHARP = 1e-6

# Gradients that differ by less, relative to their length, are the same.
_SAME = 1e-9


@dataclass(frozen=True)
class Named:
    """An objective that fresh samples confirm.

    Attributes:
        aim: the objective.
        identified: as of an audit, with `evidence` and, where a number was fitted, `fitted` and `fitted_range`.
        batches: calls of the loss that it took.
    """

    aim: Aim
    identified: dict[str, Any]
    batches: int


def small_batch(
    loss: BlackBox, panel: Callable[[int], list[Case]], granularity: str, batch_size: int, off_policy: float, seed: int,
    shared: bool,
) -> Scout | None:  # fmt: skip
    """The exact findings at the smallest batch size that the loss takes, below the one asked for, or None.

    Args:
        loss: the black box.
        panel: makes pairs for a batch size.
        granularity: named when several coincide.
        batch_size: the size asked for.
        off_policy: noise of the sampling policy's logits.
        seed: of the bandits.
        shared: whether the rollouts of a batch answer one prompt.
    """
    for size in (s for s in SIZES if s < batch_size):
        try:
            cases = panel(size)[1:4:2]
        except OpdTheoryError:
            return None
        if (found := scouted(loss, cases, granularity, size, off_policy, seed, shared)) is not None:
            return found
    return None


def name_followed(
    search: Search, scout: Scout | None, restart: Callable[[Aim, int], Search], batch_size: int, margin: float
) -> Named | None:
    """Name what a biased loss follows at the batch size asked for, or None where nothing is confirmed.

    Args:
        search: the one that found it biased.
        scout: exact findings at a smaller batch size.
        restart: a search of its own draws for an objective, by a number that sets it apart.
        batch_size: the size asked for.
        margin: relative bias in every direction below which an objective is confirmed.
    """
    spent = 0
    if scout is not None and scout.aim is not None:
        found = _confirmed(restart, scout.aim, 1, margin)
        spent += found.batches
        # The reverse KL's return is its sequence objective (T6c): whichever estimator leaves less noise says more.
        for number, alike in enumerate(_coincident(scout.aim, search) if _SHARP < found.error <= margin else []):
            other = _confirmed(restart, alike, 10 + number, margin)
            spent += other.batches
            found = other if other.error < found.error else found
        if found.error <= margin:
            source = f"conjectured from batches of {scout.batch_size}, which were enumerated"
            return _named(found, source, batch_size, spent)
    best, source = None, "fitted to samples"
    if (plain := search.plain_name(margin)) is not None:
        best = _confirmed(restart, Aim.read({**plain, "parameters": {}}), 2, margin)
        source = "the nearest catalogue entry to the samples"
        spent += best.batches
    if best is None or best.error > _SHARP:
        refined = _refined(search, restart, margin)
        spent += 0 if refined is None else refined.batches
        # A neighbour with a number of its own must be nearer by far than the entry without one.
        if refined is not None and (best is None or refined.error < 0.1 * best.error):
            best, source = refined, "fitted to samples"
    return None if best is None or best.error > margin else _named(best, source, batch_size, spent)


@dataclass(frozen=True)
class _Confirmation:
    """What fresh samples say of an objective: the error is infinite where they refute it."""

    search: Search
    scale: float
    error: float
    batches: int


def _confirmed(restart: Callable[[Aim, int], Search], aim: Aim, number: int, margin: float) -> _Confirmation:
    search = restart(aim, number)
    verdict = search.run(margin)
    certified = search.certify() if verdict in ("exact", "exact_up_to_scale") else None
    scale, error = (math.nan, math.inf) if certified is None else certified
    return _Confirmation(search, scale, error, search.batches)


def _coincident(aim: Aim, search: Search) -> list[Aim]:
    """The same divergences at other granularities, where these have the same gradients."""
    mine = search.targets(aim)
    others = [replace(aim, granularity=where) for where in OBJECTIVES if where != aim.granularity]
    return [
        other
        for other in others
        if not aim.discounted
        and all(
            float((a.vector - b.vector).norm()) <= _SAME * a.size
            for a, b in zip(mine, search.targets(other), strict=True)
        )
    ]


def _refined(search: Search, restart: Callable[[Aim, int], Search], margin: float) -> _Confirmation | None:
    """Fit, draw with what was fitted as control, which leaves less noise, and fit again."""
    best: _Confirmation | None = None
    spent, current = 0, search
    seen: set[Aim] = set()
    for number in range(_ROUNDS):
        aim = _candidate(current)
        if aim is None or aim in seen:
            break
        seen.add(aim)
        try:
            found = _confirmed(restart, aim, 3 + number, margin)
        except InvalidArgumentError:
            break
        spent, current = spent + found.batches, found.search
        if best is None or found.error < best.error:
            best = found
        if best.error <= _SHARP:
            break
    return None if best is None else _Confirmation(best.search, best.scale, best.error, spent)


def _candidate(search: Search) -> Aim | None:
    """The nearest fit that the search does not exclude, its number the shortest that it does not exclude either."""
    for aim in fitted(search)[:_TRIED]:
        if not search.excludes(aim):
            knob = aim.knob()
            return aim if knob is None else knob.turned(shortened(knob, knob_range(search, knob)))
    return None


def _named(found: _Confirmation, source: str, batch_size: int, spent: int) -> Named:
    search, aim = found.search, found.search.aim
    identified = aim.record(found.scale, found.error)
    sure = f"{100 * search.confidence:g}%"
    evidence = f"{source}; confirmed at batch size {batch_size} on {search.rollouts:,} fresh rollouts at {sure}"
    if search.hidden is not None:
        evidence += f", where a difference in fewer than {100 * search.hidden:.2g}% of observations may be unseen"
    identified["evidence"] = evidence
    if (knob := aim.knob()) is not None:
        low, high = knob_range(search, knob)
        identified["fitted"], identified["fitted_range"] = knob.name, [low, high]
    return Named(aim, identified, spent)
