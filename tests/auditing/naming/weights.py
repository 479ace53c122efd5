"""Losses as recovered weights and their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.naming.weight_form import WeightForm, describe
from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import symbol
from opdtheory.exact import gradient_moments
from opdtheory.rollouts import Rollouts

GRID = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)


def form_of(loss: Callable[[Rollouts], torch.Tensor], scale: float = 1.0, batch_size: int = 1) -> WeightForm:
    return describe(recover_weight(lambda r: scale * loss(r), Scenario(batch_size)), 1e-9)


def reward(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Rollouts], torch.Tensor]:
    return lambda r: r.token_sum(-function(r.log_u).detach() * r.student_logprobs)


def evaluated(expr: sympy.Expr, log_u: torch.Tensor) -> np.ndarray:
    u = symbol()
    return np.array([complex(expr.subs(u, sympy.exp(sympy.Float(t))).evalf()).real for t in log_u.tolist()])


def on_panel(loss: Loss) -> tuple[list[Tensor], list[Any]]:
    cases = Scenario().pairs()
    return [flat(gradient_moments(loss, case.student, case.teacher).mean) for case in cases], cases
