"""The site as it is built: formulas, tables, notebooks and names, with nothing that needs a network.

`make browser` looks at every page as a browser shows it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import markdown
import pytest

from tests.scripts import loaded

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_is_whole(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    # One test, as processes that run tests side by side would each build the site.
    no_page_shows_latex_or_needs_a_network(tmp_path / "site")
    notebooks_are_pages_with_their_outputs(tmp_path / "site")
    every_theorem_is_in_the_navigation(tmp_path / "site")


class Text(HTMLParser):
    """The text of a page outside code, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.text, self.loads = 0, "", []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.code += tag in ("code", "script", "style")
        found = dict(attributes)
        if tag in ("script", "img", "iframe", "link") and found.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(found.get("src") or found.get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        self.code -= tag in ("code", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self.code:
            self.text += data


RAW = re.compile(r"\\[(\[a-zA-Z]|\$[^$ ]+\$|[_^]\{")


def no_page_shows_latex_or_needs_a_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 90
    for page in pages:
        read = Text()
        read.feed(page.read_text(encoding="utf-8"))
        assert RAW.findall(read.text) == [], page.name
        assert [each for each in read.loads if each.startswith(("http", "//"))] == [], page.name
    assert RAW.search(r"a \(x\) b") and RAW.search("a $x$ b") and RAW.search("u_{n}") and not RAW.search("$5 and $6")


def notebooks_are_pages_with_their_outputs(site: Path) -> None:
    index = (site / "notebooks" / "index.html").read_text(encoding="utf-8")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        assert f'href="{path.stem}.html"' in index
        page = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        for figure in re.findall(rf'src="({path.stem}_[^"]+)"', page):
            assert (site / "notebooks" / figure).stat().st_size > 1000
    assert len(list((site / "notebooks").glob("*.png"))) > len(notebooks)


def every_theorem_is_in_the_navigation(site: Path) -> None:
    page = (site / "theory" / "index.html").read_text(encoding="utf-8")
    listed = re.findall(r'<a href="(t\d+\w*)\.html" class="md-nav__link"', page)
    assert {path.stem for path in (ROOT / "docs" / "theory").glob("t*.md")} == set(listed)
    assert listed.index("t2b") == listed.index("t2") + 1 and listed.index("t10") > listed.index("t9e")


def rendered(text: str) -> str:
    extension = loaded(ROOT / "docs" / "site" / "extension.py").SiteExtension()
    settings = {"pymdownx.arithmatex": {"generic": True}}
    return markdown.markdown(text, extensions=["tables", "pymdownx.arithmatex", extension], extension_configs=settings)


def test_a_formula_becomes_mathml():
    text = "The ratio $u < 1$ and\n\n$$\na = b;\\quad c = d\n$$\n"
    shown = rendered(text)
    assert not RAW.search(shown) and re.search("<mo[^>]*>&lt;</mo>", shown)
    assert shown.count("formula-line") == 2
    settings = {"pymdownx.arithmatex": {"generic": True}}
    assert RAW.search(markdown.markdown(text, extensions=["pymdownx.arithmatex"], extension_configs=settings))


def test_a_formula_that_cannot_be_typeset_stops_the_build():
    with pytest.raises(ValueError, match="nosuchcommand"):
        rendered(r"$\nosuchcommand{x}$")


def test_a_row_becomes_a_card_with_labels():
    wide = rendered("| a | $b$ | c |\n| --- | --- | --- |\n| 1 | `one_two` | 3 |\n")
    assert re.findall(r'data-label="(\w)"', wide) == ["a", "b", "c"] and '<table class="cards">' in wide
    assert "<code>one_<wbr />two</code>" in wide
    assert '<table class="pair">' in rendered("| a | b |\n| --- | --- |\n| 1 | 2 |\n")


def test_a_name_in_code_keeps_what_it_says():
    shown = rendered("`f(a<b)`, `x` and\n\n    block_of_code\n")
    assert re.sub("<wbr />", "", shown) == markdown.markdown("`f(a<b)`, `x` and\n\n    block_of_code\n")


def test_the_picture_is_drawn_by_its_command():
    module = loaded(ROOT / "docs" / "generate_figures.py")
    assert module.drawn() == module.PATH.read_text(encoding="utf-8"), "python docs/generate_figures.py"
