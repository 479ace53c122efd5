"""Signed sums of catalogue objectives."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.identify import ExactGradients
from opdtheory.estimators import estimator
from tests.auditing.naming.weights import on_panel
from tests.losses import k3


def test_a_signed_sum_is_identified_but_is_no_catalogue_objective() -> None:
    report = opd.audit(opd.estimator("k3_reward"), "reverse_kl", details=False)
    assert report.verdict == "biased" and report.descends is None
    assert report.identified is not None and report.identified["error"] < report.tolerance
    assert report.identified["terms"] == pytest.approx({"reverse_kl": 1.0, "forward_kl": -1.0}, abs=1e-9)
    assert "that of reverse_kl - forward_kl" in report.summary().replace("\n", " ")
    assert opd.audit(k3, "reverse_kl", details=False).descends == "forward_kl"


def test_combinations_of_objectives() -> None:
    forward, jsd, le_cam = (estimator("return_to_go", name, gamma=1.0) for name in ("forward_kl", "jsd", "le_cam"))
    gradients, cases = on_panel(lambda r: 1.5 * forward(r) - 0.5 * jsd(r))
    found = best_combination(gradients, ExactGradients(cases), "token_local", 1e-9)
    assert found is not None and found.error < 1e-12
    assert (found.objective.granularity, found.objective.label) == ("token_return", "3 * forward_kl - jsd")
    gradients, cases = on_panel(lambda r: 0.311 * forward(r) - 0.5 * jsd(r) + le_cam(r))
    three = best_combination(gradients, ExactGradients(cases), "token_local", 1e-9)
    assert three is not None
    terms = {divergence.name: c for c, divergence in three.objective.terms}
    assert terms == pytest.approx({"forward_kl": 0.311, "jsd": -0.5, "le_cam": 1.0}, abs=1e-9)
    # One objective alone is no combination, and a loss of none of them neither.
    for loss in (forward, estimator("power", alpha=0.5)):
        gradients, cases = on_panel(loss)
        assert best_combination(gradients, ExactGradients(cases), "token_local", 1e-9) is None
