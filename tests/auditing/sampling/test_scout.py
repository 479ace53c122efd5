"""Exact findings at a smaller batch size."""

from __future__ import annotations

from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.sampling.scout import scouted
from opdtheory.auditing.scenario import Scenario
from opdtheory.rollouts import Rollouts


def test_a_scout_that_cannot_be_had_is_none() -> None:
    def fours(r: Rollouts) -> Tensor:
        return opd.estimator("k2_loss")(r) * r.tokens.view(-1, 4, r.tokens.shape[1]).shape[1] / 4

    from opdtheory.auditing.black_box import BlackBox

    assert scouted(BlackBox(fours), Scenario(2).pairs()[1:2], "token_local", Scenario(2)) is None
