"""The tables of a terminal, a log and a printed report: one layout for all of them."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

__all__ = ["Cell", "Styled", "Table"]

_GAP = "  "

# A longer word may be broken where a table is too wide, unless it is a number.
_LONGEST_WORD = 16
_NUMERIC = frozenset("0123456789.,+-eE%±×∞()[]/")


class Styled(NamedTuple):
    """A cell with a style of rich, which shows where there are colours."""

    text: str
    style: str


Cell: TypeAlias = str | Styled
_Line: TypeAlias = list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table whose columns are as wide as their widest cell, or narrower where there is less room.

    Where the table is too wide, text is wrapped: at spaces, and within a word of more than 16 characters that is no
    number. Cells that stand on the right are numbers and are never wrapped. If that is not enough, the columns come in
    several tables below each other, each with the first column that has a name.

    Attributes:
        rows: rows of equally many cells, the header first.
        align: `l` or `r` for each column from the left; the last letter is for all further columns. Default: all left.
        title: what stands above it in a terminal.
    """

    rows: Sequence[Sequence[Cell]]
    align: str = ""
    title: str = ""

    def lines(self, width: int | None = None) -> list[str]:
        """The lines as plain text.

        Args:
            width: the most characters of a line; None if there is no limit. A number is never cut, so a line may be
                longer than a very small width.
        """
        return ["".join(text for text, _ in line).rstrip() for line in self._laid_out(width)]

    def show(self, console: Any = None) -> None:
        """Print the table: in colour on a rich console that is a terminal, else as plain text.

        It is as wide as the terminal at most; a file, a pipe and a log have no width.
        """
        if console is None or not console.is_terminal:
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            print(*([self.title] if self.title else []), *self.lines(width), sep="\n")
            return
        from rich.text import Text

        if self.title:
            console.print(Text(self.title, style="bold"))
        for line in self._laid_out(console.width, header="underline"):
            console.print(Text.assemble(*line), no_wrap=True, overflow="ignore", crop=False)

    def _laid_out(self, width: int | None, header: str = "") -> list[_Line]:
        columns = [_Column(cells, side) for cells, side in zip(self._columns(), self._sides(), strict=True)]
        found: list[_Line] = []
        for panel in _panels(columns, width):
            widths = _widths(panel, width)
            found += [[]] if found else []
            for row in range(len(self.rows)):
                found += _row_lines([column.cells[row] for column in panel], panel, widths, "" if row else header)
        return found

    def _columns(self) -> list[tuple[Styled, ...]]:
        styled = [[cell if isinstance(cell, Styled) else Styled(cell, "") for cell in row] for row in self.rows]
        return list(zip(*styled, strict=True))

    def _sides(self) -> str:
        count = len(self.rows[0])
        return (self.align or "l").ljust(count, (self.align or "l")[-1])


class _Column:
    """A column, with the widths that it takes at most and at least."""

    def __init__(self, cells: Sequence[Styled], side: str) -> None:
        self.cells, self.side = cells, side
        self.natural = max(len(cell.text) for cell in cells)
        least = [_least(word) for word in cells[0].text.split()]
        for cell in cells[1:]:
            least += [len(cell.text)] if side == "r" else [_least(word) for word in cell.text.split()]
        self.least = max(least, default=0)


def _least(word: str) -> int:
    """The room that a word takes at least."""
    is_number = any(letter.isdigit() for letter in word) and _NUMERIC.issuperset(word)
    return len(word) if is_number else min(len(word), _LONGEST_WORD)


def _panels(columns: list[_Column], width: int | None) -> list[list[_Column]]:
    """The columns in groups that fit, each group headed by the leading columns up to the first that has a name."""

    def room(some: Sequence[_Column]) -> int:
        return sum(column.least for column in some) + len(_GAP) * (len(some) - 1)

    if width is None or room(columns) <= width:
        return [columns]
    named = next((number for number, column in enumerate(columns) if column.cells[0].text), 0)
    keys, panels = columns[: named + 1], list[list[_Column]]()
    for column in columns[named + 1 :]:
        if panels and room([*panels[-1], column]) <= width:
            panels[-1].append(column)
        else:
            panels.append([*keys, column])
    return panels or [columns]


def _widths(columns: Sequence[_Column], width: int | None) -> list[int]:
    """The widths of columns: natural ones, of which the widest give way."""
    widths = [column.natural for column in columns]
    if width is None:
        return widths
    too_many = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    while too_many > 0:
        spare = [number for number, column in enumerate(columns) if widths[number] > column.least]
        if not spare:
            break
        widths[max(spare, key=lambda number: widths[number])] -= 1
        too_many -= 1
    return widths


def _row_lines(cells: Sequence[Styled], columns: Sequence[_Column], widths: list[int], style: str) -> list[_Line]:
    """The lines of one row."""
    wrapped = [_wrapped(cell.text, width) for cell, width in zip(cells, widths, strict=True)]
    lines = []
    for number in range(max(map(len, wrapped))):
        line: _Line = []
        for parts, cell, column, width in zip(wrapped, cells, columns, widths, strict=True):
            part = parts[number] if number < len(parts) else ""
            padded = part.rjust(width) if column.side == "r" else part.ljust(width)
            if column is columns[-1]:
                padded = padded.rstrip()
            line += [(_GAP, "")] if line else []
            line.append((padded, cell.style or style))
        lines.append(line)
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, max(1, width), break_on_hyphens=False) or [""]
