"""What TRL's `loss_type` makes of the sum over tokens: which objective of T11 the mean is, and at what scale."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["Mean", "disturbances", "mean_of", "other_laws", "reduced"]


class Mean(NamedTuple):
    r"""The reduction that a `loss_type` is, in the words of T11, and its scale where it is a sum over tokens.

    Attributes:
        reduction: `token_sum`, `token_mean` (over the rollouts of a step or micro-batch) or `sequence_mean`.
        scale: the expected gradient is this times that of `token_local`; None where it is no multiple of it.
    """

    reduction: str
    scale: float | None


_REDUCTIONS = {
    **dict.fromkeys(("dr_grpo", "luspo"), "token_sum"),
    **dict.fromkeys(("dapo", "bnpo", "cispo", "vespo"), "token_mean"),
    **dict.fromkeys(("grpo", "sapo"), "sequence_mean"),
}


# Values with which sampling is from the whole law.
_WHOLE = {"top_p": (1.0,), "top_k": (0,), "min_p": (0.0,), "repetition_penalty": (1.0,)}


def mean_of(loss_type: str, max_completion_length: int) -> Mean:
    """The mean that a `loss_type` takes.

    Args:
        loss_type: of `GRPOConfig`.
        max_completion_length: likewise.
    """
    reduction = _REDUCTIONS.get(loss_type, "unknown")
    scale = {"dr_grpo": 1.0 / max_completion_length, "luspo": 1.0}.get(loss_type)
    return Mean(reduction, scale)


def disturbances(args: Any) -> list[str]:
    """The settings of a `GRPOConfig` with which the expected gradient is no longer that of the divergence.

    Args:
        args: the configuration.
    """
    found = []
    if args.importance_sampling_level != "token":
        found.append(f"importance_sampling_level={args.importance_sampling_level!r} mixes the tokens of a rollout")
    if args.mask_truncated_completions:
        found.append("mask_truncated_completions=True drops the longest rollouts")
    if args.top_entropy_quantile < 1.0:
        found.append(f"top_entropy_quantile={args.top_entropy_quantile} drops histories of low entropy")
    if getattr(args, "off_policy_mask_threshold", None) is not None:
        found.append("off_policy_mask_threshold drops rollouts by the sign of their advantage")
    return found + other_laws(args)


def other_laws(args: Any) -> list[str]:
    """The settings of a configuration with which rollouts are not of the law that the loss scores (T15, T16c).

    Args:
        args: a `GRPOConfig` or `DistillationConfig`.
    """
    given = {name: getattr(args, name, None) for name in ("temperature", *_WHOLE)}
    given |= {name: value for name, value in (args.generation_kwargs or {}).items() if name in given}
    whole = {**_WHOLE, "temperature": (args.temperature,)}
    return [
        f"{name}={value} samples from another law than the loss scores"
        for name, value in given.items()
        if value is not None and value not in whole[name]
    ]


def reduced(
    loss_type: str, values: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"], longest: int, steps: int, items: Any
) -> Tensor:
    """The mean over tokens that TRL takes of its own loss, of other values.

    Args:
        loss_type: `dr_grpo`, `luspo`, `dapo`, `bnpo` or `grpo`.
        values: one for each token.
        mask: 1 on the tokens that count.
        longest: `max_completion_length`.
        steps: the micro-batches of a step; 1 in evaluation.
        items: the tokens of a step in a process, which `dapo` divides by.
    """
    per_rollout = (values * mask).sum(-1)
    if loss_type == "dapo":
        return per_rollout.sum() / items
    if loss_type == "bnpo":
        return per_rollout.sum() / mask.sum().clamp(min=1.0) / steps
    if loss_type == "grpo":
        per_rollout = per_rollout / mask.sum(-1).clamp(min=1.0)
    elif loss_type == "dr_grpo":
        per_rollout = per_rollout / longest
    return per_rollout.mean() / steps
