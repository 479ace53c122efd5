"""How a function is called that does not take rollouts alone: an expression of `f` and `r`, or a function of both.

An expression is Python code and runs as such, like the function itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from opdtheory.rollouts import Rollouts

__all__ = ["Call", "called", "checked_call"]

Call = Callable[[Any, Any], Any] | str

# Packages that an expression may use by name.
_PACKAGES = ("opdtheory", "torch")


def called(f: Callable[..., Any], call: Call | None) -> Callable[[Rollouts], Any]:
    """The loss `rollouts -> scalar` that calls `f` as `call` says; `f` itself if `call` is None.

    Args:
        f: the function.
        call: a function of `(f, rollouts)`, or an expression of `f`, `r` (the rollouts), `opdtheory` and `torch`.

    Raises:
        InvalidArgumentError: `call` is neither an expression nor a function.

    Example:
        >>> called(lambda a, b: a - b, "f(r, 1)")(3)
        2
    """
    if call is None:
        return f
    checked_call(call)
    if not isinstance(call, str):
        function = call
        return lambda rollouts: function(f, rollouts)
    code = compile(call.strip(), "--call", "eval")
    packages = {name: importlib.import_module(name) for name in _PACKAGES}
    return lambda rollouts: eval(code, {**packages, "f": f, "r": rollouts})


def checked_call(call: object) -> None:
    """Raise unless `call` says how to call a function.

    Raises:
        InvalidArgumentError: it is neither an expression nor a function.
    """
    if isinstance(call, str):
        try:
            compile(call.strip(), "--call", "eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or "it is nested too deeply"
            raise InvalidArgumentError("call", f"must be an expression of f and r, got {call!r}: {reason}") from None
    elif not callable(call):
        raise InvalidArgumentError("call", f"must be an expression or a function of (f, rollouts), got {call!r}")
