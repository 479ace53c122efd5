"""Exit statuses, and what the commands share in printing."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from opdtheory.errors import OpdTheoryError

__all__ = [
    "FAILS",
    "HOLDS",
    "USAGE",
    "Commands",
    "HelpFormatter",
    "UsageError",
    "aside",
    "complain",
    "console",
    "or_none",
    "output_apart",
]

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
    """Print a problem to standard error, after the command's name, and its traceback if the options ask for it."""
    if isinstance(problem, BaseException) and getattr(options, "traceback", False):
        traceback.print_exception(problem.__cause__ or problem)
    print(f"opdtheory {options.command}: {problem}", file=sys.stderr)


def aside(options: argparse.Namespace, remark: str) -> None:
    """Print a remark, to standard error where standard output holds JSON."""
    print(remark, file=sys.stderr if options.json else sys.stdout)


def or_none(kind: type) -> Callable[[str], Any]:
    """How argparse reads a value of a type, or the word none."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__  # for the message of argparse
    return read


@contextlib.contextmanager
def output_apart(apart: bool) -> Iterator[None]:
    """Send what the user's code prints to standard error if `apart`, and give standard output back afterwards.

    The file descriptor is redirected too, for what compiled code and other processes print.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr if apart else sys.stdout))
        if apart:
            stack.enter_context(_descriptor_apart())
        yield


@contextlib.contextmanager
def _descriptor_apart() -> Iterator[None]:
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    _flush()
    try:
        os.dup2(2, 1)
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write what is buffered for standard output before it goes elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
