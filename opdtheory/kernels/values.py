"""Values with their gradient from the forward pass, differentiable to the second order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from opdtheory.divergences import Divergence
from opdtheory.divergences.divergence import transforms_active
from opdtheory.kernels import arguments
from opdtheory.kernels.attached import graph_is_kept, scaled
from opdtheory.kernels.curvature import hessian_product
from opdtheory.kernels.sweep import Evaluator, sweep

__all__ = ["Settings", "differentiable_values", "values_and_gradient"]


class Settings(NamedTuple):
    """The arguments of a call other than tensors."""

    divergence: Divergence
    temperature: float
    chunk_size: int | None


def differentiable_values(student: Tensor, teacher: Tensor, weights: Tensor | None, settings: Settings) -> Tensor:
    """The values, with a graph where one is needed."""
    values: Tensor = _Values.apply(student, teacher, weights, settings, _differentiated(student))[0]
    return values


def values_and_gradient(
    student: Tensor, teacher: Tensor, weights: Tensor | None, settings: Settings, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The values, and their gradient or, if it is not wanted, an empty tensor."""
    dtype = arguments.sum_dtype(student, teacher)
    values = torch.empty(student.shape[:-1], dtype=dtype, device=student.device)
    gradient = torch.empty(student.shape if wanted else (0,), dtype=student.dtype, device=student.device)
    if values.numel():
        evaluator = Evaluator.of(settings.divergence, dtype, 1.0 / settings.temperature)
        if not evaluator.has_programs(student.device):
            arguments.check_weights(weights)
        sweep(evaluator, student, teacher, weights, settings.chunk_size, values, gradient if wanted else None)
    return values, gradient


def _differentiated(student: Tensor) -> bool:
    if transforms_active():
        return True
    recorded = student.requires_grad and torch.is_grad_enabled()
    return recorded or forward_ad.unpack_dual(student).tangent is not None


class _Values(torch.autograd.Function):
    """The values, with the gradient kept for the backward pass."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, weights: Tensor | None, settings: Settings, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        return values_and_gradient(student, teacher, weights, settings, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        student, teacher, weights, ctx.settings, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], student, teacher, weights)
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None]:
        if upstream is None:
            return None, None, None, None, None
        gradient, student, teacher, weights = ctx.saved_tensors
        if torch.is_grad_enabled() or transforms_active():
            found = _Gradient.apply(gradient, upstream, student, teacher, weights, ctx.settings)
        else:
            found = scaled(gradient, upstream, in_place=not graph_is_kept())
        return found, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * tangent).sum(-1), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return _Values.apply(*_leading(info, in_dims, inputs)), (0, 0)


class _Gradient(torch.autograd.Function):
    """The gradient times what comes from upstream, differentiable once more."""

    @staticmethod
    def forward(
        gradient: Tensor, upstream: Tensor, student: Tensor, teacher: Tensor, weights: Tensor | None, settings: Settings
    ) -> Tensor:
        return scaled(gradient, upstream, in_place=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.settings = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, vectors: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        gradient, upstream, student, teacher, weights = ctx.saved_tensors
        product = _HessianProduct.apply(student, teacher, _product(weights, upstream), vectors, ctx.settings)
        return None, (gradient * vectors).sum(-1).to(upstream.dtype), product, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: Any, by_upstream: Tensor | None, by_student: Tensor | None, *__: Any) -> Tensor:
        gradient, upstream, student, teacher, weights = ctx.saved_tensors
        total = torch.zeros_like(gradient)
        if by_upstream is not None:
            total = total + (gradient * by_upstream.unsqueeze(-1)).to(gradient.dtype)
        if by_student is not None:
            scale = _product(weights, upstream)
            total = total + _HessianProduct.apply(student, teacher, scale, by_student, ctx.settings)
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
        return _Gradient.apply(*_leading(info, in_dims, inputs)), 0


class _HessianProduct(torch.autograd.Function):
    """The Hessian times vectors, times a weight; derivatives end here."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, weights: Tensor, vectors: Tensor, settings: Settings) -> Tensor:
        return hessian_product(
            settings.divergence, student, teacher, weights, vectors, 1.0 / settings.temperature, settings.chunk_size
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.label = inputs[-1].divergence.label

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise NotImplementedError(f"fused_divergence of {ctx.label}: derivatives end at the second")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"fused_divergence of {ctx.label}: derivatives end at the second")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
        return _HessianProduct.apply(*_leading(info, in_dims, inputs)), 0


def _product(weights: Tensor | None, upstream: Tensor) -> Tensor:
    return upstream if weights is None else weights * upstream


def _leading(info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The inputs with the mapped dimension as a leading one, which every function here accepts."""
    moved = []
    for each, dim in zip(inputs, in_dims, strict=True):
        if not isinstance(each, Tensor):
            moved.append(each)
        elif dim is None:
            moved.append(each.expand(info.batch_size, *each.shape))
        else:
            moved.append(each.movedim(dim, 0))
    return moved
