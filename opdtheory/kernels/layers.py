r"""Output layers applied to a chunk of positions at a time, and sums of the gradients in their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import arguments
from opdtheory.kernels.heads import PLAIN_HEAD, HeadForm
from opdtheory.kernels.products import Halves, accumulates_wide, add_product, product, products_of

__all__ = ["Layer", "Sums", "Tensors", "check_lora"]


class Tensors(NamedTuple):
    r"""Hidden states and the tensors of a layer above them, $W h + \gamma B (A h) + b$; None for those it lacks."""

    hidden: Tensor
    head: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    def detached(self) -> Tensors:
        """The same without gradients."""
        return Tensors(*(each if each is None else each.detach() for each in self))  # type: ignore[arg-type]


class Layer(NamedTuple):
    """A layer in the dtypes of its products; the low-rank factors are small, and always in that of the logits."""

    states: Tensor
    head: Tensor
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    form: HeadForm
    scaling: float

    @classmethod
    def of(cls, tensors: Tensors, form: HeadForm, scaling: float, cast: torch.dtype | None, wide: torch.dtype) -> Layer:
        """The casts of autocast, to `cast` if not None, once for all chunks; logits are `wide`."""
        hidden, head, bias, down, up = tensors
        low_rank = None
        if down is not None and up is not None:
            low_rank = down.to(cast or down.dtype).to(wide), up.to(cast or up.dtype).to(wide)
        return cls(hidden.reshape(-1, hidden.shape[-1]), head.to(cast or head.dtype), bias, low_rank, form, scaling)

    def takes_halves(self) -> bool:
        """Whether the gradient in the products may come as two numbers of bfloat16, as it is the one in the logits."""
        return accumulates_wide(self.head) and self.low_rank is None and self.form == PLAIN_HEAD

    def chunk(self, part: Tensor) -> Tensor:
        """The hidden states of some positions."""
        return self.states[part].to(self.head.dtype)

    def inner(self, states: Tensor, low_rank: tuple[Tensor, Tensor]) -> Tensor:
        r"""$\gamma A h$ of some hidden states."""
        return torch.mm(states.to(low_rank[0].dtype), low_rank[0].T).mul_(self.scaling)

    def logits(self, part: Tensor, out: Tensor) -> Tensor:
        """Those of some positions, written to `out`."""
        states = self.chunk(part)
        products_of(states, self.head, out)
        if self.low_rank is not None:
            out.addmm_(self.inner(states, self.low_rank), self.low_rank[1].T)
        self.form.shape(out, self.bias)
        return out


class Sums:
    """The gradients in the tensors of a layer, where wanted, summed over chunks in a wide dtype."""

    def __init__(self, tensors: Tensors, wanted: tuple[bool, ...], wide: torch.dtype) -> None:
        self._tensors = tensors
        kept = Tensors(*(each if want else None for each, want in zip(tensors, wanted, strict=True)))  # type: ignore[arg-type]
        sums = [None if each is None else torch.zeros(each.shape, dtype=wide, device=each.device) for each in kept[1:]]
        whole = None
        if kept.hidden is not None:
            # A position's gradient is complete within its chunk, and rounded there.
            dtype = wide if kept.hidden.dtype == torch.float16 else kept.hidden.dtype
            whole = torch.zeros(kept.hidden.shape, dtype=dtype, device=kept.hidden.device)
        self._found = Tensors(whole, *sums)  # type: ignore[arg-type]

    def add(self, layer: Layer, part: Tensor, gradient: Tensor | Halves, spare: Tensor) -> None:
        """Add what some positions contribute, given the gradient in their products with the layer.

        `spare`, of the shape and dtype of logits, is overwritten.
        """
        hidden, head, bias, down, up = self._found
        states = layer.chunk(part)
        factor = gradient
        if isinstance(gradient, Tensor) and accumulates_wide(layer.head) and not (hidden is None and head is None):
            factor = Halves.split(gradient, spare)
        slope = None if hidden is None else product(factor, layer.head)
        if head is not None:
            add_product(head, factor, states)
        if bias is not None:
            bias += gradient.sum(0) if isinstance(gradient, Tensor) else gradient.column_sums()
        if layer.low_rank is not None:
            assert isinstance(gradient, Tensor)
            if up is not None:
                up.addmm_(gradient.T, layer.inner(states, layer.low_rank))
            if slope is not None or down is not None:
                by_inner = torch.mm(gradient, layer.low_rank[1]).mul_(layer.scaling)
                if slope is not None:
                    slope.addmm_(by_inner, layer.low_rank[0])
                if down is not None:
                    down.addmm_(by_inner.T, states.to(down.dtype))
        if hidden is not None and slope is not None:
            hidden.view(-1, hidden.shape[-1])[part] = slope.to(hidden.dtype)

    def rounded(self) -> Iterator[Tensor | None]:
        """The gradients, in the dtypes of the tensors; those of float16 ones wide, as a loss scale is still to come."""
        for each, tensor in zip(self._found, self._tensors, strict=True):
            if each is None or tensor is None or tensor.dtype == torch.float16:
                yield each
            else:
                yield each.to(tensor.dtype)


def check_lora(whose: str, lora: object, hidden: Tensor, head: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """The factors and the scaling of a low-rank addition to a head, or none.

    Raises:
        InvalidArgumentError: it is not a tuple of two matrices that fit and a number.
    """
    name = f"{whose}_lora"
    if lora is None:
        return None, None, 0.0
    if not isinstance(lora, tuple) or len(lora) != 3:
        raise InvalidArgumentError(name, f"must be a tuple (A, B, scaling), got {_kind(lora)}")
    down, up, scaling = lora
    if not isinstance(scaling, Real) or isinstance(scaling, bool) or not math.isfinite(scaling):
        raise InvalidArgumentError(name, f"must have a finite number as scaling, got {scaling!r}")
    for letter, factor in (("A", down), ("B", up)):
        if not isinstance(factor, Tensor) or factor.ndim != 2 or not factor.is_floating_point():
            raise InvalidArgumentError(name, f"must have a floating-point matrix as {letter}, got {_kind(factor)}")
    words, width = head.shape
    if down.shape[1] != width or up.shape[0] != words or down.shape[0] != up.shape[1] or not len(down):
        wanted = f"A of shape (r, {width}) and B of shape ({words}, r) for {whose}_head"
        raise InvalidArgumentError(name, f"must have {wanted}, got {tuple(down.shape)} and {tuple(up.shape)}")
    # Adapters are often kept in float32 above a model of lower precision.
    fitting = {hidden.dtype, arguments.sum_dtype(hidden)}
    if not {down.dtype, up.dtype} <= fitting and not torch.is_autocast_enabled(head.device.type):
        wanted = " or ".join(sorted(map(str, fitting)))
        raise InvalidArgumentError(name, f"must have A and B of dtype {wanted}, got {down.dtype} and {up.dtype}")
    for factor in (down, up):
        arguments.check_device(name, factor, f"{whose}_head", head.device)
    return down, up, float(scaling)


def _kind(found: object) -> str:
    return f"{found.dtype}, {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
