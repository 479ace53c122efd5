"""The rest of the batch: whether it affects a rollout's gradient, and how a group's weights are centred and scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.auditing.effects.probes import Effect, Pool, cut_short, differ

__all__ = ["batch_effect"]

# How far the last rollout of a batch is exchanged: some rollouts may be alike to a loss, such as in their reward.
_STEPS = (11, 23, 37, 52)

# The epsilon in the denominator of a z-score is at most this share of the spread.
_EPSILON = 1e-3


def batch_effect(pool: Pool, batch_size: int, limit: float) -> Effect:
    """How a rollout's gradient depends on the rest of its batch."""
    if batch_size == 1:
        return Effect()
    size = max(batch_size, 3)
    first = torch.arange(size) * 7 % len(pool)
    one = pool.sensitivity(first)
    for step in _STEPS:
        second = first.clone()
        second[-1] = (first[-1] + step) % len(pool)
        other = pool.sensitivity(second)
        scale = max(float(one.abs().max()), float(other.abs().max()), 1e-300)
        if differ(one[:-1], other[:-1], limit * scale):
            return Effect(True, [_kind(pool, first, second, limit)])
    shorter, size_of = pool.sensitivity(first, cut_short(0)), max(float(one.abs().max()), 1e-300)
    if differ(one[1:], shorter[1:], limit * size_of):
        text = "The gradient of a rollout depends on the lengths of the others, as a mean over all tokens does (T11)."
        return Effect(False, [text])
    return Effect()


def _kind(pool: Pool, first: Tensor, second: Tensor, limit: float) -> str:
    """The coupling in a sentence, from groups that differ in their last rollout, and from a larger group."""
    text = "The other rollouts of the batch enter a rollout's gradient"
    (mine, score), (theirs, _) = pool.advantages(first), pool.advantages(second)
    if not score:
        return f"{text}, not as a weight of its tokens' scores."
    scale = float(mine.abs().max())
    gaps, gaps_again = mine[0] - mine[1], theirs[0] - theirs[1]
    centred = float(mine.mean(0).abs().max()) <= limit * scale
    larger, _ = pool.advantages(torch.cat([first, (first[-1:] + 13) % len(pool)]))
    if differ(gaps, gaps_again, limit * scale):
        return f"{text}: {_scaled(mine, theirs, larger, centred)}"
    if not centred:
        overall = float(mine.mean().abs()) <= limit * scale
        what = "the mean over all tokens of the batch" if overall else "a baseline that is not their mean"
        return f"{text}: {what} is subtracted."
    ratio = float((larger[0] - larger[1]) @ gaps / (gaps @ gaps))
    count = len(first)
    if abs(ratio - 1.0) <= 1e-6:
        return f"{text}: the group's mean, the rollout's own included, is subtracted: (G-1)/G of the gradient (T7e)."
    if abs(ratio - (count + 1) * (count - 1) / count**2) <= 1e-6:
        return f"{text}: the mean of the others (leave-one-out) is subtracted, which does not bias (T7e)."
    return f"{text}: their mean is subtracted, at a scale that changes with the group's size."


def _scaled(mine: Tensor, theirs: Tensor, larger: Tensor, centred: bool) -> str:
    """The divisor, from the sum of squared weights, which a z-score makes equal for all groups."""
    if not centred:
        return "its weights are rescaled by a function of the others."
    text = "weights are centred and divided by the group's standard deviation"
    for whole, where in ((False, "position by position"), (True, "over all its tokens")):
        one, other, more = (x.square().sum() if whole else x.square().sum(0) for x in (mine, theirs, larger))
        if not bool(((one - other).abs() <= _EPSILON * one).all()):
            continue
        count, growth = len(mine), float((more / one).mean())
        for degrees, divisor in ((count / (count - 1), "G-1"), ((count + 1) / count, "G")):
            if abs(growth - degrees) <= _EPSILON:
                return f"{text}, {where} (z-score with divisor {divisor}), which biases (T7e)."
        return f"{text}, {where} (z-score), which biases (T7e)."
    return "weights are centred and rescaled by a function of the others."
