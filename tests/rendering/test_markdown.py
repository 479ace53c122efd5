"""Tables in Markdown."""

from __future__ import annotations

from opdtheory.rendering.markdown import markdown_table


def test_bars_in_cells_are_escaped() -> None:
    assert markdown_table(("KL(p|q)", "b"), [("1", "x"), ("2", "")]).splitlines() == [
        r"| KL(p\|q) | b |",
        "| --- | --- |",
        "| 1 | x |",
        "| 2 |  |",
    ]
