"""Paragraphs of plain text."""

from __future__ import annotations

from opdtheory.rendering import text


def test_paragraphs_are_96_characters_wide() -> None:
    words = "four " * 40
    assert max(map(len, text.paragraph(words).splitlines())) == 94
    lines = text.item(words).splitlines()
    assert lines[0].startswith("- four") and all(line.startswith("  four") for line in lines[1:])
    assert len(lines) > 1 and max(map(len, lines)) <= 96
