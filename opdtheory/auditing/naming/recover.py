"""The weight that a loss puts on a token, as a function of the ratio, recovered from one-step policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.naming.bandits import STEP, bandit_parts, bandits, far_bandit, far_grid
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.records import ABSENT, FINITE_ITEMS, Keyed
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.errors import OpdTheoryError
from opdtheory.exact import Loss, TabularPolicy, gradient_moments
from opdtheory.exact.tree import Tree

__all__ = ["RecoveredWeight", "explains_panel", "interpolates", "recover_weight"]

# Rounding of a recovered weight relative to that of its gradient: 1/p of the rarest token amplifies it.
_AMPLIFIED = 10.0

# The largest error of interpolating a recovered weight, relative to the gradient, and the widest grid for it.
_INTERPOLATION = 0.05
_FINE_GRID = 0.5

# Far log-ratios in one bandit.
_TOGETHER = 4

# The largest error of a gradient composed of single steps, relative to it: rounding of a loss in float32 included.
_STEP_BY_STEP = 1e-3

# Rounds in which the cell where a far plateau begins is narrowed, and the points that each adds to it.
_ROUNDS, _INSIDE = 4, 12

_NOTHING = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class RecoveredWeight(Keyed):
    r"""The local weight $w(u)$ that a loss puts on a token on one-step policies, up to a constant: $w(1) = 0$.

    Attributes:
        log_u: grid of log-ratios, teacher over student; empty if the weight was not recovered.
        weight: the weight on the grid, averaged over the bandits.
        residual: largest disagreement of bandits that differ only in `p`, relative to the weight's range.
        depends_on_ratio_only: whether that disagreement is rounding.
        non_decreasing: whether the weight never falls on the grid: then a genuine f-divergence is minimised (T4).
        slope_at_teacher: $dw/d\log u$ at $u = 1$ by a five-point difference; positive: the teacher attracts (T5).
        far_log_u: log-ratios beyond the grid and near the start of a plateau, ascending, for single rollouts.
        far_weight: the weight there, each from one pair of policies.
        explains_panel: whether the gradient over several tokens is that of one step at each of them, with this weight
            if it is one of the ratio, up to a scale; None if that cannot be determined.
        low: lower ends of intervals that hold jointly, in a sampled audit.
        high: upper ends of these intervals.
    """

    log_u: Annotated[Float[Tensor, " points"], FINITE_ITEMS]
    weight: Annotated[Float[Tensor, " points"], FINITE_ITEMS]
    residual: float
    depends_on_ratio_only: bool
    non_decreasing: bool
    slope_at_teacher: float
    far_log_u: Annotated[Float[Tensor, " far"], FINITE_ITEMS] = _NOTHING[0]
    far_weight: Annotated[Float[Tensor, " far"], FINITE_ITEMS] = _NOTHING[1]
    explains_panel: bool | None = None
    low: Float[Tensor, " points"] | None = field(default=None, metadata=ABSENT)
    high: Float[Tensor, " points"] | None = field(default=None, metadata=ABSENT)

    @classmethod
    def unknown(cls) -> RecoveredWeight:
        """The weight of an audit that did not recover one."""
        return cls(*_NOTHING, float("nan"), False, False, float("nan"))


def recover_weight(loss: Loss, scenario: Scenario, tolerance: float = 1e-9, *, students: int = 3) -> RecoveredWeight:
    r"""Recover $w(u_a) = -G_a / p_a + \text{const}$ from the expected gradient $G$ on one-step bandits.

    Args:
        loss: the black box.
        scenario: only its batch size, seed and noise of the sampling policy are used.
        tolerance: relative error of the loss's gradient that counts as rounding.
        students: number of students with equal log-ratios that are compared, at least two.

    Raises:
        LossError: as `gradient_moments`.
    """
    parts = bandit_parts(scenario.batch_size)
    found = [_curves(loss, part, scenario, students) for part in parts]
    # Every part contains 0, where its curves are zero.
    log_u, order = torch.cat([part[part != 0.0] for part in parts] + [torch.zeros(1, dtype=torch.float64)]).sort()
    values = [c[:, part != 0.0] for c, part in zip(found, parts, strict=True)]
    curves = torch.cat([*values, torch.zeros(len(values[0]), 1, dtype=torch.float64)], 1)[:, order]
    middle = len(log_u) // 2
    curve = curves.mean(0)
    spread = float((curves - curve).abs().max())
    span = float(curve.max() - curve.min())
    # The weight of a loss that puts a constant on every token is rounding, and depends on nothing.
    residual = spread / span if span > 1e-9 else 0.0
    steps = curve.diff()
    ratio_only = residual < _AMPLIFIED * tolerance
    far_log_u, far_weight = _NOTHING
    if not scenario.coupled and ratio_only:
        far_log_u, far_weight = _far(loss, log_u, curve, scenario, tolerance)
    return RecoveredWeight(
        log_u=log_u,
        weight=curve,
        residual=residual,
        depends_on_ratio_only=ratio_only,
        non_decreasing=bool((steps >= -_AMPLIFIED * tolerance * max(span, 1e-9)).all()),
        slope_at_teacher=_central_slope(curve[middle - 2 : middle + 3].tolist()),
        far_log_u=far_log_u,
        far_weight=far_weight,
    )


def _curves(loss: Loss, log_u: Tensor, scenario: Scenario, students: int) -> Tensor:
    """The weight at log-ratios with 0 in the middle, minus its value there, for each student of the bandits."""
    cases = bandits(log_u, scenario)[-students:]
    return torch.stack([_advantage(loss, case, scenario.batch_size, len(log_u) // 2) for case in cases])


def _advantage(loss: Loss, case: Case, batch_size: int, origin: int) -> Tensor:
    gradient = gradient_moments(loss, case.student, case.teacher, batch_size, case.behavior, thorough=False).mean[0][0]
    tau = case.student_temperature
    advantage = -tau * gradient / torch.softmax(case.student.logits[0][0] / tau, -1)
    return advantage - advantage[origin]


def _far(loss: Loss, log_u: Tensor, curve: Tensor, scenario: Scenario, tolerance: float) -> tuple[Tensor, Tensor]:
    """Log-ratios beyond the grid and near the start of a plateau, and the weight there; nothing if the loss fails."""
    count = len(log_u) // 2
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for sign, grid, known in ((-1, log_u.flip(0), curve.flip(0)), (1, log_u, curve)):
            far = far_grid(sign)

            def at(points: Tensor, near: Tensor = far[:1], end: Tensor = known[-1]) -> Tensor:
                case = far_bandit(torch.cat([near, points]), scenario)
                return end + _advantage(loss, case, 1, 0)[1:-1]

            # A few at a time: the rounding of a steep weight would drown the smaller values.
            more = [(some, at(some)) for some in far[1:].split(_TOGETHER)]
            points = torch.cat([grid[count + 1 :], far[1:]])
            values = torch.cat([known[count + 1 :], *(part for _, part in more)])
            for _ in range(_ROUNDS):
                level = (values - values[-1]).abs() <= tolerance * values.abs().max()
                first = len(level) - int(level.flip(0).long().cumprod(0).sum())
                if first == 0 or len(level) - first < 2:
                    break
                ends = float(points[first - 1]), float(points[first])
                inside = torch.linspace(*ends, _INSIDE + 2, dtype=points.dtype)[1:-1]
                more.append((inside, at(inside)))
                points, order = torch.cat([points, inside]).sort(descending=sign < 0)
                values = torch.cat([values, more[-1][1]])[order]
            found += more
    except (OpdTheoryError, RuntimeError, ValueError):
        return _NOTHING
    far_log_u, order = torch.cat([points for points, _ in found]).sort()
    return far_log_u, torch.cat([values for _, values in found])[order]


def explains_panel(
    loss: Loss, weight: RecoveredWeight, gradients: list[Tensor], cases: list[Case], scenario: Scenario
) -> bool | None:
    """Whether a loss treats several tokens like one at a time, with the recovered weight if any, up to a scale.

    The weight comes from one-step policies. Over several tokens, a loss may also weight a token by its position, by the
    ratios of others, by lengths or by the sampling policy. None if the loss fails on the steps of the panel alone.

    Args:
        loss: the black box.
        weight: its recovered weight.
        gradients: its expected gradient on each pair, flat.
        cases: the pairs.
        scenario: what their rollouts look like.
    """
    if not len(weight.log_u):
        return None
    if weight.depends_on_ratio_only and interpolates(weight, gradients, cases) is False:
        return False
    chosen = [len(cases) // 2, len(cases) - 1]
    try:
        alone = [flat(_step_by_step(loss, cases[i], scenario)) for i in chosen]
    except (OpdTheoryError, RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return None
    return fit_scale([gradients[i] for i in chosen], alone).worst_error < _STEP_BY_STEP


def _step_by_step(loss: Loss, case: Case, scenario: Scenario) -> list[Tensor]:
    """The gradient that a loss would have if it saw each step of a pair alone, as often as the student gets there."""
    tree = Tree.build(case.student, case.teacher)
    levels = []
    for n, logits in enumerate(case.student.logits):
        level = torch.zeros_like(logits)
        for row in (tree.reach(n) > 0).nonzero().flatten().tolist() if n not in case.student.environment else []:
            student, teacher = (TabularPolicy([p.logits[n][row : row + 1]]) for p in (case.student, case.teacher))
            behavior = None if case.behavior is None else TabularPolicy([case.behavior.logits[n][row : row + 1]])
            mean = gradient_moments(loss, student, teacher, scenario.batch_size, behavior, thorough=False).mean[0]
            level[row] = tree.reach(n)[row] * mean[0]
        levels.append(level)
    return levels


def interpolates(weight: RecoveredWeight, gradients: list[Tensor], cases: list[Case]) -> bool | None:
    """Whether the recovered curve gives the gradients, up to a scale; None if the grid is too coarse to tell."""
    if not len(weight.log_u):
        return None
    spacing, limit = float(weight.log_u[-1] - weight.log_u[-2]), float(weight.log_u[-1])
    if spacing > _FINE_GRID or limit < 1.0 or not all(case.plain for case in cases):
        return None
    from scipy.interpolate import PchipInterpolator

    curve = PchipInterpolator(weight.log_u.numpy(), weight.weight.numpy(), extrapolate=False)
    actual, predicted = [], []
    for case, gradient in zip(cases, gradients, strict=True):
        tree = Tree.build(case.student, case.teacher)
        log_u = [q - p for p, q in zip(tree.log_p, tree.log_q, strict=True)]
        if not spacing < max(float(level.abs().max()) for level in log_u) <= limit:
            continue
        levels = []
        for n, level in enumerate(log_u):
            p, advantage = tree.log_p[n].exp(), torch.from_numpy(curve(level.numpy()))
            levels.append(-tree.reach(n).unsqueeze(-1) * p * (advantage - (p * advantage).sum(-1, keepdim=True)))
        actual.append(gradient)
        predicted.append(flat(levels))
    return fit_scale(actual, predicted).worst_error < _INTERPOLATION if actual else None


def _central_slope(values: list[float]) -> float:
    """The slope in the middle of five points `STEP` apart, to fourth order."""
    return (8.0 * (values[3] - values[1]) - (values[4] - values[0])) / (12.0 * STEP)
