"""The page of a verification."""

from __future__ import annotations

from opdtheory.theorems import IdentityResult
from opdtheory.verification.page import render_page
from opdtheory.verification.verify import Verification
from tests.verification.runs import of


def test_page_is_self_contained_and_escapes(verification: Verification) -> None:
    page = render_page(verification)
    assert page.count("<svg") == 2
    assert "src=" not in page and "@import" not in page and "<script" not in page
    hostile = IdentityResult("T<b>", "<script>alert(1)</script>", "x", 0.0, 1e-12, 1, {"<i>": 1.0}, 0.1)
    page = render_page(Verification(of(hostile).theorems, verification.estimators[:1], 1.0))
    assert "<script" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page
