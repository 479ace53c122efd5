"""One-step pairs whose log-ratios are the grid."""

from __future__ import annotations

import torch

from opdtheory.auditing.naming.bandits import bandit_parts, bandits, far_bandit, far_grid, log_u_grid
from opdtheory.auditing.scenario import Case, Scenario
from tests.tolerances import ALGEBRA


def test_bandits_have_the_grid_as_log_ratios() -> None:
    for batch_size in (1, 2, 4, 8):
        grid = log_u_grid(batch_size)
        assert float(grid[len(grid) // 2]) == 0.0
        torch.testing.assert_close(grid, -grid.flip(0), rtol=0, atol=0)
        parts = bandit_parts(batch_size)
        torch.testing.assert_close(torch.cat(parts).unique(), grid, rtol=0, atol=0)
        for part in parts:
            for case in bandits(part, Scenario()):
                torch.testing.assert_close(log_ratios(case), part, rtol=0, atol=ALGEBRA)
    for sign in (-1, 1):
        far = far_grid(sign)
        torch.testing.assert_close(log_ratios(far_bandit(far, Scenario()))[:-1], far, rtol=0, atol=ALGEBRA)


def log_ratios(case: Case) -> torch.Tensor:
    return (torch.log_softmax(case.teacher.logits[0], -1) - torch.log_softmax(case.student.logits[0], -1))[0]
