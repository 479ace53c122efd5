"""Sampled audits as a whole: name, weight and words at a batch size that cannot be enumerated."""

from __future__ import annotations

import json

import jsonschema
import pytest

import opdtheory as opd
from opdtheory.auditing.sampling import whole
from opdtheory.auditing.views import render_audit
from opdtheory.auditing.views.schema import AUDIT_SCHEMA
from opdtheory.errors import InvalidArgumentError
from tests.auditing.sampling.pairs import ORIGIN


@pytest.mark.slow
def test_a_member_of_a_family_is_named_at_a_batch_size_that_only_sampling_reaches() -> None:
    alpha = opd.divergences.alpha(0.3)
    loss = opd.estimator("opd_plus", alpha, baseline="group_mean")
    report = opd.audit(loss, "jsd", batch_size=16)
    assert report.monte_carlo is not None and report.verdict == "other_objective"
    assert report.descends == "alpha(alpha=0.3)"
    identified = report.identified
    assert identified is not None and identified["scale"] == pytest.approx(15 / 16)
    assert identified["fitted"] == "alpha"
    assert identified["fitted_range"][0] <= 0.3 <= identified["fitted_range"][1]
    for said in ("conjectured from batches of 2", "confirmed at batch size 16"):
        assert said in identified["evidence"] and said in report.summary()
    # The weight is the one at 16, and what holds at 2 is said to hold at 2.
    low, high, log_u = (report.weight[key] for key in ("low", "high", "log_u"))
    truth = 15 / 16 * (alpha.weight(log_u) - alpha.weight(ORIGIN))
    assert bool((low <= truth).all()) and bool((truth <= high).all())
    assert report.weight["depends_on_ratio_only"] and report.weight["non_decreasing"]
    assert "1.875 times the exact weight at batch size 2 (alpha(alpha=0.3)) lies in all intervals" in report.summary()
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    jsonschema.validate(record, AUDIT_SCHEMA)
    record["identified"]["fitted_range"] = "wide"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, AUDIT_SCHEMA)
    page = render_audit(report)
    assert "intervals that hold jointly" in page and "conjectured from batches of 2" in page


@pytest.mark.slow
def test_what_holds_at_a_smaller_batch_size_is_not_taken_to_hold_at_a_larger_one() -> None:
    """A loss that is another one in small batches: neither its name there nor its weight there is claimed."""
    small, large = (
        opd.estimator("opd_plus", divergence, baseline="leave_one_out")
        for divergence in ("forward_kl", opd.divergences.skew_jsd(0.3))
    )
    report = opd.audit(
        lambda r: (small if len(r.tokens) < 12 else large)(r), "jsd", batch_size=12, method="monte_carlo"
    )
    assert report.descends == "skew_jsd(beta=0.3)"
    assert report.identified is not None and "fitted to samples" in report.identified["evidence"]
    said = "No positive multiple of the exact weight at batch size 2 (forward_kl) lies in all intervals"
    assert said in report.summary()


def test_the_error_rate_is_an_argument_and_is_said_everywhere() -> None:
    loss = opd.estimator("opd_plus", "jsd", zscore=True)
    report = opd.audit(loss, "jsd", batch_size=8, method="monte_carlo", details=False, alpha=0.01)
    assert report.monte_carlo is not None and report.settings["alpha"] == 0.01
    assert "wrong at most once in 100 audits (alpha=0.01)" in report.summary()
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    jsonschema.validate(record, AUDIT_SCHEMA)
    assert record["monte_carlo"]["alpha"] == record["settings"]["alpha"] == 0.01
    assert record["monte_carlo"]["by_pair"][0]["scale"] == list(report.monte_carlo.by_pair[0].scale)
    assert "once in 100 audits" in render_audit(report)
    # An exact audit has no error rate.
    assert "alpha" not in opd.audit(opd.estimator("opd_plus", "jsd"), "jsd", details=False).settings


def test_the_parts_of_an_audit_share_its_error_rate() -> None:
    assert whole._VERDICT + whole._NAME + whole._WEIGHT == 1.0


@pytest.mark.bad_input
@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, 1.0, float("nan"), float("inf"), True, "0.1", None])
@pytest.mark.parametrize("method", ["exact", "monte_carlo"])
def test_an_error_rate_that_is_none_is_refused(alpha: object, method: str) -> None:
    with pytest.raises(InvalidArgumentError, match="alpha"):
        opd.audit(opd.estimator("opd_plus", "jsd"), "jsd", method=method, alpha=alpha)  # type: ignore[arg-type]
