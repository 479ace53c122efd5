"""Losses under check."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.checks.soundness import CHECKS, Check, soundness
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import Loss
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts


def checks(
    loss: Loss,
    objective: str | None = "reverse_kl",
    batch_size: int = 1,
    off_policy: float = 0.0,
    worlds: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Check]:
    """`worlds`: of the panel alone, as `eos`, `prompts` and `environment`."""
    tolerance = settings.pop("tolerance", 1e-9)
    claimed = None
    if objective is not None:
        words = {key: settings.pop(key) for key in ("granularity", "gamma") if key in settings}
        claimed = Objective.of(opd.divergence(objective), **words)
    scenario = Scenario(batch_size, off_policy=off_policy, **settings)
    cases = dataclasses.replace(scenario, **(worlds or {})).pairs()[1:4]
    moments = [scenario.moments(loss, case) for case in cases]
    found = soundness(loss, cases, moments, claimed, scenario, tolerance)
    assert [check.name for check in found] == list(CHECKS)
    return {check.name: check for check in found}


def failed(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if check.passed is False}


def reverse_kl(r: Rollouts) -> Tensor:
    log_p, log_q = torch.log_softmax(r.student_logits, -1), torch.log_softmax(r.teacher_logits, -1)
    return r.token_sum((log_p.exp() * (log_p - log_q)).sum(-1))


def forward_kl(r: Rollouts) -> Tensor:
    log_p, log_q = torch.log_softmax(r.student_logits, -1), torch.log_softmax(r.teacher_logits, -1)
    return r.token_sum((log_q.exp() * (log_q - log_p)).sum(-1))
