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
from opdtheory.auditing.sampling.confidence import asymptotic_interval, bounded_interval, tightest_rho
from opdtheory.auditing.sampling.projections import TABLE_BUDGET, Look, Residuals, controls, fit_controls
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import Loss
from opdtheory.exact.sampling import Sampler
from opdtheory.exact.threads import one_thread
from opdtheory.objective import Objective

__all__ = ["SampledWeight", "sampled_weight"]

# Log-ratios: few, as each token needs draws of its own, and a millionth off the round numbers at which losses clip.
_GRID = (-4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
_OFF_ROUND = 1.0 + 2.0**-20

# Observations to which controls are fitted, and from which intervals hold.
_PILOT, _START = 16, 40
_GROWTH = 1.5
_BATCHES_APART = 4

# Intervals this narrow against the weight's range are wide enough for no conclusion to hide in.
_PRECISE = 0.02


@dataclass(frozen=True)
class SampledWeight:
    r"""Intervals for $w(u) - w(1)$ that hold jointly, from one-step policies that differ in `p` at equal ratios.

    Attributes:
        log_u: grid of log-ratios.
        low: lower ends; the hull over the policies where their intervals do not meet.
        high: upper ends, likewise.
        separated: whether two policies have intervals that do not meet: the weight is then no function of `u` alone.
        confidence: joint over grid points, policies and all times; asymptotic.
        hidden: where all observations agreed to rounding, how probable one that does not may yet be; else None.
        batches: calls of the loss.
        rollouts: drawn.
    """

    log_u: Float[Tensor, " points"]
    low: Float[Tensor, " points"]
    high: Float[Tensor, " points"]
    separated: bool
    confidence: float
    hidden: float | None
    batches: int
    rollouts: int

    @property
    def middle(self) -> Float[Tensor, " points"]:
        """The middle of each interval."""
        return (self.low + self.high) / 2.0

    @property
    def widest(self) -> float:
        """Half the widest interval, relative to the range of the middles; inf where that is nothing but noise."""
        half = float((self.high - self.low).max()) / 2.0
        span = float(self.middle.max() - self.middle.min())
        return half / span if span > 0.0 else (0.0 if half == 0.0 else math.inf)

    def recovered(self) -> RecoveredWeight:
        """The middles as a weight; what the intervals do not show is not affirmed."""
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
        """A positive multiple of a weight on the grid, zero at `u = 1`, that lies in every interval, or None."""
        low, high = 0.0, math.inf
        for value, a, b in zip(weight.tolist(), self.low.tolist(), self.high.tolist(), strict=True):
            if abs(value) <= 1e-12 * float(weight.abs().max()):
                if not a <= 0.0 <= b:
                    return None
                continue
            ends = sorted((a / value, b / value))
            low, high = max(low, ends[0]), min(high, ends[1])
        # Where nothing was noisy the ends differ by rounding.
        if high <= 0.0 or low > high * (1.0 + 1e-9):
            return None
        return (low + high) / 2.0 if math.isfinite(high) else None

    def words(self, batch_size: int) -> str:
        """One sentence."""
        text = (
            f"The weight on a token at batch size {batch_size} was sampled at {len(self.log_u)} log-ratios on one-step "
            f"policies, {self.rollouts:,} rollouts, with intervals that hold jointly at {100 * self.confidence:g}%"
        )
        if self.separated:
            return f"{text}: it differs between policies of equal ratios, so it is no function of u alone."
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
    confidence: float,
    seconds: float,
    most: int = 96,
) -> SampledWeight:
    r"""Intervals for the weight $w(u_a) - w(1) = -G_a/p_a + G_1/p_1$ on one-step policies, from drawn batches.

    Args:
        loss: the black box.
        objective: the one that it is thought to follow, for controls: what holds does not depend on it, only how wide
            the intervals are.
        scenario: its batch size, noise of the sampling policy and seed count here.
        confidence: joint level of all intervals.
        seconds: wall-clock budget.
        most: observations of each policy after which no more are made. Where even these would leave intervals too wide
            to conclude from, fewer are.

    Raises:
        LossError: the loss is no differentiable, finite scalar.
    """
    start = time.perf_counter()
    log_u = _OFF_ROUND * torch.tensor(_GRID, dtype=torch.float64)
    generator = torch.Generator().manual_seed(scenario.seed)
    cases, batch_size = bandits(log_u, scenario)[::2], scenario.batch_size
    alpha = (1.0 - confidence) / (len(cases) * (len(log_u) - 1))
    rho = tightest_rho(_START, alpha)
    ends, batches, rollouts, different, observations = [], 0, 0, 0, 0
    with one_thread(), torch.no_grad():
        for case in cases:
            sampler = Sampler.build(case.student, case.teacher, case.behavior, TABLE_BUDGET)
            look = Look(loss, sampler, batch_size, _BATCHES_APART, False)
            found = [c for _, d in objective.terms for c in controls(case, sampler, d, "token_local", 1.0, batch_size)]
            basis = _differences(torch.softmax(sampler.student[0], -1))
            observed, known, gradient_size = [], [], 0.0
            means = torch.stack([c.mean for c in found])
            for _ in range(_PILOT):
                sample, gradient = look.draw(generator)
                table = sampler.scatter(sample.rows, gradient).flatten()
                observed.append(basis @ table)
                gradient_size = max(gradient_size, float(table.abs().max()))
                parts = torch.stack([sampler.scatter(sample.rows, c.gradient(sample)).flatten() for c in found])
                known.append((parts - means) @ basis.T)
            seen = torch.stack(observed)
            # Each log-ratio counts alike: in their own units the noisiest alone would decide.
            size = seen.square().mean(0).sqrt().clamp_min(1e-300)
            factors = fit_controls(seen / size, torch.stack(known) / size, _SAME)
            # Rounding of the gradient itself, whose entries are the weights' times the distributions'.
            stream = Residuals(look, basis, found, factors, _SAME * gradient_size)
            low = high = torch.zeros(len(basis), dtype=torch.float64)
            aimed = _START
            while True:
                while stream.projections.count < aimed:
                    stream.observe(generator)
                low, high = asymptotic_interval(stream.projections, alpha, rho, _START)
                at = basis @ stream.known
                low, high = at + low - _SAME * size, at + high + _SAME * size
                middle = (low + high) / 2.0
                # Widths fall with the root of the number: what would stay too wide to conclude from is left as it is.
                wide = float((high - low).max()) / max(float(middle.max() - middle.min()), 1e-300)
                hopeless = wide > _PRECISE * math.sqrt(most / aimed)
                if wide <= _PRECISE or hopeless or aimed >= most or time.perf_counter() - start > seconds:
                    break
                aimed = min(most, math.ceil(_GROWTH * aimed))
            ends.append((low, high))
            different += stream.different
            observations += stream.projections.count
            batches += look.calls * (stream.projections.count + _PILOT)
            rollouts += look.rollouts * (stream.projections.count + _PILOT)
    lows, highs = (torch.stack([pair[i] for pair in ends]) for i in (0, 1))
    low, high = lows.amax(0), highs.amin(0)
    separated = bool((low > high).any())
    if separated:
        low, high = lows.amin(0), highs.amax(0)
    hidden = bounded_interval(different, observations, 1.0 - confidence)[1] if different == 0 else None
    return SampledWeight(log_u, low, high, separated, confidence, hidden, batches, rollouts)


# Relative rounding of what is linear in a loss's gradient.
_SAME = 1e-10


def _differences(p: Float[Tensor, " points"]) -> Float[Tensor, "points points"]:
    """The rows by which a one-step gradient becomes the weight at each token less that at the middle one."""
    rows = -torch.diag(1.0 / p)
    middle = len(p) // 2
    rows[:, middle] += 1.0 / p[middle]
    return rows
