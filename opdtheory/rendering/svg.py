"""A matplotlib figure as an `<svg>` element of a page."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["svg_of"]

# Without the date and the version of matplotlib, the same figure is the same text.
_SILENT = {"Date": None, "Creator": None, "Format": None, "Type": None}


def svg_of(sheet: Any) -> str:
    """The element alone, without the XML declaration and document type that precede it in a file.

    Args:
        sheet: a matplotlib `Figure`.
    """
    buffer = io.StringIO()
    sheet.savefig(buffer, format="svg", metadata=_SILENT)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
