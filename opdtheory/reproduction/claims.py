"""The noise floor between two runs of one expected gradient, and the paper's claims held to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from opdtheory.rendering import text
from opdtheory.reproduction.plan import TWINS
from opdtheory.reproduction.summary import Share, Summary, Word, problems_of
from opdtheory.training.intervals import NORMAL, student_t

__all__ = ["Claim", "Floor", "as_text", "claims", "difference", "floor_text", "noise_floor"]

_REFERENCE = "reverse_kl/opd"
Place = Literal["above", "level with", "below", "unresolved"]
Verdict = Literal["reproduces", "does not reproduce", "not resolved"]


class Claim(NamedTuple):
    """A claim of the paper, held to the rows of a task.

    Attributes:
        claim: what the paper says.
        task: name of the task.
        verdict: whether it reproduces.
        numbers: the numbers behind the verdict.
    """

    claim: str
    task: str
    verdict: Verdict
    numbers: str


@dataclass(frozen=True)
class Floor:
    """How much two runs of the same expected gradient differ.

    Attributes:
        pairs: number of pairs that were run on other rollouts from the same student.
        rms: root mean square of their differences in sampled accuracy.
        largest: the largest of these differences.
        single: the noise floor: a smaller difference of two single runs is noise, at 95 %.
    """

    pairs: int
    rms: float
    largest: float
    single: float

    def over(self, seeds: int) -> float:
        """The noise floor of a difference of means over so many seeds."""
        return self.single / math.sqrt(seeds)


def noise_floor(table: Sequence[Summary]) -> Floor | None:
    r"""The floor from all pairs of twins, $t_k \cdot \mathrm{rms}$ over k pairs; at least that of the finite test."""
    gaps, problems, shares = [], 1, []
    for one, other in [(each, _find(table, each.task, TWINS.get(each.name, ""))) for each in table]:
        if other is None:
            continue
        for a in one.rows:
            for b in other.rows:
                if a["seed"] == b["seed"]:
                    ends = [row["end"]["test_sampled_accuracy"] for row in (a, b)]
                    gaps.append(ends[0] - ends[1])
                    shares.append(fmean(ends))
                    problems = problems_of(a)
    if not gaps:
        return None
    rms = math.sqrt(fmean([gap * gap for gap in gaps]))
    test = math.sqrt(fmean([2 * share * (1 - share) / problems for share in shares]))
    single = max(student_t(len(gaps)) * rms, NORMAL * test)
    return Floor(len(gaps), rms, max(map(abs, gaps)), single)


def difference(one: Summary, other: Summary) -> tuple[float, int] | None:
    """Mean difference in sampled accuracy over the seeds that both have, and the number of these seeds."""
    ends = [{row["seed"]: row["end"]["test_sampled_accuracy"] for row in each.rows} for each in (one, other)]
    common = ends[0].keys() & ends[1].keys()
    if not common:
        return None
    return fmean([ends[0][seed] - ends[1][seed] for seed in common]), len(common)


def _find(table: Sequence[Summary], task: str, name: str) -> Summary | None:
    return next((each for each in table if (each.task, each.name) == (task, name)), None)


@dataclass(frozen=True)
class _Comparison:
    """An arm against reverse-KL OPD: the gap in accuracy, its noise floor, and what reverse-KL OPD itself gains."""

    gap: float
    floor: float
    gain: float

    @classmethod
    def of(cls, table: Sequence[Summary], floor: Floor | None, task: str, name: str) -> _Comparison | None:
        one, two = _find(table, task, name), _find(table, task, _REFERENCE)
        found = None if one is None or two is None else difference(one, two)
        if floor is None or found is None or two is None or two.sampled is None or two.start is None:
            return None
        return cls(found[0], floor.over(found[1]), two.sampled.mean - two.start.mean)

    @property
    def place(self) -> Place:
        """Where the arm stands; `unresolved` if the noise floor exceeds all that reverse-KL OPD itself gains."""
        if abs(self.gap) > self.floor:
            return "above" if self.gap > 0 else "below"
        return "level with" if self.floor < abs(self.gain) else "unresolved"

    def __str__(self) -> str:
        where = "" if self.place == "unresolved" else f"{self.place} it: "
        return f"{where}{self.gap:+.3f}, noise floor {self.floor:.3f}, gain of reverse-KL OPD {self.gain:+.3f}"


_ENDS: tuple[tuple[str, str, Word], ...] = (
    ("`forward_kl` collapses with the reward's gradient stopped", "forward_kl/opd", "collapses"),
    ("`jsd` collapses with the reward's gradient stopped", "jsd/opd", "collapses"),
    ("`forward_kl` trains with the corrected advantage", "forward_kl/opd_plus", "trains"),
    ("`jsd` trains with the corrected advantage", "jsd/opd_plus", "trains"),
)
_AGAINST_OPD: tuple[tuple[str, str, tuple[Place, ...]], ...] = (
    ("corrected `forward_kl` matches or beats reverse-KL OPD", "forward_kl/opd_plus", ("above", "level with")),
    ("corrected `jsd` matches or beats reverse-KL OPD", "jsd/opd_plus", ("above", "level with")),
    ("OPD+ gains a little for the reverse KL", "reverse_kl/opd_plus", ("above",)),
)


def claims(table: Sequence[Summary]) -> list[Claim]:
    """The paper's claims, held to the rows of each task."""
    floor, found = noise_floor(table), []
    tasks = list(dict.fromkeys(each.task for each in table))
    for claim, name, word in _ENDS:
        for task in tasks:
            each = _find(table, task, name)
            if each is not None and each.sampled is not None and each.start is not None:
                numbers = f"{each.start.mean:.3f} to {each.sampled}; {each.verdict}"
                found.append(Claim(claim, task, _verdict(each.word == word), numbers))
    for claim, name, places in _AGAINST_OPD:
        for task in tasks:
            against = _Comparison.of(table, floor, task, name)
            if against is not None:
                verdict = "not resolved" if against.place == "unresolved" else _verdict(against.place in places)
                found.append(Claim(claim, task, verdict, str(against)))
    return found


def _verdict(agrees: bool) -> Verdict:
    return "reproduces" if agrees else "does not reproduce"


_COLUMNS = ("task", "arm", "seeds", "start", "greedy", "sampled", "95 %", "KL(p|q)", "verdict")


def as_text(table: Sequence[Summary]) -> str:
    """The table for a terminal, followed by the noise floor."""
    floor = noise_floor(table)
    last = "no noise floor: no expected gradient was run twice" if floor is None else floor_text(floor)
    return "\n".join([*text.table([_COLUMNS, *map(_cells, table)]), "", last])


def floor_text(floor: Floor) -> str:
    """The floor in a sentence."""
    return (
        f"noise floor: {floor.single:.3f} in sampled accuracy between two single runs, {floor.over(3):.3f} between "
        f"means over three seeds ({floor.pairs} pairs of runs of one expected gradient differ by {floor.rms:.3f} rms, "
        f"at most {floor.largest:.3f})"
    )


def _cells(each: Summary) -> tuple[str, ...]:
    def mean(share: Share | None) -> str:
        return "-" if share is None else f"{share.mean:.3f}"

    interval = "-" if each.sampled is None else f"{each.sampled.low:.3f}-{each.sampled.high:.3f}"
    distance = each.means.get("reverse_kl")
    return (
        each.task,
        each.name,
        str(len(each.seeds)),
        *(mean(each.start), mean(each.greedy), mean(each.sampled), interval),
        "-" if distance is None else f"{distance:.2f}",
        each.verdict,
    )
