"""A loss evaluated on batches of enumerated sequences, one by one or mapped, and its gradient in every logit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import LossError, NotFiniteError
from opdtheory.exact.enumeration import Enumeration
from opdtheory.rollouts import Rollouts

__all__ = ["Loss", "Probe"]

Loss = Callable[[Rollouts], Tensor]

# A mapped loss and single calls differ by rounding in the dtype of the loss.
_MAPPED_ALIKE = {torch.float64: 1e-10, torch.float32: 1e-4}
_MAPPED_ALIKE_NARROW = 2e-2

# The share of the terms of a sum that rounding leaves of a sum that is zero.
_ZERO = {torch.float64: 1e-12, torch.float32: 1e-6}
_ZERO_NARROW = 1e-3

# Two evaluations of one separable loss differ only by rounding in the dtype that it returns, unless that is too narrow
# for the difference to tell anything. A tenth of what an audit takes for rounding of the expectation itself.
_SAME = {torch.float32: 1e-5}
_SAME_IN_FLOAT64 = 1e-10

# Rollouts of the batch on which a loss is called twice, and batches whose mapped gradients are compared.
_SEVERAL = 4

# Nodes of a graph whose incoming gradient is the one in log-probabilities, before a softmax centres it.
_SOFTMAXES = ("LogSoftmax", "Softmax", "Logsumexp")


class Probe:
    """Evaluates a loss on batches of enumerated sequences and reads its sensitivity to every logit."""

    def __init__(self, loss: Loss, everything: Enumeration) -> None:
        self.loss = loss
        self.everything = everything
        self.logits = everything.gather_logits([t.detach() for t in everything.student_tables])
        self.evaluations = 0
        self.same = _SAME_IN_FLOAT64
        self.terms = 0.0
        self._close = _MAPPED_ALIKE[torch.float64]
        self.rounding = _ZERO[torch.float64]
        self._mapped: bool | None = None
        self._generator = torch.Generator().manual_seed(2)

    def check(self, group: Tensor, batch_size: int) -> None:
        """Raise if the loss differs between two identical calls on a batch of a group's sequences."""
        try:
            first = self.value_and_sensitivity(_spaced(group, max(batch_size, _SEVERAL)), measured=True)
            size = max(batch_size, _SEVERAL)
        except LossError:
            raise
        except Exception:  # a loss may insist on its batch size
            first = self.value_and_sensitivity(_spaced(group, batch_size), measured=True)
            size = batch_size
        second = self.value_and_sensitivity(_spaced(group, size))
        for name, a, b in zip(("value", "gradient"), first, second, strict=True):
            if not torch.equal(a, b):
                raise LossError(
                    f"the loss is not deterministic: its {name} changed by {float((a - b).abs().max()):.3g} between "
                    "two identical calls; seed or remove its randomness, and keep no state between calls"
                )

    def sensitivity(self, index: Tensor) -> Float[Tensor, "B T V"]:
        """The gradient of the loss of a batch in each of its rollouts' logits."""
        return self.value_and_sensitivity(index)[1]

    def value_and_sensitivity(self, index: Tensor, measured: bool = False) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its gradient in each rollout's logits; `measured`: note the size of its terms."""
        self.evaluations += 1
        leaf = self.logits[index].requires_grad_()
        value = self.loss(self.everything.rollouts(index, leaf))
        _check_value(value, tuple(leaf.shape))
        self.same = _SAME.get(value.dtype, _SAME_IN_FLOAT64)
        self._close = _MAPPED_ALIKE.get(value.dtype, _MAPPED_ALIKE_NARROW)
        self.rounding = _ZERO.get(value.dtype, _ZERO_NARROW)
        arriving = _record_terms(value) if measured else []
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
        if gradient is None:
            raise LossError(
                "the loss has no gradient: its value does not depend on student_logits or student_logprobs; "
                "is everything detached?"
            )
        _check_gradient(gradient, tuple(leaf.shape))
        if arriving:
            self.terms = max(self.terms, len(index) * max(arriving))
        return value.detach(), gradient

    def maps(self, group: Tensor, batch_size: int) -> bool:
        """Whether `torch.func.vmap` maps the loss over batches of a group; `sensitivities` sees whether rightly."""
        if self._mapped is None:
            # Of different rollouts, as far as there are: a loss that compares them is zero on copies of one.
            batches = torch.stack([_spaced(group.roll(-start), batch_size) for start in range(_SEVERAL)])
            try:
                self._mapped = bool(self._map(batches).any())
            except Exception:  # whatever the loss does that cannot be mapped
                self._mapped = False
        return self._mapped

    def sensitivities(self, batches: Int64[Tensor, "M B"]) -> Float[Tensor, "M B T V"]:
        """The sensitivities of many batches, by one mapped call if the loss is known to be mapped."""
        if self._mapped:
            try:
                found = self._map(batches)
            except Exception:  # it may branch on the number of rollouts; a NaN is reported by its own call below
                self._mapped = False
            else:
                some = torch.randint(len(batches), (_SEVERAL,), generator=self._generator)
                if self._agrees(batches[some], found[some]):
                    return found
                self._mapped = False
        return torch.stack([self.sensitivity(batch) for batch in batches])

    def _agrees(self, batches: Tensor, found: Tensor) -> bool:
        """Whether the mapped sensitivities are those of single calls."""
        for batch, mapped in zip(batches, found, strict=True):
            alone = self.sensitivity(batch)
            scale = max(float(alone.abs().max()), self.terms, 1e-300)
            if not float((alone - mapped).abs().max()) <= self._close * scale:
                return False
        return True

    def _map(self, batches: Int64[Tensor, "M B"]) -> Float[Tensor, "M B T V"]:
        self.evaluations += 1
        leaf = self.logits[batches].requires_grad_()
        fields = vars(self.everything.rollouts(batches.flatten(), leaf.flatten(0, 1)))
        mapped = {name: x.unflatten(0, batches.shape) for name, x in fields.items() if isinstance(x, Tensor)}
        fixed = {name: x for name, x in fields.items() if not isinstance(x, Tensor)}
        with warnings.catch_warnings():
            # Of operations that are mapped slowly.
            warnings.simplefilter("ignore")
            values = torch.func.vmap(lambda some: self.loss(Rollouts.unchecked(**some, **fixed)))(mapped)
        bad = (~torch.isfinite(values)).nonzero()
        _check_value(values[int(bad[0]) if len(bad) else 0], tuple(leaf.shape[1:]))
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        _check_gradient(gradient, tuple(leaf.shape[1:]))
        return gradient


def _spaced(group: Tensor, count: int) -> Tensor:
    """So many sequences of a group, evenly spaced, some repeated if there are fewer."""
    return group[torch.arange(count) * len(group) // count]


def _record_terms(value: Tensor) -> list[float]:
    """A list that a backward pass of the value fills with the sizes of the gradients that enter a softmax."""
    sizes: list[float] = []
    pending, visited = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if any(name in node.name() for name in _SOFTMAXES):
            node.register_prehook(
                lambda gradients: sizes.extend(
                    float(g.detach().abs().max()) for g in gradients if g is not None and g.numel()
                )
            )
        pending.extend(parent for parent, _ in node.next_functions)
    return sizes


def _check_gradient(gradient: Tensor, shape: tuple[int, ...]) -> None:
    # A sum is finite only if its terms are, and takes one operation.
    bad = 0 if math.isfinite(gradient.sum()) else int((~torch.isfinite(gradient)).sum())
    if bad:
        raise NotFiniteError(
            f"the loss's gradient holds {bad} NaN or inf among {gradient.numel()} entries although its value is "
            f"finite; look for inf * 0 in its backward pass; the batch has shape (B, T, V) = {shape}",
            shape,
        )


def _check_value(value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise LossError(f"the loss must return a scalar tensor, got {type(value).__name__}")
    if value.ndim != 0:
        raise LossError(
            f"the loss must return a scalar tensor, got shape {tuple(value.shape)}; reduce it, for example by "
            "rollouts.token_sum(values)"
        )
    if not value.dtype.is_floating_point:
        raise LossError(f"the loss must return a floating-point dtype, got {value.dtype}")
    if not math.isfinite(value.detach()):
        found = float(value.detach())
        raise NotFiniteError(
            f"the loss's value must be finite, got {found} on a batch of shape (B, T, V) = {shape}", shape
        )
    if not value.requires_grad:
        raise LossError("the loss has no gradient: its value does not require grad; is everything detached?")
