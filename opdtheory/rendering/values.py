"""Records as values that `json.dumps` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["plain_values"]


def plain_values(value: Any) -> Any:
    """The value with tuples as lists, keys as text, and None for infinite numbers and NaN, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
