"""GKD of TRL 1.0.0, whose denominator was that of each micro-batch (issue 4719 of TRL)."""

from __future__ import annotations

from examples.trainers.entry import Entry
from examples.trainers.gkd import gkd

__all__ = ["ENTRIES"]

_NAME = "GKDTrainer of TRL 1.0.0, beta=1, temperature=1"
_SAYS = "documentation: `beta` interpolates between the forward KL (0) and the reverse KL (1); here for its known fault"

ENTRIES: tuple[Entry, ...] = (Entry.of(_NAME, "trl", gkd(beta=1.0, temperature=1.0), "reverse_kl", _SAYS),)
