"""The walk itself: for each kind of fault a page that has it, and near neighbours that have none.

`make browser` asks for these tests; they need Chromium and playwright.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.browser import chromium
from tests.browser.__main__ import main
from tests.browser.findings import KINDS, Finding, Findings, Setting, settings_in_words
from tests.browser.links import Links
from tests.browser.pages import make, reports
from tests.browser.twins import TWINS, document
from tests.browser.walk import Target, fits, targets_of, walk

ASKED = os.environ.get("OPDTHEORY_BROWSER", "") not in ("", "0")
REASON = chromium.missing() if ASKED else "run by `make browser`"
browser = pytest.mark.skipif(REASON is not None, reason=(REASON or "").partition("\n")[0])


def slug(name: str) -> str:
    return name.replace(" ", "_").replace("`", "")


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    root = tmp_path_factory.mktemp("site")
    for folder in ("folder", "bare"):
        (root / folder).mkdir()
    (root / "style.css").write_text("p { margin: 1em 0 }", encoding="utf-8")
    (root / "other.html").write_text(document("<h1 id='place'>other</h1>"), encoding="utf-8")
    (root / "folder" / "index.html").write_text(document("<h1><a name='inside'>inside</a></h1>"), encoding="utf-8")
    for name, twin in TWINS.items():
        for i, body in enumerate((twin.bad, *twin.good)):
            (root / f"{slug(name)}.{i}.html").write_text(document(body), encoding="utf-8")
    return walk(targets_of(root))


@browser
@pytest.mark.parametrize("name", TWINS)
def test_the_fault_is_found_where_it_shows(walked: Findings, name: str) -> None:
    found = walked.of(f"{slug(name)}.0.html", TWINS[name].kind)
    assert len(found) == 1, walked.of(f"{slug(name)}.0.html")
    assert settings_in_words(walked.at[found[0]]) == TWINS[name].at


@browser
@pytest.mark.parametrize("name", TWINS)
def test_near_neighbours_are_not_blamed(walked: Findings, name: str) -> None:
    for i in range(1, 1 + len(TWINS[name].good)):
        assert walked.of(f"{slug(name)}.{i}.html") == [], TWINS[name].good[i - 1]


def test_every_kind_of_fault_has_a_twin() -> None:
    assert {twin.kind for twin in TWINS.values()} == set(KINDS)


@browser
def test_a_single_file_is_read_without_a_server(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(
        document(
            "<a href='#here'>x</a><h1 id='here'>y</h1><a href='gone.html'>z</a><img alt='' src='https://a.org/b'>"
        ),
        encoding="utf-8",
    )
    found = walk([Target("report", page)], widths=(400,), schemes=("light",))
    assert [f.text for f in found.of(kind="dead link")] == ["gone.html", "https://a.org/b"]
    assert [f.text for f in found.of(kind="request")] == ["https://a.org/b"]


@browser
def test_a_report_has_no_latex_to_quote(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(document(r"<p><code>\frac{a}{b}</code></p><pre>\frac</pre>"), encoding="utf-8")
    for target, kinds in ((Target("report", tmp_path / "index.html"), ["raw formula"]), (*targets_of(tmp_path), [])):
        found = walk([target], widths=(400,), schemes=("light",))
        assert [f.kind for f in found.at] == kinds


@browser
def test_what_other_tabs_show_is_judged(tmp_path: Path) -> None:
    inputs = "<input type='radio' name='t' id='t1' checked><input type='radio' name='t' id='t2'>"
    style = "<style>.b { display: none } #t2:checked ~ .a { display: none } #t2:checked ~ .b { display: block }</style>"
    wide = "<div class='a'>short</div><div class='b' style='width: 2000px'>wide</div>"
    page = tmp_path / "tabs.html"
    page.write_text(document(f"{style}<div class='tabbed-set'>{inputs}{wide}</div>"), encoding="utf-8")
    found = walk([Target("tabs", page)], schemes=("light",))
    assert [f.kind for f in found.at] == ["page too wide", "beyond the edge"]


@browser
def test_each_scheme_is_a_first_visit(tmp_path: Path) -> None:
    """A page that remembers the scheme of the first visit is dark in the dark all the same."""
    script = (
        "const dark = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';"
        "localStorage.scheme ??= dark; document.documentElement.style.colorScheme = localStorage.scheme;"
    )
    (tmp_path / "index.html").write_text(document(f"<p>text</p><script>{script}</script>"), encoding="utf-8")
    assert walk(targets_of(tmp_path)).at == {}


@browser
def test_the_command_fails_if_there_is_a_fault_and_takes_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, shots = tmp_path / "site", tmp_path / "shots"
    (site / "deep").mkdir(parents=True)
    (site / "index.html").write_text(document("<p>text</p>"), encoding="utf-8")
    (site / "deep" / "index.html").write_text(document("<p>e^{x}</p>"), encoding="utf-8")
    call = ["--site", str(site), "--no-reports"]
    assert main([*call, "--only", "index.html", "--screenshots", str(shots)]) == 0
    assert sorted(path.name for path in shots.iterdir()) == [
        f"index_{width}_{scheme}.png" for width in (1400, 400) for scheme in ("dark", "light")
    ]
    assert "1 pages, 0 faults" in capsys.readouterr().out
    assert main(call) == 1
    printed = capsys.readouterr().out
    assert "raw formula: 1 on 1 pages" in printed and "deep/index.html [1400 light]" in printed
    assert main([*call, "--only", "nothing"]) == 2


def test_without_a_browser_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(chromium.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(chromium, "_PLACES", ())
    assert main([]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err
    monkeypatch.setenv(chromium.VARIABLE, "/no/such/browser")
    assert main([]) == 2
    assert "must name an executable, got '/no/such/browser'" in capsys.readouterr().err
    tool = tmp_path / "chromium"
    tool.write_text("#!/bin/sh\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.delenv(chromium.VARIABLE)
    assert chromium.executable() == str(tool) and chromium.no_browser() is None


def test_a_fault_is_one_fault_in_every_setting() -> None:
    found = Findings()
    found.pages = ["a", "b"]
    light, dark, narrow = Setting(1400, "light"), Setting(1400, "dark"), Setting(400, "dark")
    for setting, detail in ((light, "720 px"), (dark, "720 px"), (narrow, "300 px")):
        found.add(Finding("a", "must be scrolled", "body > pre", "text", detail), setting)
    assert len(found.at) == 1
    printed = list(found.lines())
    assert "  a [1400, 400 dark] body > pre" in printed
    assert printed[-1].split() == ["clean", "pages", "1/2", *["2/2"] * 7]
    assert printed[-2].split() == ["faults", "1", *["0"] * 7]
    with pytest.raises(ValueError, match="kind must be"):
        found.add(Finding("a", "wrong", "", ""), light)


def test_a_report_that_cannot_be_made_ends_the_walk(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"audit nothing.py:loss wrote no page\n.*nothing.py"):
        make("wrong", ["audit", "nothing.py:loss"], tmp_path)
    with pytest.raises(SystemExit, match="(?s)wrote no page\n.*invalid choice"):
        make("wrong", ["audit", "nothing.py:loss", "--method", "guess"], tmp_path)


def test_reports_are_files_of_a_folder_or_made(tmp_path: Path) -> None:
    for name in ("a.html", "deep/b.html", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    assert [each.name for each in reports(tmp_path, tmp_path / "v.html", tmp_path)] == ["a", "b", "verify"]
    assert reports(None, None, tmp_path, only="nothing") == []


def test_patterns_may_leave_out_the_name_of_the_file() -> None:
    assert fits("theory/t2/index.html", "theory/*") and fits("tutorial/index.html", "tutorial")
    assert fits("404.html", "404") and fits("verify", "verify") and not fits("tutorial/index.html", "tut")


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("https://arxiv.org/abs/2306.13649", None),
        ("http://joschu.net/blog/kl-approx.html", None),
        ("https://arxiv/abs", "is not well-formed"),
        ("https:///abs", "is not well-formed"),
        ("javascript:void(0)", "must be a link to a page, got the scheme javascript"),
        ("mailto:a@example.org", None),
    ],
)
def test_links_elsewhere_are_well_formed(address: str, fault: str | None) -> None:
    links = Links(Path("page.html"), None, None, set())
    assert links.fault({"kind": "link", "value": address, "url": address}) == fault
    assert links.external == ({address} if fault is None and address.startswith("http") else links.external)
