"""Markdown tables, and parts of a page that are folded."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["folded", "markdown_table"]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; `|` in a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def folded(title: str, body: str) -> str:
    """A part of a page that opens when its title is clicked; the body is Markdown."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{body}\n\n</details>'
