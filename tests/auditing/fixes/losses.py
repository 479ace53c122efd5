"""Losses that want a cure, and their audits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import opdtheory as opd
from opdtheory.auditing import Audit
from opdtheory.auditing.fixes.corrections import Curve
from opdtheory.auditing.fixes.facts import Facts
from opdtheory.auditing.fixes.remedies import remedies
from opdtheory.auditing.fixes.trial import Trial
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.report import Remedy
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import Loss
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts

FAITHFUL = ("exact", "exact_up_to_scale")
zoo = opd.estimator


def k1_loss(r: Rollouts) -> Tensor:
    return r.token_sum(-r.log_u)


def over_padding(r: Rollouts) -> Tensor:
    return -(r.log_u.detach() * r.student_logprobs).sum() / len(r.mask)


def times(factor: float, loss: Loss) -> Loss:
    return lambda r: factor * loss(r)


def asked(
    objective: str, granularity: str = "token_local", gamma: float = 1.0, **scenario: Any
) -> tuple[Objective, Scenario]:
    return Objective.of(opd.divergence(objective), granularity, gamma), Scenario(**scenario)


def audited(
    loss: Loss, objective: str, granularity: str = "token_local", tolerance: float = 1e-9, **changed: Any
) -> Audit:
    """What `audit` would hand on, without the parts that remedies do not read."""
    claim, scenario = asked(objective, granularity, **changed)
    verdict, bias = Trial(loss, claim, scenario, tolerance=tolerance)(loss)
    return Audit(
        name="loss",
        claim=claim,
        scenario=scenario,
        verdict=verdict,
        relative_bias=bias,
        cosine=0.0,
        scale=1.0,
        tolerance=tolerance,
        identified=None,
        weight=recover_weight(loss, scenario, tolerance),
        pairs=[],
    )


def cure(
    loss: Loss, objective: str, granularity: str = "token_local", *, pairs: int | None = None, **changed: Any
) -> list[Remedy]:
    return remedies(loss, report=audited(loss, objective, granularity, **changed), pairs=pairs)


def facts_of(loss: Loss, objective: str, granularity: str = "token_local", **changed: Any) -> Facts:
    claim, scenario = asked(objective, granularity, **changed)
    curve = recover_weight(loss, scenario)
    return Facts(
        loss,
        claim,
        scenario,
        "biased",
        False,
        Curve(curve.log_u, curve.weight) if curve.depends_on_ratio_only else None,
        Trial(loss, claim, scenario),
    )
