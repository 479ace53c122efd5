"""The statements of the theory as objects that derive themselves and run their own checks."""

from __future__ import annotations

import functools
import importlib
import re

from opdtheory.theorems.theorem import Identity, IdentityResult, Step, StepResult, Tally, Theorem, TheoremResult

__all__ = [
    "Identity",
    "IdentityResult",
    "Step",
    "StepResult",
    "Tally",
    "Theorem",
    "TheoremResult",
    "theorems",
]

# One module per statement of the theory; each gathers those of its parts. The other modules help them.
_MODULES = (
    "opd_plus",
    "stop_gradient",
    "gauge",
    "implied",
    "stability",
    "sequences",
    "variance",
    "offpolicy",
    "truncation",
    "support",
    "reductions",
    "vocabulary",
)


@functools.cache
def theorems() -> tuple[Theorem, ...]:
    """Every theorem, in order of its number: T1, T1b, T2 and so on."""
    modules = [importlib.import_module(f"opdtheory.theorems.{name}") for name in _MODULES]
    found = [theorem for module in modules for theorem in module.theorems()]
    return tuple(sorted(found, key=_order))


def _order(theorem: Theorem) -> tuple[int, str]:
    number = re.fullmatch(r"T(\d+)([a-z]?)", theorem.number)
    if number is None:
        raise ValueError(f"{theorem.number!r} is no number such as T4 or T4b")
    return int(number[1]), number[2]
