"""A black-box loss with one kind of its own operations changed, such as a reward detached or a clamp left out.

Which tensors come from the student, the teacher or the sampling policy is followed from operation to operation, so that
no source is needed and everything else in the loss stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = ["Rule", "difference_detached", "ratio_detached", "reward_detached", "rewritten", "unclamped", "unmasked"]

_STUDENT, _TEACHER, _SAMPLER = 1, 2, 4

_ORIGINS = {
    "student_logits": _STUDENT,
    "student_logprobs": _STUDENT,
    "teacher_logits": _TEACHER,
    "teacher_logprobs": _TEACHER,
    "behavior_logprobs": _SAMPLER,
}

# The relative change of a gradient that is rounding.
_SAME = 1e-9

_PRODUCTS = ("mul", "multiply", "rmul", "imul", "div", "divide", "true_divide", "matmul", "rmatmul", "einsum", "dot")
_DIFFERENCES = ("sub", "subtract", "rsub", "isub", "div", "divide", "true_divide", "rdiv", "rtruediv", "kl_div")
_CLAMPS = ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
_EXTREMES = ("minimum", "maximum", "fmin", "fmax", "min", "max")
_COMPARISONS = ("gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal")


@dataclass(frozen=True)
class _Call:
    """One operation of a loss.

    Attributes:
        name: the name of the torch function without underscores, such as `mul`.
        function: the function itself.
        args: its positional arguments.
        kwargs: its keyword arguments.
        origin: returns a tensor's origins as a sum of bits: 1 student, 2 teacher, 4 sampling policy.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: Callable[[Any], int]

    def run(self) -> Any:
        """The result of the operation as it is written."""
        return self.function(*self.args, **self.kwargs)

    def attached(self, x: Any) -> bool:
        """Whether a gradient flows through a tensor."""
        return isinstance(x, Tensor) and x.requires_grad

    def of_teacher(self, x: Any) -> bool:
        """Whether the teacher enters a tensor."""
        return bool(self.origin(x) & _TEACHER)

    def of_student_alone(self, x: Any) -> bool:
        """Whether a tensor is the current student's and no other policy's, with its gradient."""
        return self.attached(x) and self.origin(x) == _STUDENT

    def of_sampler(self, x: Any) -> bool:
        """Whether a tensor is the sampling policy's, or a frozen copy of the student."""
        origin = self.origin(x)
        return not origin & _TEACHER and (bool(origin & _SAMPLER) or (origin == _STUDENT and not self.attached(x)))


# Returns the result that replaces an operation's own and notes the change in words, each once, or returns
# `NotImplemented` to leave the operation as it is.
Rule = Callable[[_Call, list[str]], Any]


def rewritten(loss: Loss, rule: Rule, batches: list[Rollouts]) -> tuple[Loss, list[str]] | None:
    """The loss with a rule applied to its operations, and what that changes on some batches.

    None if it changes no gradient, as where both branches of a formula are the same function, or leaves none.
    """
    changed: list[str] = []
    differs = False
    for rollouts in batches:
        value = _applied(loss, rule, changed)(rollouts)
        if not value.requires_grad:
            return None
        if changed and not differs:
            before, after = (_gradient(each, rollouts) for each in (loss(rollouts), value))
            differs = float((after - before).abs().max()) > _SAME * float(before.abs().max())
    return (_applied(loss, rule, []), changed) if differs else None


def _gradient(value: Tensor, rollouts: Rollouts) -> Tensor:
    # The log-probabilities of the batch are in the graph of every loss of it.
    (found,) = torch.autograd.grad(
        value, rollouts.student_logits, allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return found


def _applied(loss: Loss, rule: Rule, changed: list[str]) -> Loss:
    def applied(rollouts: Rollouts) -> Tensor:
        with _Followed(rollouts, rule, changed):
            return loss(rollouts)

    return applied


def reward_detached(call: _Call, changed: list[str]) -> Any:
    """Detach the factor that holds the teacher, in products with a factor of the student alone (T4)."""
    if call.name not in _PRODUCTS:
        return NotImplemented
    tensors = list(_tensors(call.args))
    if not any(call.of_student_alone(x) and x.ndim for x in tensors):
        return NotImplemented
    rewards = [x for x in tensors if call.attached(x) and call.of_teacher(x)]
    if not rewards:
        return NotImplemented
    _note(changed, "" if rewards[0].ndim < 3 else "vocabulary")
    held = {id(x) for x in rewards}
    return call.function(*_mapped(call.args, lambda x: x.detach() if id(x) in held else x), **call.kwargs)


def difference_detached(call: _Call, changed: list[str]) -> Any:
    """Detach what compares student and teacher, where the two first meet."""
    tensors = list(_tensors(call.args))
    if not any(call.of_teacher(x) and not call.origin(x) & _STUDENT for x in tensors):
        return NotImplemented
    if not any(call.attached(x) and not call.of_teacher(x) for x in tensors):
        return NotImplemented
    result = call.run()
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result
    _note(changed, "")
    return result.detach()


def ratio_detached(call: _Call, changed: list[str]) -> Any:
    """Detach the importance ratio where the student meets the sampling policy or a frozen copy of itself (T8)."""
    tensors = list(_tensors(call.args))
    if call.name not in _DIFFERENCES or not any(call.of_student_alone(x) for x in tensors):
        return NotImplemented
    if not any(call.of_sampler(x) for x in tensors):
        return NotImplemented
    _note(changed, "")
    return call.run().detach()


def unclamped(call: _Call, changed: list[str]) -> Any:
    """Leave out clamps of what comes from the policies."""
    if call.name in _CLAMPS:
        held, bounds = call.args[:1], (*call.args[1:], *call.kwargs.values())
    elif call.name in _EXTREMES and len(call.args) == 2 and isinstance(call.args[0], Tensor):
        held = tuple(x for x in call.args if call.origin(x))
        bounds = tuple(x for x in call.args if not call.origin(x))
        if any(isinstance(x, int) for x in bounds):  # the index of a dimension
            return NotImplemented
    else:
        return NotImplemented
    if len(held) != 1 or not call.origin(held[0]):
        return NotImplemented
    before, after = held[0], call.run()
    if before.shape != after.shape or torch.equal(before.detach(), after.detach()):
        return after
    words = _bounds(call, bounds)
    what = "the importance ratios" if call.origin(before) & _SAMPLER else _entries(before)
    _note(changed, f"{words} on {what}")
    return before


def unmasked(answer: bool) -> Callable[[_Call, list[str]], Any]:
    """A rule that gives one answer to every comparison of what comes from the policies, and leaves out clamps."""

    def rule(call: _Call, changed: list[str]) -> Any:
        if call.name not in _COMPARISONS or not any(call.origin(x) for x in _tensors(call.args)):
            return unclamped(call, changed)
        result = call.run()
        if bool((result == answer).all()):
            return result
        ratio = any(call.origin(x) & _SAMPLER for x in _tensors(call.args))
        _note(changed, "the mask on " + ("importance ratios" if ratio else _entries(result)))
        return torch.full_like(result, answer)

    return rule


class _Followed(TorchFunctionMode):
    """Follows the origins of tensors while a loss runs, and applies a rule to its operations."""

    def __init__(self, rollouts: Rollouts, rule: Rule, changed: list[str]) -> None:
        super().__init__()
        self.rule, self.changed = rule, changed
        # The tensors are kept, since the address of one that is freed may be that of another.
        self._known: dict[int, tuple[Tensor, int]] = {}
        for name, origin in _ORIGINS.items():
            value = getattr(rollouts, name)
            self._known[id(value)] = value, origin

    def origin(self, x: Any) -> int:
        return self._known[id(x)][1] if id(x) in self._known else 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        call = _Call(name, func, args, kwargs, self.origin)
        origin = 0
        for x in _tensors((args, tuple(kwargs.values()))):
            origin |= self.origin(x)
        result = self.rule(call, self.changed) if origin else NotImplemented
        if result is NotImplemented:
            result = call.run()
        if origin:
            changed = args[0] if name == "setitem" else result
            for x in _tensors((changed,)):
                self._known[id(x)] = x, self.origin(x) | origin
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _mapped(values: tuple[Any, ...], function: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    return tuple(
        function(x) if isinstance(x, Tensor) else _mapped(tuple(x), function) if isinstance(x, tuple | list) else x
        for x in values
    )


def _note(changed: list[str], words: str) -> None:
    if words not in changed:
        changed.append(words)


def _entries(x: Tensor) -> str:
    return "each entry of the sum over the vocabulary" if x.ndim > 2 else "each token's term"


def _bounds(call: _Call, bounds: tuple[Any, ...]) -> str:
    numbers = [float(b) for b in bounds if isinstance(b, int | float) or (isinstance(b, Tensor) and b.numel() == 1)]
    if call.name in ("clamp", "clip", "hardtanh") and len(numbers) == 2:
        return f"the clamp to [{numbers[0]:.4g}, {numbers[1]:.4g}]"
    if len(numbers) != 1:
        return "the clamp"
    upper = call.name in ("clamp_max", "minimum", "fmin", "min") or (call.kwargs.get("max") is not None)
    return f"the clamp to at {'most' if upper else 'least'} {numbers[0]:.4g}"
