"""The command line: `opdtheory verify`, `audit`, `table`, `train`, `reproduce` and `bench`.

The exit status is 0 if what was asked holds, 1 if it does not, 2 for a usage error. Only the core's packages are
needed; tables are coloured if rich is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from opdtheory.commands import audit, bench, reproduce, table, train, verify
from opdtheory.commands.console import FAILS, USAGE
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
        # The reader, such as `head`, has seen enough; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILS
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opdtheory", description="What an on-policy-distillation loss really does, by exact expectation."
    )
    parser.add_argument("--version", action="version", version=f"opdtheory {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in (verify, table, audit, train, reproduce, bench):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
