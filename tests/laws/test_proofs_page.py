"""The page of the proofs in Coq is what its script makes of the record and of the sources."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from opdtheory.theorems import theorems
from opdtheory.theorems.proofs import proofs
from opdtheory.verification.markdown import machine_checked_part
from tests.laws.pages import run_page
from tests.scripts import loaded

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded(DOCS / "generate_proofs.py")


def test_the_page_is_what_its_script_makes(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(), "python docs/generate_proofs.py"
    for number, found in proofs().items():
        assert f"\n## {number}\n" in page and found.digest in page
        for each in (*found.statements, *found.twins):
            assert f"**`{each.name}`" in page and each.text in page


def test_every_axiom_is_explained(script: ModuleType) -> None:
    assert {axiom for found in proofs().values() for axiom in found.axioms} <= set(script._AXIOMS)


def test_code_that_is_not_in_the_proofs_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    statement = proofs()["T1"].statements[0].text
    page.write_text(f"```coq\n{statement}\n```\n", encoding="utf-8")
    assert run_page(page) == []
    page.write_text(f"```coq\n{statement.replace('<=', '<')}\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="no file of proofs has"):
        run_page(page)


def test_the_part_on_a_theorems_page_is_exchanged_alone() -> None:
    with_proof = loaded(DOCS / "generate_theory.py").with_proof
    for theorem in theorems():
        page = (DOCS / "theory" / f"{theorem.number.lower()}.md").read_text(encoding="utf-8")
        assert page == with_proof(page, theorem.number), "python docs/generate_theory.py --proofs"
        assert ("\n## Machine-checked\n" in page) is (theorem.number in proofs())
    before, after = "# T\n\n## What to do\n\nThis.\n\n", "## What was checked\n\nAll.\n"
    page = with_proof(before + after, "T1")
    assert page == f"{before}{machine_checked_part('T1')}\n\n{after}"
    assert with_proof(page.replace("Coq", "coq"), "T1") == page and with_proof(page, "T99") == before + after
