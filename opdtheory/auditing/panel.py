"""The pairs of an audit, and how the expectation over their batches is taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opdtheory.auditing.black_box import INSISTS
from opdtheory.auditing.case import Case
from opdtheory.auditing.naming.bandits import is_expensive
from opdtheory.auditing.reductions import undone
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import BudgetExceededError, LossError
from opdtheory.exact import Loss

__all__ = ["Panel", "panel_of", "wider_panel"]

# Only to learn that rollouts are coupled, no more batches than this are enumerated.
_FEW_BATCHES = 300


@dataclass(frozen=True)
class Panel:
    """The pairs of an audit.

    Attributes:
        cases: the pairs.
        single: whether batches are too large to enumerate, and each rollout is found to be treated alone.
        mean_of: whether that is so of the loss with its token mean made a sum: the expectation of the mean follows
            from single rollouts at any batch size.
    """

    cases: list[Case]
    single: bool = False
    mean_of: bool = False


def panel_of(loss: Loss, scenario: Scenario, method: str) -> Panel | None:
    """Pairs whose batches can be enumerated in seconds; None if batches are better sampled.

    Raises:
        BudgetExceededError: batches are too many, and `method` is `exact` or a setting of the scenario asks for it.
        LossError: as `audit`.
    """
    try:
        cases = scenario.pairs()
    except BudgetExceededError:
        if _is_separable(loss, scenario):
            return Panel(scenario.single.pairs(), single=True)
        # The law of the other rollouts' lengths is that of independent ones.
        if not scenario.shared_prompt and _is_separable(undone(loss, "token_mean"), scenario):
            return Panel(scenario.single.pairs(), single=True, mean_of=True)
        if method == "exact" or scenario.exact_only is not None:
            raise
        return None
    if scenario.exact_only is not None:
        return Panel(cases)
    if method == "auto" and is_expensive(scenario.batch_size):
        first = cases[:1]
        if not _is_separable(loss, scenario, first):
            return None
    return Panel(cases)


def wider_panel(scenario: Scenario, kept: int) -> tuple[Scenario, Panel] | None:
    """A panel with more tokens than a loss keeps; None if its batches are too many to enumerate."""
    wider = replace(scenario, vocabulary=kept + 2)
    try:
        return wider, Panel(wider.pairs())
    except BudgetExceededError:
        return None


def _is_separable(loss: Loss, scenario: Scenario, cases: list[Case] | None = None) -> bool:
    """Whether each rollout's gradient is independent of the others in its batch, so that one at a time suffices.

    Every batch of two is evaluated, in both orders, and larger ones on a sample.
    """
    two = replace(scenario, batch_size=2)
    try:
        if not two.moments(loss, two.pairs()[1], _FEW_BATCHES, thorough=True).separable:
            return False
        return all(scenario.moments(loss, case, _FEW_BATCHES).separable for case in cases or ())
    except BudgetExceededError:
        return False
    except LossError:
        raise
    except INSISTS:
        return False
