"""Cases of one kind of which the default suite runs some, and `make test-slow` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], every: int = 4, ids: Iterable[str] | None = None) -> list[Any]:
    """Parameters for `parametrize`: every `every`-th case as it is, the others marked slow; a tuple is of several."""
    values = list(values)
    names = [None] * len(values) if ids is None else list(ids)
    return [
        pytest.param(*_apart(value), id=name, marks=[pytest.mark.slow] if number % every else [])
        for number, (value, name) in enumerate(zip(values, names, strict=True))
    ]


def _apart(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
