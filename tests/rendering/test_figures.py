"""Figures of a page take their colours from its style sheet."""

from __future__ import annotations

import re

import pytest

from opdtheory.rendering.figures import CLAIMED, FOUND, drawing, frame, page_svg, sheet
from opdtheory.rendering.style import LIGHT

# Those whose contrast is that of text, see test_style.py.
_OF_TEXT = ("ink", "muted", "bad", "found")


def colours_of_text(svg: str) -> set[str]:
    texts = re.findall(r"<text[^>]*>", svg)
    return {(re.findall(r"fill: var\(--(\w+)\)", text) or ["none"])[0] for text in texts}


@pytest.mark.parametrize("small", [False, True])
def test_text_in_figures_has_the_contrast_of_text(small):
    pytest.importorskip("matplotlib")
    with drawing():
        drawn, axis = sheet(small)
        axis.plot([0, 1], [0, 1], color=FOUND, label="one")
        frame(axis, "x", "y")
        axis.legend()
        right = page_svg(drawn, "right")
        axis.text(0, 0, "two", color=CLAIMED)
        wrong = page_svg(drawn, "wrong")
    assert colours_of_text(right) and colours_of_text(right) <= set(_OF_TEXT) <= set(LIGHT)
    assert colours_of_text(wrong) - set(_OF_TEXT) == {"claimed"}
    # No colour but those of the sheet, so that it suits both palettes.
    assert not re.search(r"#[0-9a-f]{6}\b", right.replace("#000000", ""))
