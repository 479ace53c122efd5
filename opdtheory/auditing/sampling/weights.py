"""The weight on a token at a batch size that only sampling reaches, with an interval at each log-ratio."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.naming.bandits import bandits
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.sampling.confidence import bounded_interval, first_count, interval, share_of_look
from opdtheory.auditing.sampling.projections import PILOT, TABLE_BUDGET, Look, Residuals, controls, fit_controls, pilot
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.exact import Loss
from opdtheory.exact.modes import plain_modes
from opdtheory.exact.sampling import Sampler
from opdtheory.objective import Objective

__all__ = ["SampledWeight", "sampled_weight"]

# Log-ratios: few, as each token needs its own draws, and a millionth away from the round ones at which losses clip.
_GRID = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_OFF_ROUND = 1.0 + 2.0**-20

# The fewest observations at the first look, the growth of their number, and the batches in each.
_FEWEST, _GROWTH, _BATCHES_APART = 40, 1.5, 4

# Intervals this narrow, relative to the weight's range, suffice for conclusions.
_PRECISE = 0.02

# Relative rounding of what is linear in a loss's gradient.
_SAME = 1e-10


@dataclass(frozen=True)
class SampledWeight:
    r"""Intervals for $w(u) - w(1)$ that hold jointly, from one-step policies with equal ratios and different `p`.

    Attributes:
        log_u: grid of log-ratios.
        low: lower ends, of the hull over the policies if their intervals are disjoint.
        high: upper ends, likewise.
        separated: whether intervals of two policies are disjoint: the weight is then not a function of `u` alone.
        alpha: probability that any interval misses at any look, over grid points and policies.
        hidden: if all observations agreed to rounding, the largest probability of one that does not; else None.
        batches: number of calls of the loss.
        rollouts: number of rollouts drawn.
    """

    log_u: Float[Tensor, " points"]
    low: Float[Tensor, " points"]
    high: Float[Tensor, " points"]
    separated: bool
    alpha: float
    hidden: float | None
    batches: int
    rollouts: int

    @property
    def middle(self) -> Float[Tensor, " points"]:
        """The middle of each interval."""
        return (self.low + self.high) / 2.0

    @property
    def widest(self) -> float:
        """Half the widest interval, relative to the range of the middles; inf if that range is zero."""
        half = float((self.high - self.low).max()) / 2.0
        span = float(self.middle.max() - self.middle.min())
        return half / span if span > 0.0 else (0.0 if half == 0.0 else math.inf)

    def recovered(self) -> RecoveredWeight:
        """The middles as a weight, with the properties that the intervals prove."""
        falls = bool((self.low[:-1] > self.high[1:]).any())
        sharp = self.widest <= _PRECISE
        return RecoveredWeight(
            log_u=self.log_u,
            weight=self.middle,
            residual=self.widest,
            depends_on_ratio_only=sharp and not self.separated,
            non_decreasing=sharp and not falls,
            slope_at_teacher=math.nan,
            low=self.low,
            high=self.high,
        )

    def holds(self, weight: Tensor) -> float | None:
        """A positive factor at which a weight on the grid, zero at `u = 1`, lies in all intervals, or None."""
        low, high = 0.0, math.inf
        for value, a, b in zip(weight.tolist(), self.low.tolist(), self.high.tolist(), strict=True):
            if abs(value) <= 1e-12 * float(weight.abs().max()):
                if not a <= 0.0 <= b:
                    return None
                continue
            ends = sorted((a / value, b / value))
            low, high = max(low, ends[0]), min(high, ends[1])
        # Without noise, the ends differ by rounding.
        if high <= 0.0 or low > high * (1.0 + 1e-9):
            return None
        return (low + high) / 2.0 if math.isfinite(high) else None

    def words(self, batch_size: int) -> str:
        """The finding in one sentence."""
        text = (
            f"The weight on a token at batch size {batch_size} was sampled at {len(self.log_u)} log-ratios on one-step "
            f"policies, {self.rollouts:,} rollouts, with intervals that hold jointly"
        )
        if self.separated:
            return f"{text}: it differs between policies of equal ratios, so it is not a function of u alone."
        if not math.isfinite(self.widest):
            return f"{text}: it may be constant."
        text = f"{text}: half-widths up to {100 * self.widest:.2g}% of its range"
        if self.hidden is None:
            return f"{text}."
        return f"{text}, though a difference in fewer than {100 * self.hidden:.2g}% of observations may be unseen."


def sampled_weight(
    loss: Loss,
    objective: Objective,
    scenario: Scenario,
    *,
    alpha: float,
    seconds: float,
    most: int = 96,
) -> SampledWeight:
    r"""Intervals for the weight $w(u_a) - w(1) = -G_a/p_a + G_1/p_1$ on one-step policies, from drawn batches.

    Args:
        loss: the black box.
        objective: the objective that the loss is thought to follow, for controls: it affects the width of the
            intervals, not their validity.
        scenario: only its batch size, seed and noise of the sampling policy are used.
        alpha: probability that any interval misses.
        seconds: wall-clock budget.
        most: largest number of observations of each policy; fewer are made if even these would leave the intervals too
            wide for conclusions.

    Raises:
        LossError: the loss is not a differentiable, finite scalar.
    """
    deadline = time.perf_counter() + seconds
    log_u = _OFF_ROUND * torch.tensor(_GRID, dtype=torch.float64)
    generator = torch.Generator().manual_seed(scenario.seed)
    cases = bandits(log_u, scenario)[::2]
    # A stream for each point but the middle one, where the difference is zero, and one that counts what differs.
    each = alpha / (len(cases) * (len(log_u) - 1) + 1)
    with plain_modes(), torch.no_grad():
        found = [
            _intervals(loss, case, objective, scenario.batch_size, generator, each, most, deadline) for case in cases
        ]
    lows, highs = torch.stack([low for low, _, _ in found]), torch.stack([high for _, high, _ in found])
    streams = [stream for _, _, stream in found]
    low, high = lows.amax(0), highs.amin(0)
    separated = bool((low > high).any())
    if separated:
        low, high = lows.amin(0), highs.amax(0)
    different, observations = sum(s.different for s in streams), sum(s.projections.count for s in streams)
    hidden = bounded_interval(different, observations, each)[1] if different == 0 else None
    batches = sum(s.look.calls * (s.projections.count + PILOT) for s in streams)
    rollouts = sum(s.look.rollouts * (s.projections.count + PILOT) for s in streams)
    return SampledWeight(log_u, low, high, separated, alpha, hidden, batches, rollouts)


def _intervals(
    loss: Loss,
    case: Case,
    objective: Objective,
    batch_size: int,
    generator: torch.Generator,
    each: float,
    most: int,
    deadline: float,
) -> tuple[Tensor, Tensor, Residuals]:
    """The ends of one policy's intervals, and the stream that they come from."""
    sampler = Sampler.build(case.student, case.teacher, case.behavior, TABLE_BUDGET)
    look = Look(loss, sampler, batch_size, _BATCHES_APART, False)
    found = [c for _, d in objective.terms for c in controls(case, sampler, d, "token_local", 1.0, batch_size)]
    basis = _differences(torch.softmax(sampler.student[0], -1))
    seen, known, largest = pilot(look, basis, found, generator)
    # In units of its own size, each log-ratio counts equally; otherwise the noisiest alone would decide.
    size = seen.square().mean(0).sqrt().clamp_min(1e-300)
    factors = fit_controls(seen / size, known / size, _SAME)
    # The rounding of the gradient itself, whose entries are weights times probabilities.
    stream = Residuals(look, basis, found, factors, _SAME * largest)
    aimed, looks = max(_FEWEST, first_count(each)), 0
    while True:
        while stream.projections.count < aimed:
            stream.observe(generator)
        looks += 1
        low, high = interval(stream.projections, each * share_of_look(looks))
        at = basis @ stream.known
        low, high = at + low - _SAME * size, at + high + _SAME * size
        middle = (low + high) / 2.0
        # Widths fall with the root of the number of observations: some would stay too wide for conclusions.
        wide = float((high - low).max()) / max(float(middle.max() - middle.min()), 1e-300)
        hopeless = wide > _PRECISE * math.sqrt(most / aimed)
        if wide <= _PRECISE or hopeless or aimed >= most or time.perf_counter() > deadline:
            return low, high, stream
        aimed = min(most, math.ceil(_GROWTH * aimed))


def _differences(p: Float[Tensor, " points"]) -> Float[Tensor, "points points"]:
    """Rows that map a one-step gradient to the weight at each token minus that at the middle one."""
    rows = -torch.diag(1.0 / p)
    middle = len(p) // 2
    rows[:, middle] += 1.0 / p[middle]
    return rows
