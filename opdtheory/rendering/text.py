"""Paragraphs of plain text."""

from __future__ import annotations

import textwrap

__all__ = ["item", "paragraph", "percent"]

_WIDTH = 96


def paragraph(text: str) -> str:
    """The text in lines of at most 96 characters."""
    return textwrap.fill(text, width=_WIDTH)


def item(text: str) -> str:
    """The text as an item of a list, in lines of at most 96 characters."""
    return textwrap.fill(text, width=_WIDTH, initial_indent="- ", subsequent_indent="  ")


def percent(share: float) -> str:
    """A share in per cent, to three digits."""
    return f"{100 * share:.3g} %"
