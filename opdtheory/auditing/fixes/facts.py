"""What is known about a loss before changes to it are tried, and what a change is."""

from __future__ import annotations

from dataclasses import dataclass

from opdtheory.auditing.fixes.corrections import Curve
from opdtheory.auditing.fixes.trial import Trial
from opdtheory.auditing.remembered import Remembered
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import Loss
from opdtheory.objective import Objective

__all__ = ["Candidate", "Facts", "alike"]


def alike(tolerance: float) -> float:
    """The relative difference of two curves or gradients below which a change is worth a trial."""
    return max(1e-6, 10.0 * tolerance)


@dataclass(frozen=True)
class Candidate:
    """A changed loss.

    Attributes:
        kind: the kind of change, see `Remedy`.
        text: the change as an imperative sentence.
        loss: the changed loss.
        cause: what the change says is wrong, in a sentence; empty if the text says it.
        follows: what the loss follows for that cause, in a sentence that holds only if nothing else is wrong.
    """

    kind: str
    text: str
    loss: Loss
    cause: str = ""
    follows: str = ""


@dataclass(frozen=True)
class Facts:
    """What is known about a loss before any change to it is tried.

    Attributes:
        loss: the black box.
        claim: the claimed objective.
        scenario: what the rollouts of the audit looked like.
        verdict: verdict of the audit.
        lengths: whether what holds at fixed length fails at variable length.
        curve: the recovered weight, or None if it is not a function of the ratio.
        trial: the judge of changed losses.
        local: whether the gradient over several tokens is that of one step at each of them; None if unknown.
        top_k: number of tokens of a top-k loss, if it is known; None for another loss.
    """

    loss: Loss
    claim: Objective
    scenario: Scenario
    verdict: str
    lengths: bool
    curve: Curve | None
    trial: Trial
    local: bool | None = None
    top_k: int | None = None

    @property
    def original(self) -> Loss:
        """The loss itself: what is remembered of a batch is not changed by a change of its operations."""
        return self.loss.loss if isinstance(self.loss, Remembered) else self.loss

    @property
    def token_local(self) -> bool:
        """Whether the claimed granularity is `token_local`."""
        return self.claim.granularity == "token_local"

    @property
    def off_policy(self) -> bool:
        """Whether another policy than the student samples."""
        return self.scenario.off_policy > 0

    @property
    def variable(self) -> bool:
        """Whether there are masked positions: after an early end, or written by an environment."""
        return self.lengths or self.scenario.masks
