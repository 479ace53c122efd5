"""Exit statuses, and the console that the commands print to."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

__all__ = ["FAILS", "HOLDS", "USAGE", "Commands", "console"]

HOLDS, FAILS, USAGE = 0, 1, 2

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

_PIPED_WIDTH = 120


def console() -> Any:
    """A console of rich, or None where it is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    # What is piped into a file or a log has no width of its own.
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)
