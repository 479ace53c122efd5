"""The recovered weight: its values, and what it does not explain."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.rollouts import Rollouts
from tests.auditing.verdicts import audit


def test_recovered_weight_is_the_weight() -> None:
    for name in ("forward_kl", "jsd", "neyman_chi2", "le_cam"):
        divergence = opd.divergence(name)
        weight = audit(opd.estimator("opd_plus", name), name).weight
        expected = divergence.weight(weight["log_u"]) - divergence.weight(torch.zeros((), dtype=torch.float64))
        assert weight["depends_on_ratio_only"] and weight["non_decreasing"]
        torch.testing.assert_close(weight["weight"], expected, rtol=1e-10, atol=1e-10)
        curvature = float(divergence.curvature(torch.zeros((), dtype=torch.float64)))
        assert weight["slope_at_teacher"] == pytest.approx(curvature, rel=1e-6)


def test_weight_that_is_no_function_of_the_ratio() -> None:
    report = audit(opd.estimator("power", alpha=0.5), "reverse_kl")
    assert not report.weight["depends_on_ratio_only"]
    assert "is not a function of the ratio" in report.summary()


def test_weight_that_depends_on_more_than_this_token() -> None:
    """Weighted by what the later tokens' ratios are: on one step nothing is seen of it."""

    def loss(r: Rollouts) -> torch.Tensor:
        later = r.log_u.detach().flip(-1).cumsum(-1).flip(-1) - r.log_u.detach()
        return r.token_sum(-(r.log_u.detach() * (1.0 + later.square())) * r.student_logprobs)

    report = audit(loss, "reverse_kl")
    assert report.verdict == "biased"
    assert report.weight["depends_on_ratio_only"] and not report.weight["explains_panel"]
    assert "over several tokens it depends on more" in report.summary().replace("\n", " ")
    assert "f-divergence is minimised" not in report.summary()
    assert audit(opd.estimator("opd", "chi2"), "chi2").weight["explains_panel"]
    assert audit(opd.estimator("sign"), "total_variation").weight["explains_panel"]
