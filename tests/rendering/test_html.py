"""Numbers, formulas and prose as HTML."""

from __future__ import annotations

from html.parser import HTMLParser

from opdtheory.rendering.html import document, figure, formula, number, prose, save_page, section, table


def test_numbers_and_formulas_read_as_in_print():
    assert number(-0.5) == "−0.5" and number(1.5e-12) == "1.5 × 10<sup>−12</sup>" and number(3) == "3"
    assert number(None) == "–" and number(float("-inf")) == "−∞" and number(float("nan")) == "not a number"
    u = "<var>u</var>"
    # A product has a thin space, at which no line ends, and no star.
    assert (
        formula("u**2*log(u)") == f"<span class='formula'><span class=term>{u}<sup>2</sup>\u202flog({u})</span></span>"
    )
    assert formula("-u**(1/2)") == f"<span class='formula'><span class=term>−{u}<sup>1/2</sup></span></span>"
    two = formula("-u*log(u) - (u + 1)*log(u/2 + 1/2)/2")
    assert two.count("class=term") == 2 and f"</span> <span class=term>− ({u} + 1)\u202flog" in two
    assert formula("u**(a*(b))") == "<code>u**(a*(b))</code>" and formula(None) == ""
    assert "<b>" not in formula("<b>u</b>")
    assert prose("w - w(1) -> -0.3, like -u^2 as u -> inf <b>") == (
        "w − w(1) → −0.3, like −u<sup>2</sup> as u → ∞ &lt;b&gt;"
    )
    assert prose("w(u_n) - sum_{m>n} gamma^(m-n) f(u_m)") == (
        "w(u<sub>n</sub>) − Σ<sub>m&gt;n</sub> γ<sup>m−n</sup> f(u<sub>m</sub>)"
    )
    assert prose("u*log(u) + 2*u, off_policy=0.3, a * b, **kwargs") == (
        "u\u202flog(u) + 2\u202fu, off_policy=0.3, a * b, **kwargs"
    )
    assert prose("whole-vocabulary, k-1, f(u)-1") == "whole-vocabulary, k-1, f(u)-1" and prose(None) == ""


class Tags(HTMLParser):
    """The tags of a page that are open, and whether each is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "wbr", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_a_page_is_balanced_and_written_with_its_folder(tmp_path):
    rows = [("<b>1</b>", "a", "b", "c")]
    parts = [
        section("One", table(("", "x", "y", "z"), rows, "A caption & more"), "one"),
        figure("t", "alt", "<svg></svg>", "c"),
    ]
    page = document("kicker", "a.b:c", "holds", "good", "<p>lead</p>", [*parts, ""], "foot")
    assert Tags(page).wrong == [] and Tags(page.replace("</table>", "")).wrong != []
    assert save_page(page, tmp_path / "deep" / "page.html").read_text(encoding="utf-8") == page
    assert "<section id='one'>" in page and "<figcaption>A caption &amp; more</figcaption>" in page


def test_wide_tables_become_cards_unless_they_are_all_numbers():
    wide = table(("", "check", "value", "found"), [("1", "a", "2", "b")], "about", numbers=(2,))
    assert "<table class=cards>" in wide and "<td data-label='check'>a</td>" in wide
    assert "<td data-label='value' class=number>2</td>" in wide and "<td>1</td>" in wide
    for narrow in (
        table(("pair", "value"), [("1", "2")], "about", numbers=(1,)),
        table(("pair", "a", "b", "c"), [("1", "2", "3", "4")], "about", numbers=(1, 2, 3)),
    ):
        assert "cards" not in narrow and "data-label" not in narrow
        # It may scroll, and so a keyboard must reach it.
        assert "<div class='scroll' tabindex='0' role='region' aria-label='about'>" in narrow
