"""Names of test cases that are the same in every process."""

from __future__ import annotations


def label(value: object) -> str:
    """A function by its name, a set in order, anything else as it prints: no addresses, which differ by process."""
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(str, value))) + "}"
    if type(value).__name__ in ("function", "builtin_function_or_method"):
        return str(value.__qualname__).rsplit(".", 1)[-1]
    return str(value)
