"""Tables in Markdown, and text as it is."""

from __future__ import annotations

import re
from html import unescape

import markdown
import pytest

from opdtheory.rendering.markdown import literal, markdown_table


def test_bars_in_cells_are_escaped() -> None:
    assert markdown_table(("KL(p|q)", "b"), [("1", "x"), ("2", "")]).splitlines() == [
        r"| KL(p\|q) | b |",
        "| --- | --- |",
        "| 1 | x |",
        "| 2 |  |",
    ]


PLAIN = (
    "∇ D_f = + E_p[w_f(u) s], *not* - f(u)",
    "Σ_{a ∈ S} p_a log(p_a/q_a) and reverse_KL",
    "- a", "# b", "[a](b.md)", "`c` and $x$ and \\(y\\)", "p < q > r & s", "KL(p|q) {: .x }", "<b>d</b>", "&amp;",
)  # fmt: skip


def shown(text: str) -> str:
    """What a reader sees of an item of a list."""
    settings = {"pymdownx.arithmatex": {"generic": True}}
    extensions = ["tables", "attr_list", "md_in_html", "pymdownx.arithmatex"]
    page = markdown.markdown(f"- {text}\n", extensions=extensions, extension_configs=settings)
    page = re.sub(
        r"<sub>(\w|a ∈ S)</sub>", lambda index: "_" + (index[1] if len(index[1]) == 1 else f"{{{index[1]}}}"), page
    )
    found = re.fullmatch(r"<ul>\n<li>([^<]*)</li>\n</ul>", page)
    return unescape(found[1]) if found else page


@pytest.mark.parametrize("text", PLAIN, ids=range(len(PLAIN)))
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    assert shown(literal(text)) == text


def test_text_that_is_not_made_plain_is_markup() -> None:
    assert sum(shown(text) != text for text in PLAIN) >= 7


def test_indices_are_lowered() -> None:
    assert literal("Σ_{a ∈ S} p_a, 1_S and q_θ(a)") == (
        "Σ<sub>a ∈ S</sub> p<sub>a</sub>, 1<sub>S</sub> and q<sub>θ</sub>(a)"
    )
    assert literal("top_k and _x and x_{<i>}") == r"top\_k and \_x and x<sub>&lt;i&gt;</sub>"
