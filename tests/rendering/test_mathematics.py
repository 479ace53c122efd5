"""Formulas as MathML: lines, terms, and what is not a formula."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest

from opdtheory.rendering.mathematics import can_typeset, display, inline, lines_of, typeset
from opdtheory.rendering.style import FORMULAS, STYLE
from opdtheory.theorems import theorems

converter = pytest.importorskip("latex2mathml.converter")

SPLIT = r"D(p) = \sum_a p_a f(u_a) - \left(a + b\right) \cdot c \le 0"


def maths(shown: str) -> list[str]:
    return re.findall(r"<math.*?</math>", shown)


def large(latex: str) -> str:
    """A formula on a line of its own, without the line."""
    return display(latex).partition("<div class='formula-line'>")[2].removesuffix("</div></div>")


def text(shown: str) -> str:
    """What is printed, without spaces."""
    printed = "".join(ElementTree.fromstring(f"<p>{shown.replace('<wbr>', '')}</p>").itertext())
    return re.sub(r"\s", "", printed)


def formulas() -> list[str]:
    return [
        formula
        for theorem in theorems()
        for formula in (
            theorem.statement,
            *(step.says for step in theorem.derivation),
            *(identity.statement for identity in theorem.identities),
        )
    ]


def test_a_semicolon_and_a_wide_space_end_a_line():
    assert lines_of(r"a = b;\quad c = d;\ e") == ["a = b", "c = d", "e"]
    assert lines_of(r"f(a; b),\quad c") == [r"f(a; b),\quad c"]
    assert lines_of(r"\text{one;\ two};\qquad 3") == [r"\text{one;\ two}", "3"]
    assert lines_of(r"\{a;\quad b\}") == [r"\{a", r"b\}"] and lines_of("") == []
    assert display(r"a;\quad b").count("class='formula-line'") == 2


def test_a_line_may_end_before_relations_and_signs_first_between_outermost_terms():
    terms = large("a + b = (c - d) e").split("<wbr>")
    assert [text(f"<i>{term}</i>".replace("<i><span class='formula'>", "<i>")) for term in terms[:2]] == ["a", "+b"]
    # The last outermost term holds a shorter break of its own.
    assert large("a = (c - d) e").count("<span class='term'>") == 1
    # A bracket may carry a power.
    assert large("a = (c - d)^2 + e").count("<span class='term'>") == 1
    assert len(large("(c - d)^2 + e").split("</span><wbr><math")) == 2
    assert [len(maths(large(latex))) for latex in ("a", "a b", "a + b", "a = -b", "-a", "(-a)")] == [1, 1, 2, 2, 1, 1]


def test_a_sign_is_infix_between_terms_and_a_prefix_before_one():
    second = maths(large("a - b"))[1]
    assert '<mo form="infix">−</mo>' in second
    assert '<mo form="prefix">−</mo>' in large("a = -b") and '<mo form="prefix">−</mo>' in large("f(-b)")
    assert "prefix" not in large("a - b") and "infix" not in maths(large("- b"))[0]


def test_a_short_formula_in_a_sentence_stays_on_one_line():
    assert inline("u = 1").startswith("<span class='formula'><span class='term'><math") and "<wbr>" not in inline(
        "u = 1"
    )
    assert "<wbr>" in large("u = 1") and "<wbr>" in inline("u_1 f(u_1) = u_2 f(u_2)")


def test_names_of_functions_are_spaced_and_whole():
    space = '<mspace width="0.167em" />'
    assert f"<mi>log</mi>{space}<mi>u</mi>" in inline(r"\log u") and f"<mi>c</mi>{space}<mi>log</mi>" in inline(
        r"c\log u"
    )
    assert space not in inline(r"\log(u)") and space not in inline(r"\log{\left(u \right)}")
    assert "<mi>sg</mi>" in inline(r"\mathrm{sg}(p)") and "<mi>Li</mi>" in inline(r"\operatorname{Li}_{2}(u)")


def test_prose_stands_outside_formulas():
    shown = inline(r"p = q \text{ for every token and } u = 1")
    outside = re.sub(r"<math.*?</math>", "", shown)
    assert " for every token and " in outside and not any("token" in part for part in maths(shown))
    assert "token_return at" in inline(r"\text{token\_return at one}")
    assert typeset("a <b> & $u < 1$, so") == f"a &lt;b&gt; &amp; {inline('u < 1')}, so"


@pytest.mark.parametrize(
    "latex", [r"\frac{a", "a}", r"\left(a", r"\begin{cases} a", "a^", "", r"\unknown x", "<script>{"]
)
def test_what_cannot_be_read_stays_latex(latex):
    shown = inline(latex)
    assert shown.startswith("<code>") and "<math" not in shown and "<script" not in shown


def test_every_formula_of_every_theorem_is_typeset_and_loses_nothing():
    for latex in formulas():
        for line in lines_of(latex):
            shown = inline(line)
            assert "<code>" not in shown and "\\" not in shown, line
            whole = re.sub(r' xmlns="[^"]*"', "", converter.convert(line))
            assert text(shown) == text(whole).replace("\\_", "_"), line
    for theorem in theorems():
        for prose in (theorem.meaning, theorem.advice, *theorem.hypotheses, *(s.why for s in theorem.derivation)):
            assert "<code>" not in typeset(prose), prose
    # The twin: a term that is left out is seen.
    assert text(inline(SPLIT)) != text(re.sub(r"<math.*?</math>", "", inline(SPLIT), count=1))


def test_without_the_extra_formulas_stand_as_latex(monkeypatch):
    assert can_typeset()
    monkeypatch.setitem(sys.modules, "latex2mathml", None)
    assert not can_typeset()
    assert inline("u < 1") == "<code>u &lt; 1</code>" and "<math" not in display(SPLIT)
    monkeypatch.undo()
    assert "<math" in inline("u < 1")


def test_every_class_has_its_rule():
    shown = display(SPLIT)
    for name in set(re.findall(r"class='([\w-]+)'", shown)):
        assert f".{name}" in FORMULAS
    assert FORMULAS in STYLE
