"""Tables: columns that line up, in any width, with every number whole."""

from __future__ import annotations

import io
import re

import pytest

from opdtheory.rendering.table import Styled, Table

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "n", ""), ("a", "10", "x"), ("long name", "2", "")]
    assert Table(rows).lines() == ["name       n", "a          10  x", "long name  2"]


def test_the_last_side_counts_for_the_columns_after_it() -> None:
    rows = [("name", "n", "share"), ("a", "10", "0.5")]
    assert Table(rows, "lr").lines() == ["name   n  share", "a     10    0.5"]
    assert Table(rows, "r").lines() == ["name   n  share", "   a  10    0.5"]


WORDS = "a sentence of several words, which ends with 1.2345678e-09 and an identifier_that_is_rather_long"
ROWS = [
    ("", "check", "error", "95 %", "what it says"),
    (Styled("ok", "green"), "one", "1.2e-15", "0.474-0.595", WORDS),
    (Styled("FAILED", "bold red"), "[red]two[/red]", "-3.4e+00", "0.141-0.236", "nothing"),
]


def words_of(lines: list[str]) -> set[str]:
    return set(" ".join(lines).split())


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_text_is_wrapped_and_numbers_are_whole(width: int) -> None:
    lines = Table(ROWS, "llrrl").lines(width)
    assert max(map(len, lines)) <= width
    for number in ("1.2e-15", "0.474-0.595", "-3.4e+00", "0.141-0.236", "1.2345678e-09"):
        assert number in words_of(lines)
    letters = "".join(sorted("".join(lines).replace(" ", "")))
    whole = "".join(sorted("".join(Table(ROWS, "llrrl").lines()).replace(" ", "")))
    assert letters == whole or width <= 60  # nothing is lost; where columns come apart, their keys come twice


def test_a_table_with_enough_room_is_as_without_a_limit() -> None:
    whole = Table(ROWS, "llrrl").lines()
    widest = max(map(len, whole))
    assert Table(ROWS, "llrrl").lines(widest) == whole
    assert Table(ROWS, "llrrl").lines(widest - 1) != whole


def test_columns_of_numbers_that_do_not_fit_come_below_each_other() -> None:
    head = ("estimator", *(f"n{number}" for number in range(9)))
    rows = [head, *((name, *(f"{number}.123e-07" for number in range(9))) for name in ("first one", "second"))]
    lines = Table(rows, "lr").lines(40)
    assert max(map(len, lines)) <= 40 and lines.count("") == 4
    assert sum(line.startswith("estimator") for line in lines) == 5
    for number in range(9):
        assert sum(f"{number}.123e-07" in line for line in lines) == 2


def test_a_terminal_gets_the_same_lines_in_colour() -> None:
    console = pytest.importorskip("rich.console")
    for width in (40, 80, 120):
        out = io.StringIO()
        shown = console.Console(file=out, force_terminal=True, width=width, color_system="standard")
        Table(ROWS, "llrrl", title="A [title]").show(shown)
        assert "\x1b[32mok" in out.getvalue() and "\x1b[1;31mFAILED" in out.getvalue()
        plain = [line.rstrip() for line in ANSI.sub("", out.getvalue()).splitlines()]
        assert plain == ["A [title]", *Table(ROWS, "llrrl").lines(width)]


def test_what_is_no_terminal_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = pytest.importorskip("rich.console")
    whole = Table(ROWS, "llrrl", title="Title")
    whole.show()
    whole.show(console.Console(width=20))
    assert capsys.readouterr().out.splitlines() == ["Title", *whole.lines()] * 2
