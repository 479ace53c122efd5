"""Whether a loss's backward pass is the derivative of its value, and what is to blame if it is not."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = ["BackwardReport", "backward_report"]

_DIRECTIONS = 4

# Steps of central differences: truncation h^2 and rounding eps/h balance near the cube root of eps.
_STEP = {torch.float64: 1e-5, torch.float32: 5e-3}
_COARSE_STEP = 5e-2

# Relative error of central differences themselves, by dtype.
_LIMIT = {torch.float64: 1e-6, torch.float32: 1e-2}
_COARSE_LIMIT = 0.2

# The step is doubled once; the change of the difference estimates its error, and this multiple of it is tolerated.
_FORGIVEN = 4.0

# Held while a class's `apply` is recorded; one thread may hold it several times.
_RECORDING = threading.RLock()

_LEAVES_AUTOGRAD = ("detach", "detach_", "item", "tolist", "numpy")


@dataclass(frozen=True)
class BackwardReport:
    """What central differences say of a backward pass.

    Attributes:
        error: largest disagreement over a few random directions, relative to the largest slope.
        limit: largest error that the differences themselves may have.
        stopped: whether the loss takes a tensor out of autograd.
        custom: names of the hand-written autograd functions in the graph.
        wrong: relative error of each hand-written function whose backward disagrees with its forward.
        unseen: names of the hand-written functions that could not be examined on their own.
    """

    error: float
    limit: float
    stopped: bool
    custom: list[str]
    wrong: dict[str, float]
    unseen: list[str]


def backward_report(
    loss: Loss, rollouts_of: Callable[[Tensor], Rollouts], at: Float[Tensor, "B T V"], seed: int = 0
) -> BackwardReport:
    r"""Compare a loss's backward pass in the student's logits with central differences of its value.

    $$\langle \nabla L, d \rangle \quad\text{against}\quad \frac{L(z + hd) - L(z - hd)}{2h}$$

    If they differ, the backward of every hand-written `torch.autograd.Function` in the graph is compared with its own
    forward in the same way. Tensors that leave autograd (`detach`, `no_grad`, `.data`, `.item()`) are noticed.

    Args:
        loss: a deterministic loss.
        rollouts_of: the batch for given student logits, all else fixed.
        at: the logits, float64.
        seed: seed of the directions.
    """
    leaf = at.detach().clone().requires_grad_()
    rollouts = rollouts_of(leaf)
    with _StopGradients() as mode:
        value = loss(rollouts)
    classes = _custom_functions(value)
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    error, limit = _disagreement(lambda z: loss(rollouts_of(z[0])), [at.detach()], [gradient], seed)
    wrong: dict[str, float] = {}
    unseen: list[str] = []
    if error > limit:
        for cls in classes:
            found = _examine(cls, lambda: loss(rollouts_of(at.detach().clone().requires_grad_())), seed)
            if found is None:
                unseen.append(cls.__name__)
            elif found[0] > found[1]:
                wrong[cls.__name__] = found[0]
    return BackwardReport(error, limit, mode.seen, [cls.__name__ for cls in classes], wrong, unseen)


def _disagreement(
    value_of: Callable[[Sequence[Tensor]], Tensor], at: list[Tensor], gradient: list[Tensor], seed: int
) -> tuple[float, float]:
    """The largest relative error of a gradient over a few directions, and the largest that passes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        centre = _recorded_value(value_of, at)
        dtype = min((centre.dtype, *(x.dtype for x in at)), key=lambda d: -torch.finfo(d).eps)
        step = _STEP.get(dtype, _COARSE_STEP)
        gaps, slopes, noises = [], [], []
        for _ in range(_DIRECTIONS):
            direction = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in at]
            near, far = (_central(value_of, at, direction, h) for h in (step, 2 * step))
            slope = sum(float((g * d).double().sum()) for g, d in zip(gradient, direction, strict=True))
            gaps.append(abs(near - slope))
            slopes.append(max(abs(slope), abs(near)))
            noises.append(abs(far - near) + torch.finfo(dtype).eps * abs(float(centre)) / step)
    size = max(*slopes, 1e-300)
    limit = max(_LIMIT.get(dtype, _COARSE_LIMIT), _FORGIVEN * max(noises) / size)
    # A derivative no larger than rounding is zero.
    if size <= 100 * torch.finfo(dtype).eps * max(abs(float(centre)), 1.0) / step:
        return 0.0, limit
    return max(gaps) / size, limit


def _central(
    value_of: Callable[[Sequence[Tensor]], Tensor], at: list[Tensor], direction: list[Tensor], step: float
) -> float:
    ahead, behind = (
        float(_recorded_value(value_of, [x + sign * step * d for x, d in zip(at, direction, strict=True)]))
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


def _recorded_value(value_of: Callable[[Sequence[Tensor]], Tensor], at: list[Tensor]) -> Tensor:
    """The value as in training: a loss may register hooks or differentiate inside."""
    return value_of([x.detach().clone().requires_grad_() for x in at]).detach()


class _StopGradients(TorchFunctionMode):
    """Notices when a tensor that requires a gradient leaves autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.seen and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            name = getattr(func, "__name__", "")
            is_data = name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data"
            unrecorded = not torch.is_grad_enabled() and isinstance(result, Tensor) and result.is_floating_point()
            self.seen = name in _LEAVES_AUTOGRAD or is_data or unrecorded
        return result


def _custom_functions(value: Tensor) -> list[type[Function]]:
    """The hand-written autograd functions in a value's graph, in the order of a walk from the value."""
    found: list[type[Function]] = []
    pending, visited = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            cls = type(node)._forward_cls
            if cls not in found:
                found.append(cls)
        pending.extend(parent for parent, _ in node.next_functions)
    return found


def _examine(cls: type[Function], run: Callable[[], Tensor], seed: int) -> tuple[float, float] | None:
    """The worst disagreement of one hand-written function over its calls; None if no call was recorded."""
    calls: list[tuple[Any, ...]] = []
    with _recorded(cls, calls):
        run()
    results = [r for args in calls if (r := _examine_call(cls, args, seed)) is not None]
    return max(results, key=lambda r: r[0] / r[1]) if results else None


def _examine_call(cls: type[Function], args: tuple[Any, ...], seed: int) -> tuple[float, float] | None:
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad and a.is_floating_point()]
    if not places:
        return None
    at = [args[i].detach().clone() for i in places]
    leaves = [x.clone().requires_grad_() for x in at]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.enable_grad():
        outputs = _outputs(cls, args, places, leaves)
        weights = {
            i: torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
            for i, out in enumerate(outputs)
            if isinstance(out, Tensor) and out.is_floating_point() and out.requires_grad
        }
        if not weights:
            return None
        gradient = torch.autograd.grad([outputs[i] for i in weights], leaves, list(weights.values()), allow_unused=True)

    def value_of(inputs: Sequence[Tensor]) -> Tensor:
        results = _outputs(cls, args, places, inputs)
        return torch.stack([(weight * results[i]).sum() for i, weight in weights.items()]).sum()

    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(at, gradient, strict=True)]
    return _disagreement(value_of, at, filled, seed)


def _outputs(
    cls: type[Function], args: tuple[Any, ...], places: list[int], inputs: Sequence[Tensor]
) -> tuple[Any, ...]:
    """What a hand-written function returns with some of its arguments replaced."""
    full = list(args)
    for place, tensor in zip(places, inputs, strict=True):
        # A function may write into its input, which must therefore be neither a leaf nor shared.
        full[place] = tensor.clone()
    outputs = cls.apply(*full)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def _recorded(cls: type[Function], calls: list[tuple[Any, ...]]) -> Iterator[None]:
    """Record the arguments of every call of `cls.apply` that this thread makes within the block.

    A loss refers to the class of its function, so the class itself is patched. Blocks may be nested. Other threads wait
    for their turn and are not recorded in the meantime. The class is restored however the block ends. Calls of a
    subclass are not recorded.
    """
    thread = threading.get_ident()
    with _RECORDING:
        own = cls.__dict__.get("apply")
        original = inspect.getattr_static(cls, "apply")

        def apply(called: type[Function], *args: Any, **kwargs: Any) -> Any:
            if called is cls and threading.get_ident() == thread:
                calls.append(args)
            return original.__get__(None, called)(*args, **kwargs)

        setattr(cls, "apply", classmethod(apply))  # noqa: B010 - the type checker refuses to assign to a method
        try:
            yield
        finally:
            if own is None:
                del cls.apply
            else:
                setattr(cls, "apply", own)  # noqa: B010
