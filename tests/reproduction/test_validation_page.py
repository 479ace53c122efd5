"""The page of the validation is that of its record."""

from __future__ import annotations

from opdtheory.reproduction.validation_page import page
from tests.reproduction.rows import DOCS, recorded


def test_the_page_is_that_of_its_record() -> None:
    assert (DOCS / "validation.md").read_text(encoding="utf-8") == page(recorded())
