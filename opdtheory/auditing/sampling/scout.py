"""What a loss follows at a smaller batch size, where batches can be enumerated: a conjecture about larger ones."""

from __future__ import annotations

from dataclasses import dataclass

from opdtheory.auditing.black_box import INSISTS, BlackBox
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.naming.identify import ExactGradients, best_match
from opdtheory.auditing.naming.recover import RecoveredWeight, recover_weight
from opdtheory.auditing.naming.weight_form import describe
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.errors import OpdTheoryError
from opdtheory.objective import Objective

__all__ = ["SIZES", "Scout", "scouted"]

# Batch sizes that are cheap to enumerate, the cheapest first; several, as some losses insist on a group size.
SIZES = (2, 3, 4)


@dataclass(frozen=True)
class Scout:
    """The exact findings at a smaller batch size, which prove nothing about a larger one.

    Attributes:
        batch_size: the batch size.
        objective: the objective that the loss follows there, or None.
        weight: the weight recovered there.
        label: label of the weight's formula, or None if the weight is not a function of the ratio.
    """

    batch_size: int
    objective: Objective | None
    weight: RecoveredWeight
    label: str | None


def scouted(loss: BlackBox, cases: list[Case], granularity: str, scenario: Scenario) -> Scout | None:
    """The findings on a few small pairs at the scenario's batch size; None if the loss fails there."""
    try:
        moments = [scenario.moments(loss, case) for case in cases]
        weight = recover_weight(loss, scenario, loss.tolerance, students=2)
    except (OpdTheoryError, *INSISTS):
        return None
    gradients, exact, tolerance = [flat(m.mean) for m in moments], ExactGradients(cases), loss.tolerance
    objective: Objective | None = None
    match = best_match(gradients, exact, weight, granularity, tolerance)
    if match is not None and match.fit.worst_error <= tolerance:
        objective = match.objective
    elif (combination := best_combination(gradients, exact, granularity, tolerance)) is not None:
        objective = combination.objective
    label = describe(weight, tolerance).label if weight.depends_on_ratio_only else None
    return Scout(scenario.batch_size, objective, weight, label)
