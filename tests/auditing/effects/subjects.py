"""Losses whose dependence is found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdtheory.auditing.effects.dependence import Dependence, dependence
from opdtheory.auditing.naming.recover import RecoveredWeight, recover_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.rollouts import Rollouts

Loss = Callable[[Rollouts], Tensor]
STEPS = torch.linspace(-1, 1, 5, dtype=torch.float64)
RISING = RecoveredWeight(STEPS, STEPS, 0.0, True, True, 1.0)


def of(loss: Loss, batch_size: int = 1, scale: float = 2.371) -> Dependence:
    def scaled(r: Rollouts) -> Tensor:
        return scale * loss(r)

    if batch_size > 1:
        # The bandits of a coupled loss take a second, and nothing here depends on them.
        return dependence(scaled, RISING, Scenario(batch_size))
    return dependence(scaled, recover_weight(scaled, Scenario(batch_size)), Scenario(batch_size))
