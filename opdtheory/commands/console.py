"""Exit statuses, and what the commands share in printing."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from opdtheory.errors import OpdTheoryError

__all__ = ["FAILS", "HOLDS", "USAGE", "Commands", "HelpFormatter", "UsageError", "aside", "complain", "console"]

HOLDS, FAILS, USAGE = 0, 1, 2

if TYPE_CHECKING:
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

_PIPED_WIDTH = 120


class UsageError(OpdTheoryError, LookupError):
    """What the command line names cannot be found, read or written."""


class HelpFormatter(argparse.HelpFormatter):
    """Help that names the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.help is not None and action.default is not None and action.default is not False
        return f"{action.help} (default: %(default)s)" if shown and action.default != argparse.SUPPRESS else action.help


def console() -> Any:
    """A rich console, or None if rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    # What is piped into a file or a log has no width of its own.
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def complain(options: argparse.Namespace, problem: object) -> None:
    """Print a problem to standard error, after the command's name."""
    print(f"opdtheory {options.command}: {problem}", file=sys.stderr)


def aside(options: argparse.Namespace, remark: str) -> None:
    """Print a remark, to standard error where standard output holds JSON."""
    print(remark, file=sys.stderr if options.json else sys.stdout)
