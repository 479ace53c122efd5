"""A loss as an audit's settings call it: with further teachers, a base policy and rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.auditing.black_box import BlackBox
from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.records import Finite, Keyed
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.exact import Loss
from opdtheory.exact.companions import PrefixPolicy, random_rewards
from opdtheory.rollouts import Extras, Rollouts, Scored, gather_logprobs

__all__ = ["RewardPart", "accompanied", "reward_part", "set_apart", "without_reward"]

# A change this small relative to the noise of the gradient is rounding.
_ZERO = 1e-12

# Pairs of the panel on which the reward's part is measured.
_MEASURED = slice(1, 4, 2)


def accompanied(loss: Loss, scenario: Scenario, reward_seed: int = 0, sign: float = 1.0) -> Loss:
    r"""The loss of a micro-batch under a scenario's settings; the loss itself if they add nothing.

    Rollouts get the extras that the scenario asks for. Micro-batches are independent and alike, so that the mean of
    their losses, $\frac1M\sum_m \ell(b_m)$, has the expected gradient of one of them, and their sum $M$ times
    that (T17).

    Args:
        loss: a function of rollouts that returns a scalar.
        scenario: the settings.
        reward_seed: another one gives another reward.
        sign: the factor of the reward.
    """
    called = loss
    if scenario.teachers > 1 or scenario.base or scenario.reward:
        others, base = scenario.companions()
        seed = 1000 * scenario.seed + reward_seed if scenario.reward else None
        called = _with_extras(called, others, base, seed, sign)
    if scenario.microbatches > 1 and scenario.accumulate == "sum":
        return lambda r: scenario.microbatches * called(r)
    return called


def _with_extras(
    loss: Loss, others: tuple[PrefixPolicy, ...], base: PrefixPolicy | None, seed: int | None, sign: float
) -> Loss:
    def called(r: Rollouts) -> Tensor:
        rewards = None if seed is None else sign * random_rewards(r.tokens, r.mask, seed).to(r.mask.dtype)
        scored = Extras(tuple(_scored(r, each) for each in others), None if base is None else _scored(r, base), rewards)
        # Unchecked: a loss is called thousands of times.
        return loss(Rollouts.unchecked(**{**vars(r), "extras": scored}))

    return called


def _scored(r: Rollouts, policy: PrefixPolicy) -> Scored:
    logits = policy.logits(r.tokens, r.mask, r.teacher_logits.shape[-1]).to(r.teacher_logits.dtype)
    return Scored(logits, gather_logprobs(logits, r.tokens, r.mask))


@dataclass(frozen=True, eq=False)
class RewardPart(Keyed):
    r"""The part of a loss that is a policy gradient of the task's reward, $-c\,E[R\,\nabla \log p(y)]$, set apart.

    Attributes:
        coefficient: $c$, one number for all pairs; positive: the loss raises the reward.
        error: what the loss owes to the reward beyond that, relative to all that it owes to the reward.
        tolerance: relative error that counts as rounding.
    """

    coefficient: Finite
    error: Finite
    tolerance: Finite

    @property
    def words(self) -> str:
        """The part in a sentence."""
        if self.coefficient == 0.0 and self.error == 0.0:
            return "The loss does not depend on the task's reward."
        part = f"{self.coefficient:.6g} times the policy gradient of the task's reward"
        if self.error <= self.tolerance:
            return f"Set apart: {part}; all else is said of the rest."
        return (
            f"Set apart: {part}, but {100 * self.error:.3g}% of what the loss owes to the reward is something else, "
            "which counts as its error."
        )


def set_apart(
    loss: Loss, scenario: Scenario, cases: list[Case], counted: BlackBox
) -> tuple[BlackBox, RewardPart | None]:
    """The loss without its reward and what was set apart; without a reward, the loss as it is and None.

    Args:
        loss: the loss as its author wrote it.
        scenario: the settings.
        cases: the panel.
        counted: the loss as the settings call it.

    Raises:
        LossError: as `reward_part`.
    """
    if not scenario.reward:
        return counted, None
    part = reward_part(loss, scenario, cases, counted.tolerance)
    return without_reward(loss, scenario, part, counted), part


def reward_part(loss: Loss, scenario: Scenario, cases: list[Case], tolerance: float) -> RewardPart:
    r"""Measure how the reward enters a loss, whatever else the loss does.

    Two rewards $R_1, R_2$ on the same policies change the expected gradient by $-c\,E[(R_1 - R_2) s]$ if the reward
    enters by its policy gradient alone; $c$ is the least-squares one over the pairs.

    Args:
        loss: the loss as its author wrote it.
        scenario: the settings.
        cases: the panel.
        tolerance: relative error that counts as rounding.

    Raises:
        LossError: as `gradient_moments`.
    """
    shifts, slopes, noise = [], [], 0.0
    for case in cases[_MEASURED]:
        moments = [scenario.moments(accompanied(loss, scenario, seed), case) for seed in (0, 1)]
        rewarded = [scenario.moments(accompanied(_reinforce, scenario, seed), case) for seed in (0, 1)]
        shifts.append(flat(moments[0].mean) - flat(moments[1].mean))
        slopes.append(flat(rewarded[0].mean) - flat(rewarded[1].mean))
        noise = max(noise, *(m.second_moment for m in moments))
    shift, slope = torch.cat(shifts), torch.cat(slopes)
    if float(shift.norm()) <= _ZERO * noise**0.5:
        return RewardPart(0.0, 0.0, tolerance)
    coefficient = float(shift @ slope) / float(slope @ slope)
    return RewardPart(coefficient, float((shift - coefficient * slope).norm() / shift.norm()), tolerance)


def without_reward(loss: Loss, scenario: Scenario, part: RewardPart, counted: BlackBox) -> BlackBox:
    r"""What a loss is beside the reward's policy gradient, as a black box that goes on counting.

    A policy gradient changes its sign with the reward, whatever its baseline and its multiple at other batch sizes, so
    that $\frac12[\ell(R) + \ell(-R)]$ is the rest. Of a reward that enters otherwise, the nearest policy gradient is
    subtracted, and what is left of it is an error of the loss.

    Args:
        loss: the loss as its author wrote it.
        scenario: the settings.
        part: what `reward_part` found.
        counted: the loss as the settings call it, whose calls and tolerance go on.
    """
    if part.coefficient == 0.0 and part.error == 0.0:
        return counted
    opposite = accompanied(loss, scenario, sign=-1.0)
    surrogate = accompanied(lambda r: part.coefficient * _reinforce(r), scenario)

    def averaged(r: Rollouts) -> Tensor:
        return (counted(r) + opposite(r)) / 2

    def subtracted(r: Rollouts) -> Tensor:
        value = counted(r)
        return value - surrogate(r).to(value.dtype)

    rest = BlackBox(averaged if part.error <= part.tolerance else subtracted, counted.stated)
    rest.calls = counted.calls
    return rest


def _reinforce(r: Rollouts) -> Tensor:
    r"""A surrogate of $-E_p[R\,\nabla\log p(y)]$, with the ratio $p/\mu$ of the rollout if another policy sampled."""
    log_ratio = r.mask * (r.student_logprobs - r.behavior_logprobs).detach()
    weight = r.rewards * log_ratio.sum(-1).exp()
    return -r.token_sum(weight.unsqueeze(-1) * r.student_logprobs)
