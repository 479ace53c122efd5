"""What a finished run says, in words: no more than its intervals, its estimator's claim and its monitor allow."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.monitoring import Monitor
from opdtheory.monitoring.weights import weight_of
from opdtheory.training.config import TrainConfig
from opdtheory.training.intervals import newcombe
from opdtheory.training.run import TrainResult

__all__ = ["Change", "Outcome", "Word", "change_of", "outcome_of", "pull_of"]

Word = Literal["rose", "fell", "collapsed", "unresolved"]

# A fall after which less than this share of the accuracy is left, by the intervals of both, is a collapse.
_LEFT = 1 / 4

_NAMES = {"greedy": "Greedy accuracy", "test_sampled": "Sampled accuracy"}


@dataclass(frozen=True)
class Change:
    """How an accuracy changed from the first evaluation to the last.

    Attributes:
        name: `greedy` or `test_sampled`.
        before, after: the shares.
        low, high: Newcombe's 95 % interval of the difference.
        word: `rose` or `fell` if that interval excludes 0; `collapsed` for a fall that leaves less than a quarter, by
            the intervals of both shares; else `unresolved`.
    """

    name: str
    before: float
    after: float
    low: float
    high: float
    word: Word

    @property
    def sentence(self) -> str:
        """The change as one sentence, with its interval."""
        interval = f"95 %: {self.low:+.3f} to {self.high:+.3f}"
        name = _NAMES[self.name]
        if self.word == "unresolved":
            return (
                f"{name} did not change beyond its interval: {self.before:.3f} before, {self.after:.3f} after "
                f"({self.after - self.before:+.3f}, {interval})."
            )
        left = "; this is a collapse" if self.word == "collapsed" else ""
        verb = "rose" if self.word == "rose" else "fell"
        change = f"{self.after - self.before:+.3f}, {interval}"
        return f"{name} {verb} from {self.before:.3f} to {self.after:.3f} ({change}){left}."


@dataclass(frozen=True)
class Outcome:
    """A finished run in words.

    Attributes:
        changes: of the accuracies; none without two evaluations.
        distances: how far the student moved to or from the teacher.
        theory: what is proved of the estimator, and what the monitor found.
        following: what to do next.
    """

    changes: tuple[Change, ...]
    distances: tuple[str, ...]
    theory: tuple[str, ...]
    following: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """All that is said, in order."""
        changes = tuple(each.sentence for each in self.changes) or (
            "There are no two evaluations to compare: nothing is said of the accuracy.",
        )
        return (*changes, *self.distances, *self.theory, *self.following)

    def to_dict(self) -> dict[str, Any]:
        """The words and the sentences as JSON values."""
        return {**{each.name: each.word for each in self.changes}, "sentences": list(self.sentences)}


def change_of(name: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> Change:
    """How the accuracy `greedy` or `test_sampled` changed between two rows of metrics."""
    before, after = (row[f"{name}_accuracy"] for row in (first, last))
    limits = [(row[f"{name}_low"], row[f"{name}_high"]) for row in (first, last)]
    low, high = newcombe(before, after, *limits)
    word: Word = "rose" if low > 0 else "fell" if high < 0 else "unresolved"
    if word == "fell" and limits[1][1] < _LEFT * limits[0][0]:
        word = "collapsed"
    return Change(name, before, after, low, high, word)


def outcome_of(result: TrainResult, monitor: Monitor | None = None) -> Outcome:
    """What a finished run says.

    Args:
        result: the run.
        monitor: what watched it, if anything did.
    """
    found, config = result.evaluations, result.config
    changes: tuple[Change, ...] = ()
    distances: tuple[str, ...] = ()
    if len(found) > 1:
        changes = tuple(change_of(name, found[0], found[-1]) for name in _NAMES)
        distances = (_moved(found[0], found[-1]),)
    collapsed = any(each.word == "collapsed" for each in changes)
    theory = (*_claimed(config), *_pull(config, collapsed), *_foreseen(result.rows, config, monitor))
    return Outcome(changes, distances, theory, tuple(_next(config)))


def pull_of(loss: Estimator) -> float | None:
    """$w'(1)$: positive if the teacher attracts, negative if it repels (T5); None where there is no weight."""
    try:
        return weight_of(loss).at_teacher()[1]
    except InvalidArgumentError:
        return None


def _moved(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    def step(name: str, label: str) -> str:
        before, after = ("inf" if row[name] is None else f"{row[name]:.3f}" for row in (first, last))
        return f"{label} went from {before} to {after}"

    moves = f"{step('test_reverse_kl', 'KL(p|q)')}, {step('test_forward_kl', 'KL(q|p)')}"
    return f"{moves}, in nats per token at the student's own test answers; no interval is known for these."


def _claimed(config: TrainConfig) -> list[str]:
    """The claim of the loss as a sentence, and whether the rollouts are such that it holds."""
    claim = config.loss().claim
    if config.control == "supervised":
        return []
    objective = f"that of {claim.divergence.label} ({claim.granularity})"
    other = "" if claim.descends is None else f", but of {claim.descends}"
    said = {
        "exact": f"is exactly {objective}",
        "exact_up_to_scale": f"is {objective}, up to its scale",
        "other_objective": f"is not {objective}{other}",
        "zero": "is zero",
        "biased": f"is not {objective}" + ("" if claim.descends is None else f"; it descends {claim.descends}"),
    }[claim.verdict]
    given = ", ".join(claim.assumptions.words)
    found = [f"In theory ({claim.theorem}) the expected gradient {said}{f'; given: {given}' if given else ''}."]
    if claim.assumptions.sampler != "any" and (config.updates_per_batch > 1 or not config.samples_itself):
        found.append("Not all updates of this run were on-policy, so that does not hold of all of them.")
    return found


def _pull(config: TrainConfig, collapsed: bool) -> list[str]:
    slope = pull_of(config.loss())
    if slope is None or config.control == "supervised":
        return []
    if slope > 0:
        found = f"Near the teacher its weight attracts the student: w'(1) = {slope:.3g} (T5)."
        rest = " The collapse does not follow from that; of noise and of the learning rate it says nothing."
        return [found + (rest if collapsed else "")]
    if slope < 0:
        found = f"Near the teacher its weight repels the student: w'(1) = {slope:.3g} (T5)."
        return [found + (" The collapse agrees with that." if collapsed else "")]
    return ["Near the teacher its weight has no first-order pull: w'(1) = 0 (T5)."]


def _foreseen(rows: Sequence[Mapping[str, Any]], config: TrainConfig, monitor: Monitor | None) -> list[str]:
    seen = [row for row in rows if "opd/collapse_foreseen" in row]
    if not config.monitor or not seen:
        return []
    first = next((row["step"] for row in seen if row["opd/collapse_foreseen"]), None)
    if first is None:
        return ["The monitor foresaw no collapse."]
    why = [] if monitor is None else [f"{each.sentence} {each.remedy}".strip() for each in monitor.foreseen]
    return [f"The monitor foresaw a collapse from step {first} on.", *why]


def _next(config: TrainConfig) -> list[str]:
    if config.control is not None or pull_of(config.loss()) is None:
        return []
    if config.record_every:
        return [f"Next, read the recorded rollouts: opdtheory diagnose {shlex.quote(str(config.out))}"]
    return [
        "To read what its tokens say, train with --record-every 10 --out FOLDER (a new one), then: "
        "opdtheory diagnose FOLDER"
    ]
