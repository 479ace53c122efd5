"""The page of an audit: what it says, that it is one closed file, and that names are escaped."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import opdtheory as opd
from opdtheory.auditing import VERDICTS
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult
from opdtheory.auditing.views import render_audit, write_audit
from opdtheory.objective import Objective
from opdtheory.rendering.html import formula
from opdtheory.rendering.mathematics import display, inline
from tests.auditing.views.parts import HOSTILE, SAMPLED, whole
from tests.rendering.browser import CHROMIUM, sticks_out


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its ids, its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_report_says(report):
    page = Page(render_audit(report))
    words = " ".join(page.text.split())
    assert report.summary() in words
    for text in ("k3", "other objective", "reverse_kl (token_local)", "forward_kl (token_local)", "+0.808088"):
        assert text in words
    for pair in report.pairs:
        assert pair.label in words
    assert page.tags.count("svg") == 4 and page.tags.count("h1") == 1


@pytest.mark.slow
def test_every_verdict_has_a_page(reports):
    found = {report.verdict for report in reports}
    assert found == set(VERDICTS) - {"undecided"}
    for report in reports:
        page = Page(render_audit(report))
        assert VERDICTS[report.verdict][1:] in page.text
        coarse = float(report.weight["log_u"][-1]) < 1.0
        assert page.tags.count("svg") == 4 - 2 * coarse
    sampled = MonteCarloResult(**SAMPLED, words="Undecided.", follows=None)
    undecided = dataclasses.replace(reports[0], verdict="undecided", monte_carlo=sampled)
    assert 'class="verdict open"' in render_audit(undecided) and "Monte Carlo" in render_audit(undecided)


def test_the_page_asks_for_nothing_and_runs_nothing(report):
    text = render_audit(whole(report))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    for key, value in page.attributes:
        assert not key.startswith("on") and key != "src"
        if key.endswith("href"):
            assert value.startswith("#")
    assert "@import" not in text and "url(#" in text and not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_found(report):
    text = render_audit(report)
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_names_are_escaped_wherever_they_stand(report):
    claim = Objective.of(opd.Divergence.from_expr(opd.divergence("jsd").expr, name=HOSTILE))
    scenario = dataclasses.replace(report.scenario)
    identified = dataclasses.replace(report.identified, objective=HOSTILE)
    # Nothing is checked again once it is there.
    object.__setattr__(claim, "granularity", HOSTILE)
    object.__setattr__(scenario, "eos", HOSTILE)
    object.__setattr__(identified, "granularity", HOSTILE)
    hostile = dataclasses.replace(
        whole(report, HOSTILE),
        claim=claim,
        scenario=scenario,
        identified=identified,
        pairs=[dataclasses.replace(report.pairs[0], label=HOSTILE), *report.pairs[1:]],
    )
    page = Page(render_audit(hostile))
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count(HOSTILE) >= 15
    # The check itself sees a name that is not escaped.
    assert "script" in Page(render_audit(hostile).replace("&lt;script&gt;", "<script>", 1)).tags


def test_optional_parts_are_shown(report):
    text = " ".join(Page(render_audit(whole(report, "my words"))).text.split())
    for part in ("What would make it right", "audited: exact", "not verified", "Checks", "fails", "noted"):
        assert part in text
    for part in (
        "−∞ as u → 0, ∞ as u → ∞",
        "bfloat16",
        "11, 88",
        "nowhere",
        "1, 0.5, 0.25",
        "k = 2",
        "Monte Carlo",
    ):
        assert part in text
    bare = {"form": None, "dependence": None, "checks": [], "numerics": [], "remedies": [], "monte_carlo": None}
    plain = Page(render_audit(dataclasses.replace(report, **bare))).text
    assert "What would make it right" not in plain and "Numerics" not in plain


def test_without_matplotlib_the_page_says_so(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = render_audit(report)
    assert "opdtheory[plots]" in text and "<svg" not in text


def test_expressions_are_in_print_wherever_they_stand(report, monkeypatch):
    pytest.importorskip("latex2mathml")
    weight, latex = "-u*log(u) + 2*u**2", r"- u \log{\left(u \right)} + 2 u^{2}"
    form = dataclasses.replace(
        report.form,
        expr=weight,
        latex=latex,
        generator=weight,
        generator_latex=latex,
        second_moment=f"E_p[w^2] with w = {weight}: finite",
    )
    shown = dataclasses.replace(report, form=form)
    text = render_audit(shown)
    assert text.count(inline(latex)) == 1 and text.count(display(latex)) == 2 and inline("E_p[w^2]") in text
    assert "*log" not in Page(text).text and "<code>" not in text
    # Without the extra, products have no star either, and no line ends in one.
    monkeypatch.setitem(sys.modules, "latex2mathml", None)
    text = render_audit(shown)
    assert text.count(formula(weight)) == 3 and "<math" not in text and "*log" not in Page(text).text
    assert "u\u202flog(u)" in Page(text).text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_sticks_out_at_either_width(report, tmp_path, width):
    found = sticks_out(render_audit(whole(report)), width, tmp_path)
    # Tables of numbers scroll on a narrow page, beside their first column.
    assert not found if width == 1400 else {kind for kind, _ in found} <= {"scroll"}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_the_page_and_runs_no_name(report, tmp_path):
    path = write_audit(whole(report, HOSTILE), tmp_path / "deep" / "audit.html")
    # The twin: the same name, not escaped and no policy against it, does run.
    bad = tmp_path / "bad.html"
    bad.write_text(f"<!doctype html><title>own</title><p>{HOSTILE}</p>", encoding="utf-8")
    assert "<title>taken</title>" in dumped(bad, tmp_path)
    dom = dumped(path, tmp_path)
    page = Page(dom)
    assert "script" not in page.tags and "img" not in page.tags
    assert "<title>taken" not in dom and page.tags.count("svg") == 4
    assert "The loss does not descend reverse_kl" in page.text and HOSTILE in page.text


def dumped(path: Path, folder: Path) -> str:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([str(CHROMIUM), *options, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
