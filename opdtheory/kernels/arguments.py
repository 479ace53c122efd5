"""What the public functions ask of their arguments."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = [
    "check_chunk",
    "check_logits",
    "check_matching",
    "check_temperature",
    "check_weights",
    "sum_dtype",
    "weights_of",
]


def check_logits(name: str, logits: object) -> None:
    """Refuse what is no floating tensor `(..., V)` with a vocabulary."""
    if not isinstance(logits, Tensor):
        raise InvalidArgumentError(name, f"got {type(logits).__name__}; a floating tensor of shape (..., V) is needed")
    if not logits.is_floating_point():
        raise InvalidArgumentError(name, f"has dtype {logits.dtype}; a floating dtype is needed")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise InvalidArgumentError(name, f"has shape {tuple(logits.shape)}; (..., V) with V at least 1 is needed")


def check_matching(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse another shape or device than that of the student's tensor."""
    if tensor.shape != other.shape:
        raise InvalidArgumentError(
            name, f"has shape {tuple(tensor.shape)}; that of {other_name}, {tuple(other.shape)}, is needed"
        )
    if tensor.device != other.device:
        raise InvalidArgumentError(name, f"is on {tensor.device}, {other_name} on {other.device}; move one of them")


def check_temperature(temperature: object) -> None:
    """Refuse what is no positive finite number."""
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not number or not math.isfinite(temperature) or not temperature > 0:  # type: ignore[arg-type, operator]
        raise InvalidArgumentError("temperature", f"is {temperature!r}; a finite number above 0 is needed")


def check_chunk(chunk_size: object) -> None:
    """Refuse what is neither None nor a positive integer."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise InvalidArgumentError("chunk_size", f"is {chunk_size!r}; a number of positions, at least 1, is needed")


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of values: float64 where any logits have it, else float32."""
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def weights_of(mask: object, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The mask as floating weights, one for each position."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise InvalidArgumentError("mask", f"got {type(mask).__name__}; a tensor of shape {shape} is needed")
    if tuple(mask.shape) != shape:
        raise InvalidArgumentError(
            "mask", f"has shape {tuple(mask.shape)}; one weight per position, {shape}, is needed"
        )
    if mask.is_complex():
        raise InvalidArgumentError("mask", f"has dtype {mask.dtype}; real numbers or booleans are needed")
    if mask.requires_grad:
        raise InvalidArgumentError("mask", "requires a gradient, which it is not given; detach it")
    if mask.device != device:
        raise InvalidArgumentError("mask", f"is on {mask.device}, the student on {device}; move one of them")
    return mask.to(dtype)


def check_weights(weights: Tensor | None) -> None:
    """Refuse weights that are not finite; their values are looked at."""
    if weights is not None and not bool(torch.isfinite(weights).all()):
        raise InvalidArgumentError("mask", "holds NaN or infinite weights; finite ones are needed")
