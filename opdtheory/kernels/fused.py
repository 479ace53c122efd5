r"""The divergence of whole next-token laws from logits, with its gradient found in the forward pass (T1, T12)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd import forward_ad

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.divergences.divergence import transforms_active
from opdtheory.kernels import arguments
from opdtheory.kernels.attached import graph_is_kept, scaled
from opdtheory.kernels.curvature import hessian_product
from opdtheory.kernels.sweep import Evaluator, sweep

__all__ = ["Settings", "differentiable_values", "fused_divergence", "values_and_gradient"]


class Settings(NamedTuple):
    """What a call asked for beside its tensors."""

    divergence: Divergence
    temperature: float
    chunk_size: int | None


def fused_divergence(
    student_logits: Float[Tensor, "*batch V"],
    teacher_logits: Float[Tensor, "*batch V"],
    divergence: str | Divergence,
    mask: Shaped[Tensor, "*batch"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""The divergence of the whole next-token laws at each position, times its weight, in little time and memory.

    $$\ell_n = m_n \sum_a p_n(a)\, f\!\left(\frac{q_n(a)}{p_n(a)}\right), \qquad
    \frac{\partial \ell_n}{\partial z_a} = -\frac{m_n}{\tau}\, p_n(a)\,\bigl(w_f(u_a) - E_{p_n} w_f\bigr)$$

    with $p = \mathrm{softmax}(z/\tau)$, $q$ the same of the teacher, and $u = q/p$: T1 at every position, so that the
    sum is `token_local` (T12). In nats, to be minimised. The forward pass computes value and gradient together, a
    few rows at a time, and holds no more than the gradient, in the dtype of the student, and four buffers of a chunk.
    The teacher is detached. If all upstream gradients are one, the backward pass does nothing: weigh positions by
    `mask` and call `.sum().backward()`.

    Logits of float64, and a `Divergence` of your own in any dtype, are evaluated in float64 by the divergence's own
    methods. Logits of float32, bfloat16 and float16 are evaluated in float32, by a form with fewer passes if the
    divergence has one: those of the catalogue with `beta` and `lam` at 0 or in [1/16, 15/16], and `alpha` between -4
    and 4, except within 1/16 of 0 and 1. Its values are off by a few $10^{-7}$ of the largest term, its gradients by
    a few $10^{-7}\,p_a$ of the largest weight; `docs/performance.md` has them measured. The gradient is rounded once
    to the dtype of the student, in float16 to 0 below $3 \cdot 10^{-8}$.

    Logits may be `-inf`, which is a token of probability zero (T10): $p = 0 < q$ costs $f'(\infty)\,q$ and has no
    gradient, $p > 0 = q$ costs $p f(0)$. A cost that is infinite makes the value inf and has no gradient.

    Derivatives go through to the second order, forward and reverse, by `torch.func` too; `torch.vmap`,
    `torch.compile`, autocast (which changes nothing) and inference mode are supported.

    Args:
        student_logits: $z$, any leading shape, any strides.
        teacher_logits: of the same shape and device; its dtype may be another.
        divergence: an object or a catalogue name.
        mask: a weight for each position, usually 0 or 1, of any real dtype. Positions of weight zero are not looked
            at: their value and gradient are zero whatever their logits hold.
        temperature: $\tau$, which divides both logits; the result is not multiplied by $\tau^2$.
        chunk_size: how many positions at a time; by default as many as serve the cache.

    Returns:
        $\ell$, float64 if any logits are, else float32.

    Raises:
        InvalidArgumentError: a shape, dtype or number that does not fit, or a row that is looked at and holds NaN,
            +inf or only `-inf`.

    References: T1 and T12 of the theory; generalised JSD in arXiv 2306.13649.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> loss = fused_divergence(student, torch.tensor([[2.0, 1.0, 0.0]]), "forward_kl")
        >>> loss.sum().backward()
        >>> loss, student.grad
        (tensor([1.1504], grad_fn=...), tensor([[-0.5752,  0.0000,  0.5752]]))
    """
    arguments.check_logits("student_logits", student_logits)
    arguments.check_logits("teacher_logits", teacher_logits)
    arguments.check_matching("teacher_logits", teacher_logits, "student_logits", student_logits)
    arguments.check_temperature(temperature)
    arguments.check_chunk(chunk_size)
    shape, dtype = tuple(student_logits.shape[:-1]), arguments.sum_dtype(student_logits, teacher_logits)
    weights = arguments.weights_of(mask, shape, student_logits.device, dtype)
    if torch.compiler.is_compiling():
        from opdtheory.kernels.compiled import compiled_values

        return compiled_values(
            student_logits, teacher_logits.detach(), weights, divergence, float(temperature), chunk_size
        )
    settings = Settings(as_divergence(divergence), float(temperature), chunk_size)
    return differentiable_values(student_logits, teacher_logits.detach(), weights, settings)


def differentiable_values(student: Tensor, teacher: Tensor, weights: Tensor | None, settings: Settings) -> Tensor:
    """The values, with a graph behind them where one is asked for."""
    values: Tensor = _Values.apply(student, teacher, weights, settings, _differentiated(student))[0]
    return values


def values_and_gradient(
    student: Tensor, teacher: Tensor, weights: Tensor | None, settings: Settings, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The values, and their gradient or, if that is not wanted, an empty tensor."""
    arguments.check_weights(weights)
    values = torch.empty(student.shape[:-1], dtype=torch.float64, device=student.device)
    gradient = torch.empty(student.shape if wanted else (0,), dtype=student.dtype, device=student.device)
    dtype = arguments.sum_dtype(student, teacher)
    if values.numel():
        evaluator = Evaluator.of(settings.divergence, dtype, 1.0 / settings.temperature)
        sweep(evaluator, student, teacher, weights, settings.chunk_size, values, gradient if wanted else None)
    return values.to(dtype), gradient


def _differentiated(student: Tensor) -> bool:
    if transforms_active():
        return True
    recorded = student.requires_grad and torch.is_grad_enabled()
    return recorded or forward_ad.unpack_dual(student).tangent is not None


class _Values(torch.autograd.Function):
    """The values, and beside them the gradient for later."""

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
    """The inputs with the mapped dimension as one more leading shape, which every function here takes."""
    moved = []
    for each, dim in zip(inputs, in_dims, strict=True):
        if not isinstance(each, Tensor):
            moved.append(each)
        elif dim is None:
            moved.append(each.expand(info.batch_size, *each.shape))
        else:
            moved.append(each.movedim(dim, 0))
    return moved
