"""A loss that is called once per batch, as the changes tried on it see the same batches again and again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = ["Remembered", "content"]

_DIFFERENTIATED = ("student_logits", "student_logprobs")

# A value and its gradients in the two differentiated fields; None for a field that does not enter.
_Known = tuple[Tensor, Tensor | None, Tensor | None]


class Remembered:
    """A deterministic loss whose value and gradient are cached for every batch that it has seen.

    The graph of the value ends at the student's logits and log-probabilities, so whatever the caller does to the
    gradient before them works as with the loss itself. Only first derivatives are cached.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self._known: dict[bytes, _Known] = {}

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """The loss's value."""
        inputs = [getattr(rollouts, name) for name in _DIFFERENTIATED]
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            return self.loss(rollouts)
        key = content(vars(rollouts))
        if key not in self._known:
            leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            others = {f.name: getattr(rollouts, f.name) for f in fields(rollouts) if f.name not in _DIFFERENTIATED}
            value = self.loss(Rollouts.unchecked(**others, **dict(zip(_DIFFERENTIATED, leaves, strict=True))))
            if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
                return value
            live = [x for x in leaves if x.requires_grad]
            found = iter(torch.autograd.grad(value, live, allow_unused=True))
            logits, logprobs = (next(found) if x.requires_grad else None for x in leaves)
            self._known[key] = value.detach(), logits, logprobs
        value, *gradients = self._known[key]
        # Only what the loss reads is an input: a caller's hook on another field would get no gradient.
        read = [(x, g) for x, g in zip(inputs, gradients, strict=True) if g is not None]
        if not read:
            return value
        return _Replay.apply(value, [g for _, g in read], *(x for x, _ in read))


class _Replay(Function):
    """A value with cached gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, *(grad.to(g) * g for g in ctx.gradients)


def content(values: dict[str, Any]) -> bytes:
    """Everything that a loss could read in a batch, as a key."""
    parts: list[bytes] = []
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            held = value.detach().cpu()
            # NumPy has no bfloat16.
            raw = (held if held.dtype != torch.bfloat16 else held.float()).numpy().tobytes()
            parts += [f"{name} {tuple(held.shape)} {held.dtype}".encode(), raw]
    return b"".join(parts)
