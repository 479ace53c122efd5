"""Figures for a page: matplotlib drawings (extra `plots`) whose colours are those of the page's style sheet."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from opdtheory.rendering.style import palette
from opdtheory.rendering.svg import svg_of

__all__ = ["BAD", "CLAIMED", "FOUND", "INK", "MUTED", "RULE", "drawing", "frame", "page_svg", "picture", "sheet"]

# Placeholder colours, each of which becomes a variable of the page's style sheet.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--claimed)",
    "#050505": "var(--found)",
    "#060606": "var(--bad)",
}
INK, MUTED, RULE, CLAIMED, FOUND, BAD = _COLOURS


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """The style in which figures are drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    style: dict[Any, Any] = {
        "svg.hashsalt": "opdtheory",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "mathtext.fontset": "dejavusans",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.unicode_minus": True,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
    }
    with matplotlib.rc_context(style):
        yield


def sheet(small: bool = False) -> tuple[Any, Any]:
    """A figure and its axis, without a background; a small one has no room for the names of its axes."""
    # Not pyplot: no global state, and no display.
    from matplotlib.figure import Figure as Sheet

    drawn = Sheet(figsize=(2.2, 1.5) if small else (4.5, 3.0))
    left, bottom, top = (0.2, 0.19, 0.95) if small else (0.125, 0.17, 0.9)
    drawn.subplots_adjust(left=left, right=0.97, bottom=bottom, top=top)
    drawn.patch.set_alpha(0.0)
    axis = drawn.subplots()
    axis.patch.set_alpha(0.0)
    return drawn, axis


def frame(axis: Any, x: str, y: str) -> None:
    """Name the axes and draw the grid."""
    axis.set_xlabel(x)
    # Above the axis, so that it is horizontal and clear of wide tick labels.
    axis.text(-0.1, 1.03, y, transform=axis.transAxes, ha="left", va="bottom")
    axis.grid(True, axis="both" if axis.get_xscale() == "linear" else "x")
    axis.set_axisbelow(True)
    axis.minorticks_off()


def page_svg(drawn: Any, prefix: str) -> str:
    """The element as a page shows it; `prefix` keeps the names of its parts apart from those of other figures."""
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg_of(drawn))
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]+", "font-family: inherit", text)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def picture(drawn: Any) -> str:
    """A file of its own, which carries the colours of both palettes."""
    style = f"<style>{palette()} svg {{ font-family: system-ui, sans-serif; }}</style>"
    return re.sub(r"(<svg [^>]*>)", rf"\1{style}", page_svg(drawn, "picture"), count=1)
