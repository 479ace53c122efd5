"""Everything that the evidence of a run says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from opdtheory.estimators import Estimator
from opdtheory.monitoring.evidence import Evidence
from opdtheory.monitoring.findings.descent import clipping, collapse, collapsed, gauge, no_pull, no_signal, noise
from opdtheory.monitoring.findings.finding import CONFIDENCE, Finding, Setting
from opdtheory.monitoring.findings.samplers import mismatch, own_probabilities, support
from opdtheory.monitoring.findings.savings import baseline, length, tail, top_k
from opdtheory.monitoring.measures import measured
from opdtheory.monitoring.weights import weight_of

__all__ = ["FORESEES", "findings", "foresights", "setting_of"]

Finder = Callable[[Setting], Iterator[Finding]]

# Those by which a collapse is foreseen, and the others.
FORESEES: dict[str, Finder] = {"collapse": collapse, "collapsed": collapsed, "no_signal": no_signal, "noise": noise}
_OTHERS: tuple[Finder, ...] = (
    *(own_probabilities, mismatch, support, gauge, clipping),
    *(no_pull, length, baseline, top_k, tail),
)


def setting_of(loss: Estimator, evidence: Evidence, batch_tokens: float) -> Setting:
    """The estimator in use, measured on its tokens."""
    weight = weight_of(loss)
    importance = loss.settings.get("importance")
    sums = evidence.as_corrected(None if importance is None else str(importance))
    return Setting(loss, weight, evidence, measured(weight, sums, CONFIDENCE), batch_tokens)


def foresights(setting: Setting) -> tuple[Finding, ...]:
    """The findings by which a collapse is foreseen."""
    return tuple(found for finder in FORESEES.values() for found in finder(setting))


def findings(setting: Setting) -> tuple[Finding, ...]:
    """All findings, warnings first."""
    others = [found for finder in _OTHERS for found in finder(setting)]
    return tuple(sorted([*foresights(setting), *others], key=lambda found: found.level != "warning"))
