"""The command line: `opdtheory verify`, `audit`, `audit-trainer`, `diagnose`, `table`, `train`, `reproduce`, `bench`.

The exit status is 0 if what the command checks holds, 1 if it does not, and 2 for a usage error. Only the core's
packages are needed; tables are coloured if rich is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from opdtheory.commands import audit, audit_trainer, bench, diagnose, reproduce, table, train, verify
from opdtheory.commands.console import FAILS, USAGE, HelpFormatter, complain
from opdtheory.errors import OpdTheoryError, TrainingError
from opdtheory.version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return USAGE
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Without this, Python would raise again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILS
    except OpdTheoryError as error:
        complain(options, error)
        return FAILS if isinstance(error, TrainingError) else USAGE
    except OSError as error:
        # A file that is a folder, a folder that is a file, a disk that is full.
        complain(options, f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}")
        return USAGE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opdtheory", description="Find out what an on-policy-distillation loss really does, by exact expectation."
    )
    parser.add_argument("--version", action="version", version=f"opdtheory {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in (verify, table, audit, audit_trainer, diagnose, train, reproduce, bench):
        command.add_parser(commands)
    for command_parser in commands.choices.values():
        command_parser.formatter_class = HelpFormatter
    return parser


if __name__ == "__main__":
    sys.exit(main())
