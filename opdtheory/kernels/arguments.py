"""The checks of arguments that the public functions share."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError, check_integer

__all__ = ["check_device", "check_logits", "check_matching", "check_weights", "shared", "sum_dtype"]


def check_logits(name: str, logits: object) -> None:
    """Raise unless logits are a floating-point tensor `(..., V)` with a vocabulary."""
    if not isinstance(logits, Tensor):
        raise InvalidArgumentError(name, f"must be a tensor of shape (..., V), got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise InvalidArgumentError(name, f"must have a floating-point dtype, got {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise InvalidArgumentError(name, f"must have shape (..., V) with V at least 1, got {tuple(logits.shape)}")


def check_matching(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless a tensor has the shape and device of another one."""
    if tensor.shape != other.shape:
        raise InvalidArgumentError(
            name, f"must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}"
        )
    check_device(name, tensor, other_name, other.device)


def check_device(name: str, tensor: Tensor, other_name: str, device: torch.device) -> None:
    """Raise unless a tensor is on the device of another one."""
    if tensor.device != device:
        raise InvalidArgumentError(name, f"must be on {device} like {other_name}, got {tensor.device}")


def shared(
    positions: Tensor, mask: object, temperature: object, chunk_size: int | None, *logits: Tensor
) -> tuple[torch.dtype, Tensor | None]:
    """The dtype of values and the mask as weights, with the arguments checked that every loss takes.

    Args:
        positions: a tensor of the student's, of shape `(..., V)` or `(..., D)`.
        mask: as in `fused_divergence`.
        temperature: likewise.
        chunk_size: likewise.
        logits: what the dtype of values depends on.
    """
    number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not number or not math.isfinite(temperature) or not temperature > 0:  # type: ignore[arg-type, operator]
        raise InvalidArgumentError("temperature", f"must be a finite number above 0, got {temperature!r}")
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size)
    dtype = sum_dtype(*logits)
    return dtype, _weights(mask, tuple(positions.shape[:-1]), positions.device, dtype)


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of values: float64 if any logits have it, else float32."""
    return torch.float64 if any(each.dtype == torch.float64 for each in tensors) else torch.float32


def _weights(mask: object, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The mask as floating-point weights, one for each position."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise InvalidArgumentError("mask", f"must be a tensor of shape {shape}, got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise InvalidArgumentError("mask", f"must have shape {shape}, one weight per position, got {tuple(mask.shape)}")
    if mask.is_complex():
        raise InvalidArgumentError("mask", f"must hold real numbers or booleans, got {mask.dtype}")
    if mask.requires_grad:
        raise InvalidArgumentError("mask", "must not require a gradient, as it gets none; detach it")
    check_device("mask", mask, "the student", device)
    return mask.to(dtype)


def check_weights(weights: Tensor | None) -> None:
    """Raise unless the weights are finite, which waits for their values."""
    if weights is not None and not bool(torch.isfinite(weights).all()):
        raise InvalidArgumentError("mask", "must be finite, got NaN or infinite weights")
