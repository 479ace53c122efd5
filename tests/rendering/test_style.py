"""The palettes of the pages."""

from __future__ import annotations

import pytest

from opdtheory.rendering.style import DARK, LIGHT


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_that_of_wcag(palette):
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    for ground in (palette["paper"], palette["panel"]):
        for name in ("ink", "muted", "good", "bad", "open", "found"):
            assert contrast(palette[name], ground) >= 4.5, name
        assert contrast(palette["claimed"], ground) >= 3.0
