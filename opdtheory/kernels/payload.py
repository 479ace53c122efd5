"""The checks of what a teacher server sends: of tensors, and of numbers, for which the host waits."""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import arguments

__all__ = [
    "check_payload_entries",
    "check_payload_shapes",
    "check_probabilities",
    "check_sampled_entries",
    "check_sampled_shapes",
    "payload_is_wrong",
    "probabilities_are_wrong",
    "sampled_is_wrong",
    "with_tail",
]

_EXCESS = 1e-3  # rounding of log-probabilities in bfloat16 may take their sum this far above one


def check_probabilities(logprobs: Tensor) -> None:
    """Raise unless the tokens of each payload leave a probability for others, up to rounding."""
    if bool(probabilities_are_wrong(logprobs)):
        total = logprobs.detach().double().exp().sum(-1)
        raise InvalidArgumentError(
            "teacher_logprobs",
            f"must sum to a probability of at most 1, got {float(total.max()):.6g}; use nats",
        )


def probabilities_are_wrong(logprobs: Tensor) -> Tensor:
    """Whether `check_probabilities` would raise, on the device, for which nobody waits."""
    return (logprobs.detach().double().exp().sum(-1) > 1 + _EXCESS).any()


def with_tail(logprobs: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities in float64, `(..., k + 1)`, the last being that of all other tokens."""
    log_q = logprobs.detach().double()
    total = log_q.exp().sum(-1, keepdim=True)
    tail = (1 - total).clamp(min=0.0) if logprobs.shape[-1] < vocabulary else torch.zeros_like(total)
    return torch.cat([log_q, tail.log()], dim=-1)


def check_payload_shapes(logits: Tensor, ids: object, logprobs: object) -> None:
    """Raise unless tokens and log-probabilities are tensors that fit rows of logits."""
    shape = tuple(logits.shape[:-1])
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidArgumentError("teacher_ids", f"must be an int64 tensor of shape {(*shape, 'k')}, got {found}")
    if ids.ndim != logits.ndim or tuple(ids.shape[:-1]) != shape or ids.shape[-1] == 0:
        raise InvalidArgumentError("teacher_ids", f"must have shape {(*shape, 'k')}, got {tuple(ids.shape)}")
    arguments.check_logits("teacher_logprobs", logprobs)
    assert isinstance(logprobs, Tensor)
    arguments.check_matching("teacher_logprobs", logprobs, "teacher_ids", ids)
    arguments.check_device("teacher_ids", ids, "student_logits", logits.device)


def check_payload_entries(logits: Tensor, ids: Tensor, logprobs: Tensor) -> None:
    """Raise unless tokens and log-probabilities are what a teacher server sends for rows of logits.

    Raises:
        InvalidArgumentError: a token is repeated or outside the vocabulary, or NaN.
    """
    vocabulary, ordered = logits.shape[-1], ids.sort(-1).values
    if not ids.numel() or not bool(payload_is_wrong(vocabulary, ordered, logprobs)):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InvalidArgumentError("teacher_ids", f"must hold tokens in [0, {vocabulary}), got {low} to {high}")
    if bool(_repeated(ordered)):
        raise InvalidArgumentError(
            "teacher_ids", "must be distinct at each position, as a repeated one would count twice"
        )
    raise InvalidArgumentError("teacher_logprobs", "must not hold NaN")


def payload_is_wrong(vocabulary: int, ordered: Tensor, logprobs: Tensor) -> Tensor:
    """Whether `check_payload_entries` would raise, on the device, for which nobody waits; tokens in ascending order."""
    outside = ((ordered[..., 0] < 0) | (ordered[..., -1] >= vocabulary)).any()
    return outside | _repeated(ordered) | torch.isnan(logprobs).any()


def _repeated(ordered: Tensor) -> Tensor:
    return (ordered[..., 1:] == ordered[..., :-1]).any()


def check_sampled_shapes(logits: Tensor, tokens: object, logprobs: object) -> None:
    """Raise unless sampled tokens and their log-probabilities are tensors that fit rows of logits."""
    shape = tuple(logits.shape[:-1])
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tuple(tokens.shape) != shape:
        found = f"{tokens.dtype}, {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidArgumentError("tokens", f"must be an int64 tensor of shape {shape}, got {found}")
    if not isinstance(logprobs, Tensor) or not logprobs.is_floating_point() or tuple(logprobs.shape) != shape:
        found = (
            f"{logprobs.dtype}, {tuple(logprobs.shape)}" if isinstance(logprobs, Tensor) else type(logprobs).__name__
        )
        raise InvalidArgumentError("token_logprobs", f"must be a floating-point tensor of shape {shape}, got {found}")
    for name, tensor in (("tokens", tokens), ("token_logprobs", logprobs)):
        arguments.check_device(name, tensor, "student_logits", logits.device)


def check_sampled_entries(vocabulary: int, tokens: Tensor, logprobs: Tensor) -> None:
    """Raise unless sampled tokens are in the vocabulary or -100, and their log-probabilities are numbers."""
    if not tokens.numel():
        return
    if bool(_not_tokens(vocabulary, tokens)):
        low, high = int(tokens.min()), int(tokens.max())
        raise InvalidArgumentError("tokens", f"must hold tokens in [0, {vocabulary}) or -100, got {low} to {high}")
    if bool((torch.isnan(logprobs) & (tokens >= 0)).any()):
        raise InvalidArgumentError("token_logprobs", "must not hold NaN")


def sampled_is_wrong(vocabulary: int, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Whether `check_sampled_entries` would raise, on the device, for which nobody waits."""
    return _not_tokens(vocabulary, tokens) | (torch.isnan(logprobs) & (tokens >= 0)).any()


def _not_tokens(vocabulary: int, tokens: Tensor) -> Tensor:
    return ((tokens >= vocabulary) | ((tokens < 0) & (tokens != -100))).any()
