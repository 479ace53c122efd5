"""Changes to a black-box loss: each takes a loss and returns the changed one.

Only the inputs and outputs of the loss are changed, so no source is needed. Every change keeps the sign convention.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.reductions import PerToken, averaged_over_rollouts, rollout_lengths, weighted_tokens
from opdtheory.auditing.remembered import content
from opdtheory.choices import REDUCTIONS
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = [
    "PerToken",
    "advantage_added",
    "averaged_over_rollouts",
    "on_policy_view",
    "padding_hidden",
    "reduction_of_values",
    "rollout_lengths",
    "scaled",
    "times_longest",
    "times_padded",
    "token_values",
    "value_added",
    "value_as_reward",
    "weighted_tokens",
]


def scaled(loss: Loss, factor: float) -> Loss:
    """The loss times a constant."""
    return lambda rollouts: factor * loss(rollouts)


def times_padded(loss: Loss) -> Loss:
    """A loss that divides by the padded length, times that length (T17)."""
    return lambda rollouts: rollouts.mask.shape[1] * loss(rollouts)


def times_longest(loss: Loss) -> Loss:
    r"""A loss that divides by the longest rollout, times that length, $\ell\,\max_b \sum_n m_{bn}$ (T17)."""

    def changed(rollouts: Rollouts) -> Tensor:
        value = loss(rollouts)
        return (value * rollouts.mask.sum(-1).max()).to(value.dtype)

    return changed


def value_added(loss: Loss, value: PerToken) -> Loss:
    """The loss plus a differentiable value of each token, summed over tokens and averaged over rollouts."""

    def summed(rollouts: Rollouts) -> Tensor:
        before = loss(rollouts)
        return (before + rollouts.token_sum(value(rollouts))).to(before.dtype)

    return summed


def advantage_added(loss: Loss, advantage: PerToken) -> Loss:
    r"""The loss with a detached term added to its advantage, $\ell - \mathrm{sg}(a_n)\log p(y_n|h_n)$ on each token."""
    return value_added(loss, lambda rollouts: -advantage(rollouts).detach() * rollouts.student_logprobs)


def on_policy_view(loss: Loss) -> Loss:
    r"""The loss as if the current student had sampled: $\mu = p$ in every ratio that it forms (T8)."""
    return lambda rollouts: loss(replace(rollouts, behavior_logprobs=rollouts.student_logprobs.detach()))


def padding_hidden(loss: Loss) -> Loss:
    """The loss with masked positions hidden: the teacher equals the student there, and they get no gradient."""

    def hidden(rollouts: Rollouts) -> Tensor:
        live, student = rollouts.mask > 0, rollouts.student_logits.detach()
        return loss(
            replace(
                rollouts,
                teacher_logits=torch.where(live.unsqueeze(-1), rollouts.teacher_logits, student),
                teacher_logprobs=torch.where(live, rollouts.teacher_logprobs, rollouts.student_logprobs.detach()),
                behavior_logprobs=torch.where(live, rollouts.behavior_logprobs, rollouts.student_logprobs.detach()),
            )
        )

    return weighted_tokens(hidden, lambda rollouts: rollouts.mask)


def value_as_reward(loss: Loss, reduction: str = "token_sum") -> Loss:
    r"""The loss's detached value of each token as a reward: $\mathrm{sg}(v_n)\log p(y_n|h_n)$ instead of $v_n$ (T4).

    Args:
        loss: the black box.
        reduction: the reduction of its values, see `reduction_of_values`.
    """
    known: dict[bytes, float] = {}

    def rewarded(rollouts: Rollouts) -> Tensor:
        values = token_values(loss, rollouts, known) * rollouts.student_logprobs
        reduced: Tensor = getattr(rollouts, reduction)(values)
        return reduced

    return rewarded


def reduction_of_values(loss: Loss, batches: list[Rollouts], limit: float) -> str | None:
    """The reduction by which the loss of every batch is that of its tokens' own values; None if there is none."""
    known: dict[bytes, float] = {}
    values = [token_values(loss, rollouts, known) for rollouts in batches]
    whole = torch.stack([loss(rollouts).detach().double() for rollouts in batches])
    for reduction in REDUCTIONS:
        parts = torch.stack([getattr(r, reduction)(v).double() for r, v in zip(batches, values, strict=True)])
        if float((parts - whole).abs().max()) <= limit * float(whole.abs().max()):
            return reduction
    return None


def token_values(loss: Loss, rollouts: Rollouts, known: dict[bytes, float] | None = None) -> Float[Tensor, "B T"]:
    """The detached value of the loss on each unmasked token alone.

    Args:
        loss: the black box; it sees one rollout at a time, cut after the token, with all earlier tokens masked.
        rollouts: the batch.
        known: values by content of the rollout, to which new ones are added.
    """
    known = {} if known is None else known
    values = torch.zeros_like(rollouts.mask)
    for b, n in rollouts.mask.nonzero().tolist():
        alone = _up_to(rollouts, b, n)
        key = content(alone)
        if key not in known:
            known[key] = float(loss(replace(rollouts, **alone)).detach())
        values[b, n] = known[key]
    return values


def _up_to(rollouts: Rollouts, b: int, n: int) -> dict[str, Any]:
    """The fields of one rollout, cut after position `n`, with only that position unmasked."""
    cut: dict[str, Any] = {}
    for field in fields(rollouts):
        value = getattr(rollouts, field.name)
        if isinstance(value, Tensor) and value.shape[:2] == rollouts.mask.shape:
            cut[field.name] = value[b : b + 1, : n + 1].detach()
    cut["mask"] = torch.zeros_like(cut["mask"])
    cut["mask"][0, n] = 1.0
    return cut
