"""One-step pairs of policies with given log-ratios, from which a weight is recovered."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.scenario import Case, Scenario, count_batches
from opdtheory.exact import TabularPolicy

__all__ = ["STEP", "bandit_parts", "bandits", "far_bandit", "far_grid", "is_expensive", "log_u_grid"]

_BANDIT_EVALUATIONS = 250

# The fewest points of a grid, and the most batches of them that a bandit may take where sampling is possible.
_FEWEST_POINTS = 5
_AFFORDABLE_BATCHES = 1_000

# The batch size from which the grid is split into bandits of three tokens, and the number of its wide points then.
_SPLIT_FROM = 3
_SPLIT_POINTS = 17

# The number of wide points of the grid, which is odd, and the end of the grid.
_GRID_POINTS = 33
_GRID_LIMIT = 4.0

# Log-ratios beyond the grid, of either sign, at which formulas are tested and clamps are searched for.
_FAR = (4.5, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 10.5, 11.0, 11.5, 12.0)

# Probability of a far token under the distribution that favours it.
_FAR_SHARE = 0.02

# Keeps the wide points a millionth away from the round log-ratios at which losses clip: on such a bound, rounding
# alone would decide on which side a token falls.
_OFF_ROUND = 1.0 + 2.0**-20

# Spacing of the points around 0 from which the slope at the teacher is computed.
STEP = 0.01


def is_expensive(batch_size: int) -> bool:
    """Whether it takes seconds to recover the weight of a loss that couples batches of this size."""
    return count_batches(_FEWEST_POINTS, batch_size) > _AFFORDABLE_BATCHES


def log_u_grid(batch_size: int = 1) -> Float[Tensor, " points"]:
    """Log-ratios at which the weight is recovered: symmetric around 0, with `STEP` and `2 STEP` next to it."""
    wide = _GRID_POINTS if batch_size < _SPLIT_FROM else _SPLIT_POINTS  # 0 is in both parts
    while batch_size > 1 and wide > 1 and _bandit_evaluations(wide + 4, batch_size) > _BANDIT_EVALUATIONS:
        wide -= 2
    middle = STEP * torch.arange(-2, 3, dtype=torch.float64)
    above = _OFF_ROUND * torch.linspace(0.0, _GRID_LIMIT, wide // 2 + 1, dtype=torch.float64)[1:]
    return torch.cat([-above.flip(0), middle, above])


def bandit_parts(batch_size: int) -> list[Float[Tensor, " points"]]:
    """The grid in symmetric parts that contain 0, each for its own bandits.

    There are few batches over three tokens, so parts `(-t, 0, t)` cover a fine grid even for large batches.
    """
    log_u = log_u_grid(batch_size)
    if batch_size < _SPLIT_FROM:
        return [log_u]
    return [torch.stack([-t, torch.zeros_like(t), t]) for t in log_u[len(log_u) // 2 + 1 :]]


def _bandit_evaluations(points: int, batch_size: int) -> int:
    """The number of batches that the bandits of one student take."""
    if batch_size < _SPLIT_FROM:
        return count_batches(points, batch_size)
    return points // 2 * count_batches(3, batch_size)


def far_grid(sign: int) -> Float[Tensor, " points"]:
    """Log-ratios of one sign, from the end of the grid outwards."""
    return sign * _OFF_ROUND * torch.tensor((_GRID_LIMIT, *_FAR), dtype=torch.float64)


def far_bandit(log_u: Float[Tensor, " points"], scenario: Scenario) -> Case:
    """A one-step pair with one token for each log-ratio, all of one sign, and a last token that takes the rest.

    The other tokens have a small probability under the distribution that favours them, so none outweighs the others.
    """
    share = torch.full_like(log_u, _FAR_SHARE)
    p, q = (share * (-log_u).exp(), share) if bool((log_u > 0).all()) else (share, share * log_u.exp())
    student, teacher = (
        TabularPolicy([tau * torch.cat([row, 1.0 - row.sum(0, keepdim=True)]).log().unsqueeze(0)])
        for tau, row in ((scenario.student_temperature, p), (scenario.teacher_temperature, q))
    )
    behavior = scenario.behavior(student, scenario.seed + 1)
    return scenario.case(student, teacher, behavior, "far bandit")


def bandits(log_u: Float[Tensor, " points"], scenario: Scenario) -> list[Case]:
    r"""One-step pairs with one token per grid point, whose log-ratios are exactly the grid.

    With $p_a \propto r_a e^{-t_a/2}$, $q_a \propto r_a e^{t_a/2}$ and both $t$ and $r$ symmetric about the
    middle, the normalisers agree and $\log u_a = t_a$. Different $r$ vary $p$ at the same $u$. Where a claim is about
    softened distributions, these are the softened ones.
    """
    generator = torch.Generator().manual_seed(scenario.seed)
    cases = []
    for spread in (0.0, 0.7, 1.4):
        noise = spread * torch.randn(log_u.shape, generator=generator, dtype=torch.float64)
        log_r = (noise + noise.flip(0)) / 2
        student = TabularPolicy([scenario.student_temperature * (log_r - log_u / 2).unsqueeze(0)])
        teacher = TabularPolicy([scenario.teacher_temperature * (log_r + log_u / 2).unsqueeze(0)])
        behavior = scenario.behavior(student, scenario.seed + 1)
        cases.append(scenario.case(student, teacher, behavior, f"bandit, spread {spread:g}"))
    return cases
