"""A matplotlib figure as an `<svg>` element for a page of its own making."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["svg_of"]

# What matplotlib would write of itself and of the day: the same figure is then the same text.
_SILENT = {"Date": None, "Creator": None, "Format": None, "Type": None}


def svg_of(sheet: Any) -> str:
    """The element alone, without the XML declaration and document type that stand before it in a file.

    Args:
        sheet: a matplotlib `Figure`.
    """
    buffer = io.StringIO()
    sheet.savefig(buffer, format="svg", metadata=_SILENT)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
