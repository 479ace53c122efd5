"""Two runs of one expected gradient differ: a noise floor, and the paper's claims held to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from opdtheory.rendering import text
from opdtheory.reproduction.plan import TWINS
from opdtheory.reproduction.summary import Share, Summary, problems_of
from opdtheory.training.intervals import NORMAL, student_t

__all__ = ["Floor", "as_text", "claims", "difference", "floor_text", "noise_floor"]

_BASELINE = "reverse_kl/opd"


@dataclass(frozen=True)
class Floor:
    """What two runs of the same expected gradient differ by.

    Attributes:
        pairs: how many were run on other rollouts from the same student.
        rms: root mean square of their differences in sampled accuracy.
        largest: of them.
        single: a difference of two single runs below this is noise, at 95 %.
    """

    pairs: int
    rms: float
    largest: float
    single: float

    def over(self, seeds: int) -> float:
        """The same for a difference of means over so many seeds."""
        return self.single / math.sqrt(seeds)


def noise_floor(table: Sequence[Summary]) -> Floor | None:
    r"""The floor from all pairs of twins, $t_k \cdot \mathrm{rms}$ over k pairs; not below that of the finite test."""
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
    """Mean difference in sampled accuracy over the seeds that both have, and their number."""
    ends = [{row["seed"]: row["end"]["test_sampled_accuracy"] for row in each.rows} for each in (one, other)]
    common = ends[0].keys() & ends[1].keys()
    if not common:
        return None
    return fmean([ends[0][seed] - ends[1][seed] for seed in common]), len(common)


def _find(table: Sequence[Summary], task: str, name: str) -> Summary | None:
    return next((each for each in table if (each.task, each.name) == (task, name)), None)


def _against(table: Sequence[Summary], floor: Floor | None, task: str, name: str) -> tuple[str, str] | None:
    """Where an arm stands against reverse-KL OPD, and the numbers.

    `above`, `below` or `level with`; `unresolved` if the noise floor exceeds all that the baseline itself gains.
    """
    one, two = _find(table, task, name), _find(table, task, _BASELINE)
    gap = None if one is None or two is None else difference(one, two)
    if floor is None or gap is None or two is None or two.sampled is None or two.start is None:
        return None
    value, seeds = gap
    limit, gain = floor.over(seeds), two.sampled.mean - two.start.mean
    if abs(value) > limit:
        word = "above" if value > 0 else "below"
    else:
        word = "level with" if limit < abs(gain) else "unresolved"
    return word, f"{value:+.3f}, noise floor {limit:.3f}, the baseline's own gain {gain:+.3f}"


def claims(table: Sequence[Summary]) -> list[tuple[str, str, str, str]]:
    """The paper's claims against the rows: `(claim, task, verdict, numbers)` for each task."""
    floor, found = noise_floor(table), []
    tasks = list(dict.fromkeys(each.task for each in table))

    def word(claim: str, task: str, name: str, wanted: str) -> None:
        each = _find(table, task, name)
        if each is not None and each.sampled is not None and each.start is not None:
            verdict = "reproduces" if each.word == wanted else "does not reproduce"
            numbers = f"{each.start.mean:.3f} to {each.sampled}; {each.verdict}"
            found.append((claim, task, verdict, numbers))

    for divergence in ("forward_kl", "jsd"):
        for task in tasks:
            word(f"`{divergence}` collapses with the reward's gradient stopped", task, f"{divergence}/opd", "collapses")
    for divergence in ("forward_kl", "jsd"):
        for task in tasks:
            word(f"`{divergence}` trains with the corrected advantage", task, f"{divergence}/opd_plus", "trains")
    for divergence in ("forward_kl", "jsd"):
        for task in tasks:
            against = _against(table, floor, task, f"{divergence}/opd_plus")
            if against is not None:
                verdict = {"below": "does not reproduce", "unresolved": "not resolved"}.get(against[0], "reproduces")
                found.append(
                    (f"corrected `{divergence}` matches or beats reverse-KL OPD", task, verdict, _says(against))
                )
    for task in tasks:
        against = _against(table, floor, task, "reverse_kl/opd_plus")
        if against is not None:
            verdict = {"above": "reproduces", "unresolved": "not resolved"}.get(against[0], "does not reproduce")
            found.append(("OPD+ gains a little for the reverse KL", task, verdict, _says(against)))
    return found


def _says(against: tuple[str, str]) -> str:
    word, numbers = against
    return numbers if word == "unresolved" else f"{word} it: {numbers}"


_COLUMNS = ("task", "arm", "seeds", "start", "greedy", "sampled", "95 %", "KL(p|q)", "verdict")


def as_text(table: Sequence[Summary]) -> str:
    """The table for a terminal, the noise floor below it."""
    rows = [_COLUMNS, *(_cells(each) for each in table)]
    lines = text.table(rows)
    floor = noise_floor(table)
    if floor is None:
        return "\n".join([*lines, "", "no two runs of one expected gradient: no noise floor"])
    return "\n".join([*lines, "", floor_text(floor)])


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
