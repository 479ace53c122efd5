"""What others report and what T13 predicts, each held to paired differences between the arms of the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from opdtheory.rendering.table import Table
from opdtheory.reproduction.plan import REFERENCE
from opdtheory.reproduction.summary import Share, Summary
from opdtheory.training.intervals import student_t

__all__ = [
    "LEVEL",
    "PREDICTIONS",
    "REPORTS",
    "Comparison",
    "Difference",
    "Prediction",
    "Report",
    "as_table",
    "difference",
    "find",
    "ours",
    "predicted",
]

# Two arms are level if the whole interval of their difference in sampled accuracy is this close to zero.
LEVEL = 0.05
Place = Literal["above", "below", "level", "not resolved"]


@dataclass(frozen=True)
class Difference:
    """The mean difference in sampled accuracy between two arms, paired by seed, with its 95 % interval.

    Attributes:
        seeds: number of seeds that both arms have.
        mean: mean over these seeds.
        low, high: Student's interval of the mean; infinite for one seed.
    """

    seeds: int
    mean: float
    low: float
    high: float

    @property
    def is_close(self) -> bool:
        """Whether the whole interval is near zero, on whatever side."""
        return max(-self.low, self.high) <= LEVEL

    @property
    def place(self) -> Place:
        """Where the first arm stands."""
        if self.low > 0:
            return "above"
        if self.high < 0:
            return "below"
        return "level" if self.is_close else "not resolved"

    def bears_out(self, places: Sequence[Place]) -> bool:
        """Whether the first arm stands where it should; an arm that is close to another one is level with it."""
        return self.place in places or ("level" in places and self.is_close)

    def __str__(self) -> str:
        interval = "" if self.seeds < 2 else f" [{self.low:+.3f}, {self.high:+.3f}]"
        near = f", within {LEVEL:g}" if self.is_close and self.place in ("above", "below") else ""
        return f"{self.mean:+.3f}{interval}, {self.place}{near}"


def difference(one: Summary, other: Summary) -> Difference | None:
    """The difference between the ends of two arms; None without a common seed."""
    ends = [{row["seed"]: row["end"]["test_sampled_accuracy"] for row in each.rows} for each in (one, other)]
    return _paired([ends[0][seed] - ends[1][seed] for seed in sorted(ends[0].keys() & ends[1].keys())])


def gain(each: Summary) -> Difference | None:
    """The difference between the end of an arm and its own start."""
    return _paired([row["end"]["test_sampled_accuracy"] - row["start"]["test_sampled_accuracy"] for row in each.rows])


def _paired(gaps: Sequence[float]) -> Difference | None:
    if not gaps:
        return None
    half = math.inf if len(gaps) == 1 else student_t(len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    mean = fmean(gaps)
    return Difference(len(gaps), mean, mean - half, mean + half)


def find(table: Sequence[Summary], task: str, name: str) -> Summary | None:
    """The arm of this name on a task, if it has rows."""
    return next((each for each in table if (each.task, each.name) == (task, name)), None)


class Comparison(NamedTuple):
    """An arm beside another one, or beside its own start.

    Attributes:
        arm: name of the arm.
        other: name of the arm that it is compared with; None for its own start.
    """

    arm: str
    other: str | None = REFERENCE


@dataclass(frozen=True)
class Report:
    """What a source reports, in its own numbers, and the arms of ours that speak to it.

    Attributes:
        claim: what it says.
        source: where, and how it was read.
        numbers: its numbers.
        compared: our arms.
    """

    claim: str
    source: str
    numbers: str
    compared: Comparison


_PAPER = "[arXiv 2606.01039](https://arxiv.org/abs/2606.01039)"
_TABLE = "Table 2 of the same paper, at second hand: we have not read the table itself"
_A100 = "a public report of runs on one A100 (in Chinese; Qwen3-4B to Qwen3-0.6B, GSM8K, one seed, error ±.03)"

# Only what a source says. Nothing is a claim of the paper that its abstract or this table does not make.
REPORTS: tuple[Report, ...] = (
    Report(
        '"improved performance over the baseline KL approach"',
        f"abstract of {_PAPER}",
        "none in the abstract",
        Comparison("jsd/opd_plus"),
    ),
    Report("reverse KL: OPD+ against OPD", _TABLE, "48.99 against 48.96 points", Comparison("reverse_kl/opd_plus")),
    Report("JSD OPD+ against reverse-KL OPD", _TABLE, "48.85 against 48.96 points", Comparison("jsd/opd_plus")),
    Report(
        "forward KL OPD+ against reverse-KL OPD",
        _TABLE,
        "46.39 against 48.96 points",
        Comparison("forward_kl/opd_plus"),
    ),
    Report("forward KL OPD falls below the start", _A100, ".331 to .039", Comparison("forward_kl/opd", None)),
    Report("JSD OPD falls below the start", _A100, ".331 to .134", Comparison("jsd/opd", None)),
    Report("forward KL OPD+ rises above the start", _A100, ".331 to .450", Comparison("forward_kl/opd_plus", None)),
    Report("JSD OPD+ rises above the start", _A100, ".331 to .460", Comparison("jsd/opd_plus", None)),
    Report("reverse KL: OPD+ against OPD", _A100, ".473 against .494", Comparison("reverse_kl/opd_plus")),
)


@dataclass(frozen=True)
class Prediction:
    """What theory says before the runs, and the differences that decide it.

    Attributes:
        says: the prediction.
        places: where each first arm must stand.
        compared: the arms.
    """

    says: str
    places: tuple[Place, ...]
    compared: tuple[Comparison, ...]


_ALL = ("reverse_kl", "forward_kl", "jsd", "hellinger")

PREDICTIONS: tuple[Prediction, ...] = (
    Prediction(
        "With the least-variance baseline (T7a) OPD+ ends above OPD+ without one",
        ("above",),
        tuple(Comparison(f"{d}/opd_plus, optimal baseline", f"{d}/opd_plus") for d in _ALL),
    ),
    Prediction(
        "The teacher's top 4 tokens with a sampled tail (T13) end above OPD+",
        ("above",),
        tuple(Comparison(f"{d}/top 4 and tail", f"{d}/opd_plus") for d in _ALL),
    ),
    Prediction(
        "So they do without a baseline, which the top tokens and the sampled one suffice for",
        ("above",),
        tuple(Comparison(f"{d}/top 4 and tail, no baseline", f"{d}/opd_plus") for d in _ALL),
    ),
    Prediction(
        "With the weight of the rest as one token (T19b), which these suffice for too, they come close to the best "
        "baseline",
        ("level", "above"),
        tuple(Comparison(f"{d}/top 4 and tail, rest", f"{d}/top 4 and tail") for d in _ALL),
    ),
    Prediction(
        "The top 8 tokens with a sampled tail (T13) come close to the whole vocabulary",
        ("level", "above"),
        tuple(Comparison(f"{d}/top 8 and tail", f"{d}/full_vocab") for d in _ALL),
    ),
    Prediction(
        "Over 49,152 tokens it takes the top 64 to come close to the whole vocabulary",
        ("level", "above"),
        tuple(Comparison(f"{d}/top 64 and tail", f"{d}/full_vocab") for d in ("reverse_kl", "jsd")),
    ),
    Prediction(
        "Once the variance is paid for, other divergences beat reverse-KL OPD",
        ("above",),
        tuple(Comparison(f"{d}/top 8 and tail") for d in ("jsd", "hellinger", "forward_kl")),
    ),
    Prediction(
        "And they beat the reverse KL with its own variance paid for",
        ("above",),
        tuple(Comparison(f"{d}/top 8 and tail", "reverse_kl/top 8 and tail") for d in ("jsd", "hellinger")),
    ),
)


def ours(table: Sequence[Summary], task: str, compared: Comparison) -> Difference | None:
    """Our difference for a comparison on a task; None where an arm has no row."""
    one = find(table, task, compared.arm)
    if one is None:
        return None
    if compared.other is None:
        return gain(one)
    other = find(table, task, compared.other)
    return None if other is None else difference(one, other)


def predicted(table: Sequence[Summary], tasks: Sequence[str], prediction: Prediction) -> tuple[str, list[str]]:
    """How many comparisons bear a prediction out, in words, and each of them."""
    held = against = 0
    lines = []
    for compared in prediction.compared:
        cells = []
        for task in tasks:
            found = ours(table, task, compared)
            if found is None:
                continue
            cells.append(f"{task} {found}")
            held += found.bears_out(prediction.places)
            against += not found.bears_out(prediction.places) and found.place != "not resolved"
        if cells:
            lines.append(f"`{compared.arm}` against `{compared.other}`: {'; '.join(cells)}")
    total = sum(len([task for task in tasks if ours(table, task, each) is not None]) for each in prediction.compared)
    words = f"holds in {held} of {total}" + (f", fails in {against}" if against else "")
    open_ = total - held - against
    return words + (f", not resolved in {open_}" if open_ else ""), lines


_COLUMNS = ("task", "arm", "seeds", "start", "greedy", "sampled", "95 %", "KL(p|q)", f"against {REFERENCE}")


def as_table(table: Sequence[Summary]) -> Table:
    """The table for a terminal."""
    return Table([_COLUMNS, *(_cells(table, each) for each in table)])


def _cells(table: Sequence[Summary], each: Summary) -> tuple[str, ...]:
    def mean(share: Share | None) -> str:
        return "-" if share is None else f"{share.mean:.3f}"

    interval = "-" if each.sampled is None else f"{each.sampled.low:.3f}-{each.sampled.high:.3f}"
    distance = each.means.get("reverse_kl")
    against = None if each.name == REFERENCE else ours(table, each.task, Comparison(each.name))
    return (
        each.task,
        each.name,
        str(len(each.seeds)),
        *(mean(each.start), mean(each.greedy), mean(each.sampled), interval),
        "-" if distance is None else f"{distance:.2f}",
        "-" if against is None else str(against),
    )
