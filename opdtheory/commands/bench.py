r"""`opdtheory bench`: whole-vocabulary losses against the textbook formula by autograd, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opdtheory.commands.console import FAILS, HOLDS, console
from opdtheory.rendering.table import Cell, Styled, Table

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.kernels.comparison import Comparison

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="time the whole-vocabulary losses on this machine",
        description="Compare time, memory and error of fused_divergence with the textbook formula by autograd.",
        epilog="exit status: 0 if every gradient is right, 1 if not, 2 for a wrong option; timings do not affect it",
    )
    parser.add_argument(
        "divergences", nargs="*", metavar="DIVERGENCE", help="names or labels (default: some of the catalogue)"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="number of rows of logits")
    parser.add_argument(
        "--vocabulary", type=int, default=151_936, metavar="V", help="size of the vocabulary, the length of a row"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="number of repeats, after one that is not counted"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="dtype of the logits"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="device of the losses")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare, print the table, and return the exit status, 1 if a gradient is wrong."""
    from opdtheory.kernels.comparison import DIVERGENCES, DTYPES, compare
    from opdtheory.machine import machine

    rows = compare(
        options.divergences or DIVERGENCES,
        tokens=options.tokens,
        vocabulary=options.vocabulary,
        repeats=options.repeats,
        dtype=DTYPES[options.dtype],
        device=options.device,
    )
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [_as_json(row) for row in rows]}, indent=2))
    else:
        print(f"{options.tokens} x {options.vocabulary:,} words, {options.dtype}, forward and backward")
        print(machine(), end="\n\n")
        _as_table(rows).show(console())
    return HOLDS if all(row.agrees for row in rows) else FAILS


def _as_json(row: Comparison) -> dict[str, Any]:
    # JSON has no NaN.
    values = {name: None if value != value else value for name, value in dataclasses.asdict(row).items()}
    return {**values, "agrees": row.agrees}


_COLUMNS = ("divergence", "ms", "textbook", "of its time", "MB", "textbook", "of its memory", "gradient off by", "")


def _as_table(rows: Sequence[Comparison]) -> Table:
    lines: list[tuple[Cell, ...]] = [_COLUMNS]
    for row in rows:
        lines.append(
            (
                row.divergence,
                f"{row.milliseconds:.2f}",
                f"{row.textbook_milliseconds:.2f}",
                f"{row.milliseconds / row.textbook_milliseconds:.3f}",
                f"{row.megabytes:.0f}",
                f"{row.textbook_megabytes:.0f}",
                f"{row.megabytes / row.textbook_megabytes:.3f}" if row.textbook_megabytes else "-",
                f"{row.difference:.0e}",
                "" if row.agrees else Styled(f"WRONG: more than {row.allowed:.0e}", "bold red"),
            )
        )
    return Table(lines)
