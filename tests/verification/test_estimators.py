"""The symbolic table of estimators agrees with the claims that audits confirm."""

from __future__ import annotations

import pytest

from opdtheory.verification.estimators import Row, rows


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return rows()


def test_verdicts_agree_with_the_claims(table: list[Row]) -> None:
    """Two derivations that share nothing: sympy's implied generator, and the claim an audit confirms."""
    for row in table:
        claim = row.estimator.claim
        nominal = claim.divergence.name
        if claim.verdict == "zero":
            assert row.verdict == "zero gradient"
        elif claim.verdict in ("exact", "exact_up_to_scale"):
            # One half of alpha is twice the squared Hellinger distance.
            assert row.named == ("hellinger" if nominal == "alpha" else nominal), row
        elif claim.verdict == "other_objective":
            assert row.named == claim.descends, row
        else:
            assert row.named is None, row


def test_the_corollaries_of_t4_and_t5(table: list[Row]) -> None:
    found = {repr(row.estimator): row for row in table}
    assert found["estimator('opd', 'forward_kl')"].stability == "repels"
    assert found["estimator('opd', 'jsd')"].stability == "no first-order force"
    assert all(row.stability == "attracts" for name, row in found.items() if "opd_plus" in name)
    assert not found["estimator('k3_reward')"].genuine
    assert found["estimator('opd_plus', 'hellinger')"].second_moment == "bounded"
    assert found["estimator('opd_plus', 'forward_kl')"].second_moment == "unbounded as u → ∞"
