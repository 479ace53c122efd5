r"""What the rows of the experiment say of each arm: shares with intervals, means over seeds, a verdict.

Nothing here is written by hand for an arm: its verdict follows from the numbers of its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, Literal

from opdtheory.reproduction.plan import Arm, Plan
from opdtheory.training.intervals import NORMAL, student_t, wilson, wilson_of_share

__all__ = ["Share", "Summary", "Word", "problems_of", "share_of", "summaries", "tuned", "verdict_of"]

# Whether an arm's accuracy ends above or below that of its students, or without a finished run.
Word = Literal["trains", "declines", "collapses", "stays", "mixed", "fails"]


@dataclass(frozen=True)
class Share:
    """A share of right answers over seeds.

    Attributes:
        seeds: the share of each seed.
        problems: number of problems of each seed.
        low, high: 95 % interval of the mean.
    """

    seeds: tuple[float, ...]
    problems: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return fmean(self.seeds)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share_of(shares: Sequence[float], problems: int) -> Share:
    r"""The mean over S seeds with Wilson's interval at the effective number of problems.

    $n_\mathrm{eff} = \frac{S n}{\max(1, d)} (z / t_{S-1})^2$ with the design effect $d$, the variance between seeds
    over that of as many independent answers. Where seeds differ, more problems do not narrow the interval (Korn and
    Graubard 1998). With one seed it is Wilson's own interval, over problems only.
    """
    seeds, mean = len(shares), fmean(shares)
    count = float(seeds * problems)
    if seeds > 1:
        binomial = mean * (1 - mean) / problems
        effect = variance(shares) / binomial if binomial > 0 else 1.0
        count = count / max(1.0, effect) * (NORMAL / student_t(seeds - 1)) ** 2
    return Share(tuple(shares), problems, *wilson_of_share(mean, max(count, 1.0)))


@dataclass(frozen=True)
class Summary:
    """An arm on a task, over its seeds.

    Attributes:
        arm: the arm, of the first seed.
        seeds: seeds whose rows are finished.
        failed: what the other rows say.
        greedy, sampled: accuracy at the end.
        start: sampled accuracy of the students.
        word: the verdict, from the rows.
        evidence: the counts behind the verdict.
        means: the mean over rows of each measure at the start and at the end.
        rows: the finished rows.
    """

    arm: Arm
    seeds: tuple[int, ...]
    failed: tuple[str, ...]
    greedy: Share | None
    sampled: Share | None
    start: Share | None
    word: Word
    evidence: str
    means: Mapping[str, float | None]
    rows: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.arm.task

    @property
    def name(self) -> str:
        """Name of the arm."""
        return self.arm.name

    @property
    def group(self) -> str:
        """As that of the arm."""
        return self.arm.group

    @property
    def form(self) -> str:
        """What is done with a catalogue divergence, as `FORMS` names it; empty for another arm."""
        divergence, _, form = self.name.partition("/")
        return form if form and self.arm.fields.get("divergence") == divergence else ""

    @property
    def verdict(self) -> str:
        """The verdict with its evidence."""
        return f"{self.word}: {self.evidence}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        names = ("task", "name", "group", "seeds", "failed", "greedy", "sampled", "start", "verdict", "means")
        values = {name: getattr(self, name) for name in names}
        return {name: dataclasses.asdict(x) if isinstance(x, Share) else x for name, x in values.items()}


def summaries(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """The rows at the common learning rate by task and arm, in the order of their first appearance."""
    return _grouped([row for row in rows if row["group"] in ("main", "control")])


def tuned(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[Summary]:
    """The rows at the learning rate that tuning chose for each arm, where it has chosen one."""
    chosen = plan.chosen_rates(rows)

    def is_chosen(row: Mapping[str, Any]) -> bool:
        rate = row["identity"]["fields"]["learning_rate"]
        return row["group"] in ("main", "tuned") and rate == chosen.get((row["task"], row["name"]))

    return _grouped([row for row in rows if is_chosen(row)])


def _grouped(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["task"], row["name"]), []).append(row)
    return [_summary(members) for members in grouped.values()]


def _summary(rows: Sequence[Mapping[str, Any]]) -> Summary:
    done = [row for row in rows if row["status"] == "finished"]
    failed = tuple(f"seed {row['seed']}: {row['error']}" for row in rows if row["status"] != "finished")

    def share(when: str, name: str) -> Share | None:
        if not done:
            return None
        return share_of([row[when][f"{name}_accuracy"] for row in done], problems_of(done[0]))

    word, evidence = verdict_of(done, len(failed))
    return Summary(
        arm=Arm.of_row(rows[0]),
        seeds=tuple(row["seed"] for row in done),
        failed=failed,
        greedy=share("end", "greedy"),
        sampled=share("end", "test_sampled"),
        start=share("start", "test_sampled"),
        word=word,
        evidence=evidence,
        means=_means(done),
        rows=done,
    )


def problems_of(row: Mapping[str, Any]) -> int:
    """The number of test problems behind a row's accuracies."""
    return int(row["identity"]["fields"]["eval_examples"])


def verdict_of(done: Sequence[Mapping[str, Any]], failed: int = 0) -> tuple[Word, str]:
    """Whether the sampled accuracy ends above or below the student's own, with disjoint 95 % intervals.

    An arm that ends below in every seed collapses if its KL to the teacher also more than doubles, else declines.

    Args:
        done: rows of the finished seeds; of each its evaluations `start` and `end` are read, and the number of
            problems, see `problems_of`.
        failed: number of seeds without a finished run.
    """
    total = len(done) + failed
    if failed:
        return "fails", f"no finished run in {failed} of {total} seeds"
    above = below = away = doubled = 0
    for row in done:
        first, last = (_interval(row, when) for when in ("start", "end"))
        above += last[0] > first[1]
        below += last[1] < first[0]
        distances = [row[when]["test_reverse_kl"] for when in ("start", "end")]
        far = [math.inf if value is None else value for value in distances]  # infinity is stored as None
        away += far[1] > far[0]
        doubled += far[1] > 2 * far[0]
    moved = f"further from the teacher in {away} of {total}" if away else "closer to the teacher in all"
    if below == total:
        word: Word = "collapses" if doubled == total else "declines"
        return word, f"below the student's start in {below} of {total} seeds, {moved}"
    if above == total:
        return "trains", f"above the student's start in {above} of {total} seeds, {moved}"
    if not above and not below:
        return "stays", f"level with the student's start in {total} of {total} seeds, {moved}"
    return "mixed", f"above the student's start in {above}, below it in {below} of {total} seeds, {moved}"


def _interval(row: Mapping[str, Any], when: str) -> tuple[float, float]:
    problems = problems_of(row)
    return wilson(round(row[when]["test_sampled_accuracy"] * problems), problems)


_MEASURES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "start_reverse_kl": lambda row: row["start"]["test_reverse_kl"],
    "start_forward_kl": lambda row: row["start"]["test_forward_kl"],
    "start_entropy": lambda row: row["start"]["test_entropy"],
    "reverse_kl": lambda row: row["end"]["test_reverse_kl"],
    "forward_kl": lambda row: row["end"]["test_forward_kl"],
    "entropy": lambda row: row["end"]["test_entropy"],
    "gradient_norm": lambda row: row["means"]["gradient_norm"],
    "clip_fraction": lambda row: row["means"]["clip_fraction"],
    "response_length": lambda row: row["curve"].get("response_length", [None])[-1],
    "highest_reverse_kl": lambda row: max(_finite(row["curve"].get("reverse_kl", [])), default=None),
    "bias": lambda row: _of(row["bias"], "bias"),
    "predicted_bias": lambda row: _of(row["bias"], "predicted_bias"),
    "cosine": lambda row: _of(row["bias"], "cosine"),
    "variance": lambda row: _of(row["bias"], "variance"),
    "start_objective": lambda row: row["objective"][0],
    "objective": lambda row: row["objective"][-1],
    "seconds": lambda row: row["seconds"],
}


def _of(values: Mapping[str, Any] | None, name: str) -> float | None:
    return None if values is None else values.get(name)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean of each measure over seeds; None if a value is missing or not finite."""
    found: dict[str, float | None] = {}
    for name, measure in _MEASURES.items():
        values = [measure(row) for row in rows]
        finite = _finite(values)
        found[name] = fmean(finite) if finite and len(finite) == len(values) else None
    return found
