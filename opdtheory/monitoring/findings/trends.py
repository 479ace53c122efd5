"""Findings on the steps of a run: how its distance from the teacher went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from opdtheory.monitoring.findings.finding import Finding, Setting
from opdtheory.monitoring.sums import Number

__all__ = ["HasMetrics", "distances", "trend"]

# Steps at each end whose mean is compared, and how few steps have a trend.
_TENTH, _FEWEST = 10, 5

_NAME = "opd/reverse_kl"


class HasMetrics(Protocol):
    """A step with its metrics."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """By name."""


def distances(steps: Sequence[HasMetrics]) -> tuple[float, float] | None:
    """The mean distance from the teacher over the first and the last tenth of the steps; None if there are too few."""
    if len(steps) < _FEWEST:
        return None
    tenth = max(1, len(steps) // _TENTH)
    first, last = (sum(step.metrics[_NAME] for step in part) / tenth for part in (steps[:tenth], steps[-tenth:]))
    return first, last


def trend(setting: Setting, steps: Sequence[HasMetrics]) -> Iterator[Finding]:
    """Whether the student comes closer to the teacher, and if not, whether its weight explains that."""
    ends = distances(steps)
    if ends is None:
        return
    first, last = ends
    way = "rose" if last > first else "fell"
    why = ""
    if last > first and setting.measured.slope.value > 0:
        why = (
            "; the weight points to the teacher, so look at what the tokens do not show: the learning rate, its "
            "warm-up, noise of the batch, the optimiser"
        )
    yield Finding(
        "trend",
        "note",
        f"KL(p|q) at the student's own histories {way} from {first:.3g} to {last:.3g} nats a token between the first "
        f"and the last tenth of the steps{why}.",
        Number(last / first if first else float("inf")),
        "KL(p|q) at the end over that at the start",
        "T4",
    )
