"""The page of the experiment says what the rows say."""

from __future__ import annotations

import dataclasses

import pytest

from opdtheory.reproduction.page import page_of, read_outcome, write_page
from opdtheory.reproduction.plan import FULL
from opdtheory.reproduction.runner import Outcome
from tests.reproduction.rows import DOCS, world


def test_the_page_says_what_the_rows_say(tmp_path):
    rows = world()
    outcome = Outcome(FULL, rows, {"tools, jsd/opd, seed 1": "not run"}, [], [])
    path = write_page(outcome, tmp_path / "docs" / "reproduction.md")
    again, figures = read_outcome(path.with_suffix(".jsonl"))
    assert page_of(again, figures) == path.read_text(encoding="utf-8")
    assert all((path.parent / file).stat().st_size > 1000 for file, _ in figures) and len(figures) == 3
    page = path.read_text(encoding="utf-8")
    total = len(rows) + 1
    assert f"{len(rows)} of the {total} runs" in page and f"1 of {total} runs of the plan have no row" in page
    assert "holds in 1 of 1" in page and "jsd/top 8 and tail" in page
    assert "collapses: below the student's start in 3 of 3 seeds" in page
    other = dataclasses.replace(outcome, rows=world(**{"forward_kl/opd": 0.6}))
    assert "collapses" in page_of(other, figures) and page_of(other, figures) != page


@pytest.mark.slow
def test_the_committed_page_is_that_of_the_committed_rows():
    path = DOCS / "reproduction.md"
    assert page_of(*read_outcome(path.with_suffix(".jsonl"))) == path.read_text(encoding="utf-8"), (
        "regenerate with: opdtheory reproduce --no-run --page docs/reproduction.md"
    )
