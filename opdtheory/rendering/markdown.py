"""Markdown tables, parts of a page that are folded, and text as it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["folded", "literal", "markdown_table"]

_MARKUP = re.compile(r"[\\`*_{}\[\]&<>$]|\A[-+#]")
_INDEX = re.compile(r"(?<=(?<!\w)\w)_(?:\{([^{}]*)\}|(\w)(?!\w))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; `|` in a cell is escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]])


def folded(title: str, body: str) -> str:
    """A part of a page that opens when its title is clicked; the body is Markdown."""
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{body}\n\n</details>'


def literal(text: str) -> str:
    """Plain text of one line as Markdown: nothing in it is markup, a link or a formula, and indices are lowered.

    An index is one letter or stands in braces, and belongs to one letter, as in `p_a` and `Σ_{a ∈ S}`.
    """
    shown, start = "", 0
    for found in _INDEX.finditer(text):
        shown += f"{_escaped(text[start : found.start()])}<sub>{_escaped(found[1] or found[2])}</sub>"
        start = found.end()
    return shown + _escaped(text[start:])


def _escaped(text: str) -> str:
    return _MARKUP.sub(lambda sign: _ENTITIES.get(sign[0], f"\\{sign[0]}"), text)
