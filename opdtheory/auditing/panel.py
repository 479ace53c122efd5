"""The enumerated student-teacher pairs that an audit looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import BudgetExceededError
from opdtheory.exact import TabularPolicy, random_pair

__all__ = ["STEP", "Case", "bandits", "log_u_grid", "panel"]

# (sharpness of the student, distance of the teacher): from nearly equal to far apart.
_PAIRS = ((1.0, 0.03), (1.0, 0.5), (0.3, 1.0), (1.0, 1.5), (2.5, 1.0), (0.5, 2.5))

# Vocabulary and horizon of a pair: for single rollouts, and, largest first, for batches that are enumerated.
_SINGLE = (4, 3)
_BATCHED = ((3, 2), (2, 2))

# Evaluations of a coupled loss that one pair, or one bandit, should cost; and the most that one may.
_PAIR_EVALUATIONS = 500
_BANDIT_EVALUATIONS = 250
_MOST_EVALUATIONS = 5_000

# Points of the wide part of the grid, odd, and its end.
_GRID_POINTS = 33
_GRID_LIMIT = 4.0

# Spacing of the four points around 0 from which the slope at the teacher is taken.
STEP = 0.01


@dataclass(frozen=True)
class Case:
    """One pair of the panel.

    Attributes:
        student: the policy that is trained.
        teacher: the policy that scores.
        behavior: the policy that samples, or None for the student.
        label: what distinguishes the pair, for tables.
    """

    student: TabularPolicy
    teacher: TabularPolicy
    behavior: TabularPolicy | None
    label: str


def panel(batch_size: int = 1, eos: int | None = None, off_policy: float = 0.0, seed: int = 0) -> list[Case]:
    """Six pairs of one size, from nearly equal to far apart, small enough for the batch size.

    Raises:
        BudgetExceededError: batches of this size cannot be enumerated even on the smallest pair.
    """
    sizes = _BATCHED if batch_size > 1 else (_SINGLE,)
    counts = {size: _batches(size[0] ** size[1], batch_size) for size in sizes}
    vocab_size, horizon = next((size for size in sizes if counts[size] <= _PAIR_EVALUATIONS), sizes[-1])
    if counts[vocab_size, horizon] > _MOST_EVALUATIONS:
        raise BudgetExceededError(
            f"auditing batches of {batch_size} rollouts",
            counts[vocab_size, horizon],
            _MOST_EVALUATIONS,
            "audit a smaller batch_size",
        )
    cases = []
    for i, (scale, distance) in enumerate(_PAIRS):
        student, teacher = random_pair(
            vocab_size, horizon, eos=eos, scale=scale, distance=distance, seed=1000 * seed + i
        )
        behavior = student.perturbed(off_policy, seed=1000 * seed + 500 + i) if off_policy else None
        cases.append(Case(student, teacher, behavior, f"sharpness {scale:g}, distance {distance:g}"))
    return cases


def log_u_grid(batch_size: int = 1) -> Float[Tensor, " points"]:
    """Log-ratios at which the weight is recovered: symmetric, 0 in the middle, `STEP` and `2 STEP` beside it."""
    wide = _GRID_POINTS  # 0 is in both parts
    while batch_size > 1 and wide > 0 and _batches(wide + 4, batch_size) > _BANDIT_EVALUATIONS:
        wide -= 2
    middle = STEP * torch.arange(-2, 3, dtype=torch.float64)
    outer = torch.linspace(-_GRID_LIMIT, _GRID_LIMIT, wide, dtype=torch.float64) if wide > 0 else middle[:0]
    return torch.cat([middle, outer[outer != 0.0]]).sort().values


def bandits(log_u: Float[Tensor, " points"], off_policy: float, seed: int) -> list[Case]:
    r"""One-step pairs with one token per grid point, whose log-ratios are the grid exactly.

    With $p_a \propto r_a e^{-t_a/2}$, $q_a \propto r_a e^{t_a/2}$ and both $t$ and $r$ symmetric about the
    middle, the normalisers agree and $\log u_a = t_a$. Different $r$ sweep $p$ apart from $u$.
    """
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for spread in (0.0, 0.7, 1.4):
        noise = spread * torch.randn(log_u.shape, generator=generator, dtype=torch.float64)
        log_r = (noise + noise.flip(0)) / 2
        student = TabularPolicy([(log_r - log_u / 2).unsqueeze(0)])
        teacher = TabularPolicy([(log_r + log_u / 2).unsqueeze(0)])
        behavior = student.perturbed(off_policy, seed=seed + 1) if off_policy else None
        cases.append(Case(student, teacher, behavior, f"bandit, spread {spread:g}"))
    return cases


def _batches(sequences: int, batch_size: int) -> int:
    return math.comb(sequences + batch_size - 1, batch_size)
