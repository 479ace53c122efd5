"""What is known of a loss before a change to it is tried, and what a change is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opdtheory.auditing.fixes.corrections import Curve
from opdtheory.auditing.fixes.trial import Trial, attempt
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.divergences import Divergence
from opdtheory.exact import Loss

__all__ = ["Candidate", "Facts", "alike", "on_policy_curve"]


def alike(tolerance: float) -> float:
    """The relative difference of two curves, or gradients, below which a change is worth a trial."""
    return max(1e-6, 10.0 * tolerance)


@dataclass(frozen=True)
class Candidate:
    """A changed loss, with the change as an imperative sentence and a word for its kind."""

    kind: str
    text: str
    loss: Loss


@dataclass(frozen=True)
class Facts:
    """What is known of a loss before any change to it is tried.

    Attributes:
        loss: the black box.
        divergence: the claimed one.
        granularity: the claimed one.
        verdict: of the audit.
        settings: of the audit: `batch_size`, `eos`, `off_policy`, `gamma`, `seed`, and maybe more of `panel`'s.
        lengths: whether what holds at fixed length fails at variable length.
        curve: the recovered weight, or None where it is no function of the ratio.
        trial: what decides.
    """

    loss: Loss
    divergence: Divergence
    granularity: str
    verdict: str
    settings: Mapping[str, Any]
    lengths: bool
    curve: Curve | None
    trial: Trial

    @property
    def coupled(self) -> bool:
        """Whether the loss is audited on batches of more than one rollout."""
        return int(self.settings["batch_size"]) > 1

    @property
    def off_policy(self) -> bool:
        """Whether another policy than the student samples."""
        return float(self.settings["off_policy"]) > 0

    @property
    def variable(self) -> bool:
        """Whether there are masked positions: after an early end, or written by an environment."""
        written = bool(self.settings.get("environment")) or self.settings.get("prompts", 1) > 1
        return self.lengths or written or self.settings["eos"] is not None


def on_policy_curve(loss: Loss, settings: Mapping[str, Any], tolerance: float) -> Curve | None:
    """The recovered weight where the student itself samples, or None where it is no function of the ratio."""
    found = attempt(lambda: recover_weight(loss, settings["batch_size"], 0.0, settings["seed"], tolerance))
    return (
        Curve(found.log_u, found.weight, alike(tolerance))
        if found is not None and found.depends_on_ratio_only
        else None
    )
