"""The page on sampled tails is what its script makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate_sampled_tail", DOCS / "generate_sampled_tail.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "sampled_tail.md").read_text(encoding="utf-8") == script.page()
