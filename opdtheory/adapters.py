"""Helpers that bring a loss written elsewhere into the form `loss(rollouts) -> scalar`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

__all__ = ["bind"]

R = TypeVar("R")


class _Attributes(SimpleNamespace):
    """A stand-in for `self` that says which attribute the method misses."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the bound method reads self.{name}; pass it as bind(..., {name}=...)")


def bind(method: Callable[..., R], /, **attributes: Any) -> Callable[..., R]:
    """Call a trainer's unbound method on a plain namespace, without building the trainer.

    `bind(Trainer._loss, beta=0.5)(x)` is `Trainer._loss(self, x)` with a `self` that has `beta` alone.

    Args:
        method: the function as found on the class, `Trainer._loss`.
        **attributes: what the method reads from `self`.

    Raises:
        AttributeError: when called, for an attribute that the method reads and that was not given.

    Example:
        >>> class Trainer:
        ...     def _scaled(self, x):
        ...         return self.beta * x
        >>> bind(Trainer._scaled, beta=0.5)(4.0)
        2.0
    """
    return functools.partial(method, _Attributes(**attributes))
