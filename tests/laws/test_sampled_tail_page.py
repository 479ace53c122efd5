"""The page on sampled tails is what its script makes."""

from __future__ import annotations

from pathlib import Path

from tests.scripts import loaded

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_script_makes() -> None:
    script = loaded(DOCS / "generate_sampled_tail.py")
    assert (DOCS / "sampled_tail.md").read_text(encoding="utf-8") == script.page()
