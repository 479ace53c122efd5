"""The page of a verification: what it links, what it shows first, and that its formulas are typeset."""

from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser

import pytest

from opdtheory.theorems import IdentityResult, StepResult, theorems
from opdtheory.theorems.proofs import proof
from opdtheory.verification.families import FAMILIES, by_family, family
from opdtheory.verification.page import render_page, write_page
from opdtheory.verification.verify import Verification
from tests.rendering.browser import CHROMIUM, sticks_out
from tests.verification.runs import few, of

_VOID = ("meta", "wbr", "br")


class Page(HTMLParser):
    """What a browser makes of a page: ids and links in order, text outside `<code>`, tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.text = ""
        self.feed(text)
        self.unbalanced += self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if given.get("id") else []
        self.links += [given["href"]] if tag == "a" else []
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag) if tag not in _VOID else None

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not {"code", "style"} & set(self.open):
            self.text += data

    @property
    def latex(self) -> list[str]:
        """What only LaTeX writes: commands, dollars, and indices in braces."""
        return re.findall(r"\\\w*|\$|[_^]\{", self.text)


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures take most of the time of a page, and tell it nothing."""
    monkeypatch.setattr("opdtheory.verification.page.figures", lambda results: "<section id='figures'></section>")


@pytest.fixture
def page(undrawn) -> str:
    return render_page(few())


def broken(verification: Verification) -> Verification:
    """The same run, in which the last theorem's first check is wrong and its second twin survives."""
    *before, last = verification.theorems
    checks = [dataclasses.replace(check, twins=dict(check.twins)) for check in last.identities]
    checks[0] = dataclasses.replace(checks[0], error=1e-3, worst="chi2, <3 tokens>")
    checks[-1].twins["the same again"] = 0.0
    steps = [dataclasses.replace(last.steps[0], holds=False), *last.steps[1:]]
    failed = dataclasses.replace(last, identities=checks, steps=steps)
    estimator = dataclasses.replace(verification.estimators[0], agrees=False)
    return Verification([*before, failed], [estimator, *verification.estimators[1:]], 1.0)


def test_the_page_is_one_closed_file_and_escapes(verification: Verification, tmp_path) -> None:
    page = write_page(verification, tmp_path / "deep" / "verify.html").read_text(encoding="utf-8")
    assert "src=" not in page and "@import" not in page and "<script" not in page
    assert page.count("<svg") == 6 + len(verification.estimators)
    assert not re.search(r"url\((?!#)", page) and 'class="verdict good"' in page
    hostile = IdentityResult("T<b>", "<script>alert(1)</script>", "x <img>", 0.0, 1e-12, 1, {"<i>": 1.0}, 0.1)
    shown = render_page(Verification(of(hostile).theorems, verification.estimators[:1], 1.0))
    assert "<script" not in shown and "<i>" not in shown and "<img" not in shown
    assert "&lt;script&gt;" in shown


def test_links_lead_to_ids_and_every_theorem_has_one(page: str) -> None:
    seen = Page(page)
    assert seen.unbalanced == [] and Page(page.replace("</article>", "", 1)).unbalanced != []
    assert len(seen.ids) == len(set(seen.ids))
    for text in (page, render_page(broken(few()))):
        linked = Page(text)
        assert {link.removeprefix("#") for link in linked.links} <= set(linked.ids)
        assert {"contents", "t1b", "t8c", "estimators", "figures"} <= set(linked.ids)
        assert text.count("<article") == len(few().theorems) == linked.links.count("#contents")
        for number in ("#t1b", "#t8c"):
            assert number in linked.links
    # The check sees a link that leads nowhere.
    lost = Page(page.replace("id='t8c'", ""))
    assert "t8c" not in lost.ids and "#t8c" in lost.links


def test_what_fails_comes_first_and_open(undrawn) -> None:
    page = render_page(broken(few()))
    assert page.index("id='failing'") < page.index("id='t8c'") < page.index("id='contents'") < page.index("id='t1b'")
    failed = page[page.index("id='t8c'") : page.index("</article>")]
    assert failed.count("<details open>") == 3 and "<details open>" not in page[page.index("</article>") :]
    assert "worst: chi2, &lt;3 tokens&gt;" in failed and "“the same again”" in failed and "survives" in failed
    assert "Step 1 of the derivation does not hold" in failed
    assert "Estimators that do not keep their claim." in page and 'class="verdict bad"' in page
    contents = page[page.index("id='contents'") : page.index("</nav>")]
    assert contents.count(">fails</span>") == 1


def test_nothing_is_open_where_all_holds(page: str) -> None:
    assert "<details open" not in page and "id='failing'" not in page and "fails" not in Page(page).text


def test_a_check_without_cases_or_twins_says_so(undrawn) -> None:
    empty = IdentityResult("T0", "name", "x", 0.0, 1e-12, 0, {"twin": 1.0}, 0.1)
    untested = IdentityResult("T0", "other", "x", 0.0, 1e-12, 3, {}, 0.1)
    page = render_page(of(empty, untested, steps=False))
    assert "The check “name” saw no case." in page and "The check “other” has no false twin." in page
    assert "0 of 1 steps hold" in page and "Others" in page


def test_formulas_are_typeset_everywhere(undrawn) -> None:
    pytest.importorskip("latex2mathml")
    # Statements of all theorems, with what was found about one.
    some = few().theorems[-1]
    everything = [dataclasses.replace(some, number=each.number, name=each.name) for each in theorems()]
    page = render_page(Verification(everything, few().estimators, 1.0))
    seen = Page(page)
    assert seen.latex == [] and page.count("<math") > 400
    assert all(theorem.number.lower() in seen.ids for theorem in theorems())
    assert Page(r"<p>\frac{a}{b} and $x_{1}$</p> <code>\sum</code>").latex == ["\\frac", "$", "_{", "$"]


def test_without_the_extra_the_page_says_so_and_shows_latex(monkeypatch) -> None:
    said = "opdtheory[plots]"
    monkeypatch.setitem(sys.modules, "latex2mathml", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render_page(few())
    top = page[: page.index("</section>")]
    assert said in top and "<math" not in page and "<svg" not in page and page.count(said) == 2
    assert Page(page).latex == [] and Page(page).unbalanced == [] and "<code>" in page
    monkeypatch.undo()
    assert said not in render_page(of())


def test_what_coq_checked_is_folded_and_counted(undrawn, monkeypatch) -> None:
    title = "Machine-checked in Coq"
    assert title not in render_page(few()) and "machine-checked in Coq." not in render_page(few())
    found = proof("T1")
    renamed = [dataclasses.replace(few().theorems[0], number="T1"), few().theorems[1]]
    page = render_page(Verification(renamed, [], 1.0))
    part = page[page.index(f"<details><summary>{title} {found.coq}: ") : page.index("</article>")]
    assert part.count("<li>") == len(found.statements) + len(found.twins)
    assert found.checked in part and f"<code>{found.digest[:12]}</code>" in part and "<code>sig_not_dec</code>" in part
    assert "<p>1 theorem is machine-checked in Coq.</p>" in page and Page(page).unbalanced == []
    hostile = dataclasses.replace(found.statements[0], words="<b>x</b>")
    changed = dataclasses.replace(found, statements=(hostile,))
    monkeypatch.setattr("opdtheory.verification.article.proof", {"T1": changed}.get)
    assert "<li>&lt;b&gt;x&lt;/b&gt;.</li>" in render_page(Verification(renamed, [], 1.0))


def test_every_theorem_belongs_to_a_family() -> None:
    found = {theorem.number: family(theorem) for theorem in theorems()}
    assert set(found.values()) == set(FAMILIES) - {"others"}
    assert found["T2"] == "gradient" and found["T12b"] == "vocabulary" and found["T10b"] == "samplers"
    assert family(None) == "others"
    ordered = dict(by_family((theorem.number, theorem) for theorem in theorems()))
    assert sum(map(len, ordered.values())) == len(theorems()) and list(ordered) == list(FAMILIES)[:-1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_sticks_out_at_either_width(tmp_path, width) -> None:
    pytest.importorskip("latex2mathml")
    some = few().theorems[-1]
    everything = [
        dataclasses.replace(
            some,
            number=each.number,
            name=each.name,
            steps=[StepResult(step.says, step.why, True, step.in_words) for step in each.derivation],
            identities=[
                dataclasses.replace(some.identities[0], name=check.name, statement=check.statement)
                for check in each.identities
            ],
        )
        for each in theorems()
    ]
    page = render_page(Verification(everything, few().estimators, 1.0))
    assert sticks_out(page, width, tmp_path) == []
    # The twins: a wide word, and a wide formula.
    long = "<main><p style='width: 2000px; max-width: none'>long</p>"
    assert sticks_out(page.replace("<main>", long, 1), width, tmp_path)[0][0] == "P"
    line = f"<main><div class='formula-line' style='white-space: nowrap'>{'x + ' * 400}</div>"
    assert sticks_out(page.replace("<main>", line, 1), width, tmp_path)[0][0] == "formula-line"
