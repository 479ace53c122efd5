"""The page on truncated ratios is what its script makes, and its flows descend the estimators' own gradients."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from opdtheory import TabularPolicy, estimator, expected_gradient
from tests.scripts import loaded
from tests.tolerances import ENUMERATION

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return loaded(DOCS / "generate_truncation.py")


def of_estimator(name: str, form: str, cap: float, student: Tensor, teacher: Tensor, sampler: Tensor) -> Tensor:
    """The expected gradient of the estimator in one row, by the oracle."""
    loss = estimator(form, name, importance="tis", clip_range=cap)
    ours, theirs, behavior = (TabularPolicy([row.unsqueeze(0)]) for row in (student, teacher, sampler))
    return expected_gradient(loss, ours, theirs, behavior=behavior)[0][0]


@pytest.mark.parametrize("kind", ["stale", "engine"])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_the_flow_descends_the_estimators_expected_gradient(script: ModuleType, name: str, kind: str) -> None:
    given, seed = script.rows(), 3
    for constant, form in ((script.at_one(name), "opd_plus_centred"), (0.0, "opd_plus")):
        step = script.slope_at_one(name)
        assert step == pytest.approx({"reverse_kl": 1.0, "forward_kl": 1.0, "jsd": 0.25}[name])
        for student in (given.student, given.student + 0.4 * given.offset):
            found = script.gradient(name, constant, given, student, kind)[seed]
            rows = student[seed], given.teacher[seed], given.sampler(student, kind)[seed]
            exact = of_estimator(name, form, script.CAP, *rows)
            assert float((found - exact).abs().max()) < ENUMERATION
            # The twins: a cap a little larger, and the other gauge.
            assert float((found - of_estimator(name, form, 1.3, *rows)).abs().max()) > 1e-4
            if name != "jsd":  # whose weight is centred as it is
                other = script.gradient(name, constant - script.at_one(name), given, student, kind)[seed]
                assert float((other - exact).abs().max()) > 1e-4


def test_a_centred_weight_ends_at_the_teacher_and_another_one_rests_elsewhere(script: ModuleType) -> None:
    given = script.rows()
    start = script.distance(given.student, given)
    for name in ("reverse_kl", "forward_kl"):
        centred, own = (script.flow(name, c, given, "stale") for c in (script.at_one(name), 0.0))
        assert float(script.distance(centred.logits, given).max()) < script.NEAR
        # All but one have come to rest, far from it.
        assert int((own.gradient < 1e-9).sum()) >= 7 and float(own.gradient.max()) < 1e-4
        assert float(script.distance(own.logits, given).min()) > 0.01
    own = script.flow("reverse_kl", 0.0, given, "stale")
    assert bool((script.distance(own.logits, given) > start).all())


@pytest.mark.slow
def test_the_page_is_what_the_script_makes(script: ModuleType) -> None:
    assert (DOCS / "truncation.md").read_text(encoding="utf-8") == script.page()
