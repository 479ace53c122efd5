"""Every identity of the theory holds to its tolerance, and the same check refutes each of its false twins."""

from __future__ import annotations

import json
import math

import pytest

from opdtheory.theorems import Identity, IdentityResult, identities

IDENTITIES = identities()


def label(identity: Identity) -> str:
    return f"{identity.theorem}-{identity.name}"


@pytest.mark.parametrize("identity", IDENTITIES, ids=label)
def test_identity_holds_and_its_twins_are_refuted(identity):
    result = identity.run()
    assert result.cases > 0
    assert result.error <= identity.tolerance, f"off by {result.error:.3g} in {result.cases} cases"
    assert set(result.twins) == set(identity.twins) and result.twins, "an identity needs a false twin"
    assert result.survivors == []
    assert result.passed
    assert (result.theorem, result.name, result.statement) == (identity.theorem, identity.name, identity.statement)


def test_names_are_unique():
    assert len({label(identity) for identity in IDENTITIES}) == len(IDENTITIES)


def test_the_first_four_theorems_are_covered():
    assert {identity.theorem for identity in IDENTITIES} >= {"T1", "T2", "T3", "T4"}


def test_tolerances_are_those_of_rounding():
    from tests.tolerances import ALGEBRA

    assert all(identity.tolerance <= ALGEBRA for identity in IDENTITIES)


def result(**changes) -> IdentityResult:
    fields = {"error": 1e-15, "tolerance": 1e-12, "cases": 3, "twins": {"sign flipped": 0.5}, "seconds": 0.0}
    return IdentityResult(theorem="T0", name="name", statement="x = x", **{**fields, **changes})


def test_what_passes_and_what_does_not():
    assert result().passed
    for changes in (
        {"error": 1e-11},
        {"error": math.nan},
        {"error": math.inf},
        {"cases": 0},
        {"twins": {}},
        {"twins": {"sign flipped": 0.5, "term dropped": 1e-15}},
        {"twins": {"sign flipped": 1e-10}},
    ):
        assert not result(**changes).passed, changes
    assert result(twins={"kept": 1e-13, "refuted": 1.0}).survivors == ["kept"]
    assert result(twins={"blew up": math.inf}).passed


def test_results_are_plain_numbers():
    assert json.dumps(vars(result()))
