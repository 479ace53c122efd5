"""Values whose gradient is already known, and what comes from upstream multiplied into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdtheory.kernels.distributions import default_rows
from opdtheory.kernels.sweep import matrices

__all__ = ["attached", "graph_is_kept", "last", "scaled"]

# Without it the graph may be kept: then nothing may be overwritten.
graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def attached(name: str, logits: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
    """The values, `(...)`, as a function of the logits with that gradient, `(..., V)`; first derivatives only."""
    result: Tensor = _Attached.apply(name, logits, values, gradient)
    return result


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, logits: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.name = name
        ctx.save_for_backward(logits, gradient)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        logits, gradient = ctx.saved_tensors
        found = scaled(gradient, upstream.detach(), in_place=not graph_is_kept())
        return None, last(ctx.name, found, upstream, logits), None, None


def last(name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
    """A gradient whose own derivative in the sources is refused rather than taken to be zero."""
    if not torch.is_grad_enabled():
        return gradient
    result: Tensor = _Last.apply(name, gradient, *sources)
    return result


class _Last(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} has first derivatives only; fused_divergence of logits has the second")


def scaled(gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
    """The gradient of each position times what comes from upstream, without a pass where that is one everywhere."""
    if bool((upstream == 1).all()):
        return gradient if in_place else gradient.clone()
    out = gradient if in_place else torch.empty_like(gradient)
    rows = default_rows(gradient.shape[-1], gradient.device)
    for (source, target), (factor,) in matrices([gradient, out], [upstream.contiguous()]):
        for start in range(0, source.shape[0], rows):
            part = slice(start, start + rows)
            target[part] = (source[part] * factor[part].unsqueeze(-1)).to(out.dtype)
    return out
