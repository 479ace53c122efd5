"""Tables and paragraphs of plain text."""

from __future__ import annotations

from opdtheory.rendering import text


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "n", ""), ("a", "10", "x"), ("long name", "2", "")]
    assert text.table(rows) == ["name       n", "a          10  x", "long name  2"]


def test_the_last_side_counts_for_the_columns_after_it() -> None:
    rows = [("name", "n", "share"), ("a", "10", "0.5")]
    assert text.table(rows, align="lr") == ["name   n  share", "a     10    0.5"]
    assert text.table(rows, align="r") == ["name   n  share", "   a  10    0.5"]


def test_paragraphs_are_96_characters_wide() -> None:
    words = "four " * 40
    assert max(map(len, text.paragraph(words).splitlines())) == 94
    lines = text.item(words).splitlines()
    assert lines[0].startswith("- four") and all(line.startswith("  four") for line in lines[1:])
    assert len(lines) > 1 and max(map(len, lines)) <= 96
