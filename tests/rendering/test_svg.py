"""Figures as SVG."""

from __future__ import annotations

import pytest

from opdtheory.rendering.svg import svg_of


def test_a_figure_is_one_element_and_the_same_text_twice() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    def drawn() -> str:
        with matplotlib.rc_context({"svg.hashsalt": "opdtheory"}):
            sheet = Figure()
            sheet.subplots().plot([0, 1])
            return svg_of(sheet)

    assert drawn() == drawn()
    assert drawn().startswith("<svg") and drawn().rstrip().endswith("</svg>") and "matplotlib" not in drawn()[:400]
