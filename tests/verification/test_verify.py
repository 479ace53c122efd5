"""The verification: what is selected, what fails, its record."""

from __future__ import annotations

import dataclasses
import json

import pytest

from opdtheory.theorems import IdentityResult
from opdtheory.theorems.proofs import proof
from opdtheory.verification.verify import Verification, shipped_estimators, verify
from tests.verification.runs import of


def test_what_is_selected_is_verified(verification: Verification) -> None:
    failed = [f"{r.number} {r.name}" for r in verification.theorems if not r.passed]
    failed += [f"{r.name}: {r.claim.verdict}, audit {r.audit.verdict}" for r in verification.estimators if not r.passed]
    assert verification.passed, failed
    assert [r.number for r in verification.theorems] == ["T1b", "T8c"]
    assert {r.audit.name.split("'")[1] for r in verification.estimators} == {"k1_loss", "k3_loss", "sign"}
    assert verification.twins_refuted >= len(verification.identities) + len(verification.estimators)


def test_every_named_estimator_is_verified() -> None:
    import opdtheory as opd

    assert {loss.name for loss in shipped_estimators()} == set(opd.estimator_names())


@pytest.mark.slow
def test_two_processes_find_what_one_finds(verification: Verification) -> None:
    again = verify(["T1b", "k1_loss"], workers=2)
    assert again.passed
    first, second = verification.theorems[0], again.theorems[0]
    assert [r.error for r in first.identities] == [r.error for r in second.identities]


def test_unknown_selections_are_refused() -> None:
    with pytest.raises(ValueError, match="select"):
        verify(["T99"])
    with pytest.raises(ValueError, match="workers"):
        verify(["T1b"], workers=0)


def test_verification_as_json(verification: Verification) -> None:
    record = json.loads(json.dumps(verification.to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert [theorem["number"] for theorem in record["theorems"]] == ["T1b", "T8c"]
    assert all(step["holds"] for theorem in record["theorems"] for step in theorem["derivation"])


def test_the_record_names_the_proofs_in_coq(verification: Verification) -> None:
    assert [theorem["machine_checked"] for theorem in verification.to_dict()["theorems"]] == [None, None]
    assert verification.proofs == []
    found, first = proof("T1"), verification.theorems[0]
    assert found is not None
    renamed = Verification([dataclasses.replace(first, number="T1")], [], 1.0)
    (record,) = json.loads(json.dumps(renamed.to_dict()))["theorems"]
    assert renamed.proofs == [found] and record["machine_checked"] == found.to_dict()
    assert {"checked", "digest", "axioms", "file", "statements"} <= set(record["machine_checked"])


def test_a_surviving_twin_or_a_large_error_fails() -> None:
    right = IdentityResult("T0", "name", "x", 1e-16, 1e-12, 3, {"twin": 1.0}, 0.1)
    survivor = IdentityResult("T0", "name", "x", 1e-16, 1e-12, 3, {"twin": 1e-13}, 0.1)
    wrong = IdentityResult("T0", "name", "x", 1e-3, 1e-12, 3, {"twin": 1.0}, 0.1)
    empty = IdentityResult("T0", "name", "x", 0.0, 1e-12, 0, {"twin": 1.0}, 0.1)
    untested = IdentityResult("T0", "name", "x", 0.0, 1e-12, 3, {}, 0.1)
    assert of(right).passed
    assert not of(right, steps=False).passed
    for result in (survivor, wrong, empty, untested):
        assert not of(right, result).passed
    assert survivor.survivors == ["twin"]
