"""One generated call, and the judgement of its outcome."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "Outcome", "described", "judged"]

# What a call gives, and by how much each part may be off: absolute, on the scale of the expected part's largest entry.
Parts = list[Tensor]


@dataclass
class Call:
    """A call of a public function.

    Attributes:
        label: the name of the function.
        arguments: the generated arguments by name.
        run: makes the call and returns what is compared.
        expected: the same by another route; None if only an error is right.
        bad: arguments one of which the error must name; empty for a call that must succeed.
        tolerances: one for each part.
    """

    label: str
    arguments: dict[str, Any]
    run: Callable[[], Parts]
    expected: Callable[[], Parts] | None = None
    bad: set[str] = field(default_factory=set)
    tolerances: tuple[float, ...] = (1e-9,)


@dataclass(frozen=True)
class Outcome:
    """`right`, `refused` or `failed`, and why."""

    kind: str
    why: str = ""


def judged(call: Call) -> Outcome:
    """Make a call and judge it."""
    before = {name: value.detach().clone() for name, value in call.arguments.items() if _whole(value)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = call.run()
    except (ValueError, TypeError) as error:
        if not call.bad:
            return Outcome("failed", f"refused a right call: {type(error).__name__}: {error}")
        if any(name in str(error) for name in call.bad):
            return Outcome("refused")
        return Outcome("failed", f"names none of {sorted(call.bad)}: {type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")
    if call.bad:
        return Outcome("failed", f"accepted a wrong {', '.join(sorted(call.bad))}")
    for name, old in before.items():
        if not _same(call.arguments[name].detach(), old):
            return Outcome("failed", f"changed its argument {name}")
    assert call.expected is not None
    return _compared(found, call.expected(), call.tolerances)


def _whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) if a.is_floating_point() else torch.equal(a, b)


def _compared(found: Parts, expected: Parts, tolerances: tuple[float, ...]) -> Outcome:
    if len(found) != len(expected):
        return Outcome("failed", f"gave {len(found)} parts, not {len(expected)}")
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        if tuple(a.shape) != tuple(b.shape):
            return Outcome("failed", f"part {n} has shape {tuple(a.shape)}, not {tuple(b.shape)}")
        a, b = a.detach().double(), b.detach().double()
        if bool(torch.isnan(a).any()):
            return Outcome("failed", f"part {n} holds NaN")
        finite = torch.isfinite(b)
        if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite], b[~finite]):
            return Outcome("failed", f"part {n} is finite where an infinity is right, or the reverse")
        if not bool(finite.any()):
            continue
        tolerance = tolerances[min(n, len(tolerances) - 1)]
        off = (a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1.0)
        if not float(off) <= tolerance:
            return Outcome("failed", f"part {n} is off by {float(off):.3g}, more than {tolerance:.3g}")
    return Outcome("right")


def described(call: Call) -> str:
    """The call in one line: shapes and dtypes of tensors, other values as they are."""
    shown = ", ".join(f"{name}={_shown(value)}" for name, value in call.arguments.items())
    return f"{call.label}({shown})" + (f" with a wrong {', '.join(sorted(call.bad))}" if call.bad else "")


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        text = repr(value)
        return text if len(text) < 60 else f"{text[:57]}..."
    strides = "" if value.device.type == "meta" or value.is_contiguous() else f", strides {value.stride()}"
    return f"{str(value.dtype)[6:]}{list(value.shape)}{strides}{', grad' if value.requires_grad else ''}"


def chosen(rng: random.Random, *options: Any) -> Any:
    """One of some options."""
    return options[rng.randrange(len(options))]
