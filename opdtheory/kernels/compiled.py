"""`fused_divergence` under `torch.compile`, as an operator that the compiler treats as a whole; imported only then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.kernels import arguments
from opdtheory.kernels.values import Settings, differentiable_values, values_and_gradient

__all__ = ["compiled_values"]


def compiled_values(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    divergence: str | Divergence,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    """The values; the graph breaks at a user's own divergence, which has no label."""
    if isinstance(divergence, Divergence) and divergence._own_expr is not None:
        return _apart(student, teacher, weights, Settings(divergence, temperature, chunk_size))
    label = divergence if isinstance(divergence, str) else divergence.label
    wanted = student.requires_grad and torch.is_grad_enabled()
    values, _ = _operator(student, teacher, weights, label, temperature, chunk_size, wanted)
    return values


_apart = torch.compiler.disable(differentiable_values)


# Written out, as torch cannot read annotations that are checked at run time.
_SCHEMA = (
    "(Tensor student, Tensor teacher, Tensor? weights, str label, float temperature, SymInt? chunk_size, bool wanted)"
    " -> (Tensor, Tensor)"
)


@torch.library.custom_op("opdtheory::fused_divergence", mutates_args=(), schema=_SCHEMA)
def _operator(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    label: str,
    temperature: float,
    chunk_size: int | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    settings = Settings(as_divergence(label), temperature, chunk_size)
    return values_and_gradient(student, teacher, weights, settings, wanted)


@_operator.register_fake
def _(student: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, label, *_, wanted = rest
    as_divergence(label)  # raises for a wrong name while compiling
    values = student.new_empty(student.shape[:-1], dtype=arguments.sum_dtype(student, teacher))
    return values, student.new_empty(student.shape if wanted else (0,))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None, None, None, None]:
    (gradient,) = ctx.saved_tensors
    found = None if upstream is None else (gradient * upstream.unsqueeze(-1)).to(gradient.dtype)
    return found, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_keep)
