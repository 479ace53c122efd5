"""Functions that `torch.compile` is to leave alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["outside_graphs"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_graphs(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, run as it is where a graph would be compiled; the graph breaks there."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            # Not as a decorator: that would load the compiler with the module.
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call
