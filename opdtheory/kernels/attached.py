"""Values whose gradient is already known, which is multiplied by what comes from upstream; no second derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from opdtheory.kernels import sweep
from opdtheory.kernels.distributions import default_rows
from opdtheory.kernels.pieces import matrices

__all__ = ["attached", "graph_is_kept", "last", "outside_graphs", "scaled"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Where torch cannot tell, the graph may be kept, and nothing may be overwritten.
graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def outside_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, left alone by `torch.compile`, whose graph breaks there."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            # Not as a decorator, which would load the compiler with the module.
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def attached(name: str, logits: Tensor, values: Tensor, gradient: Tensor | None) -> Tensor:
    """The values, `(...)`, as a function of the logits with the gradient, `(..., V)`, or without any."""
    result: Tensor = values if gradient is None else _Attached.apply(name, logits, values, gradient)
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
    """A gradient whose own derivative in the sources raises an error rather than being zero."""
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
    """The gradient of each position times what comes from upstream; no pass is made where that is one everywhere."""
    if gradient.dtype != torch.float64 and sweep.has_programs(gradient.device):
        from opdtheory.kernels.programs.rescale import rescale

        out = gradient if in_place else torch.empty_like(gradient)
        # A number for all, as from a sum, stays one.
        upstream = upstream if not any(upstream.stride()) else upstream.contiguous()
        for (source, target), (factors,) in matrices([gradient, out], [upstream]):
            rescale(source, factors, source if in_place else target)
        return out
    if bool((upstream == 1).all()):
        return gradient if in_place else gradient.clone()
    out = gradient if in_place else torch.empty_like(gradient)
    rows = default_rows(gradient.shape[-1], gradient.device)
    for (source, target), (factor,) in matrices([gradient, out], [upstream.contiguous()]):
        for start in range(0, source.shape[0], rows):
            part = slice(start, start + rows)
            target[part] = (source[part] * factor[part].unsqueeze(-1)).to(out.dtype)
    return out
