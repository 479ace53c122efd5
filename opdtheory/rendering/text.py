"""Tables and paragraphs of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

__all__ = ["item", "paragraph", "percent", "table"]

_WIDTH = 96


def table(rows: Sequence[Sequence[str]], align: str = "") -> list[str]:
    """The lines of a table whose columns are as wide as their widest cell.

    Args:
        rows: rows of equally many cells, the header first.
        align: `l` or `r` for each column from the left; the last letter is for all further columns. Default: all left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = (align or "l").ljust(len(widths), (align or "l")[-1])
    return [
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        ).rstrip()
        for row in rows
    ]


def paragraph(text: str) -> str:
    """The text in lines of at most 96 characters."""
    return textwrap.fill(text, width=_WIDTH)


def item(text: str) -> str:
    """The text as an item of a list, in lines of at most 96 characters."""
    return textwrap.fill(text, width=_WIDTH, initial_indent="- ", subsequent_indent="  ")


def percent(share: float) -> str:
    """A share in per cent, to three digits."""
    return f"{100 * share:.3g} %"
