"""The report: its sentences, its JSON, and whether a loss counts as faithful."""

from __future__ import annotations

import json

import pytest
import torch

import opdtheory as opd
from opdtheory.rollouts import Rollouts
from tests.auditing.verdicts import audit
from tests.losses import k3


def test_a_zero_scale_prints() -> None:
    assert "zero" in str(audit(lambda r: (r.student_logits * 0).sum(), "reverse_kl"))


def test_falling_weight_and_stability_are_told() -> None:
    forward = audit(opd.estimator("opd", "forward_kl"), "forward_kl")
    assert not forward.weight["non_decreasing"]
    assert forward.weight["slope_at_teacher"] == pytest.approx(-1.0, rel=1e-6)
    assert "repelling" in forward.summary() and "T4" in forward.summary()
    jsd = audit(opd.estimator("opd", "jsd"), "jsd")
    assert "does not attract to first order" in jsd.summary()
    assert "attract" not in audit(opd.estimator("opd_plus", "jsd"), "jsd").summary()


def test_clipped_weight_is_some_f_divergence() -> None:
    report = audit(opd.estimator("opd_plus", "forward_kl", clip_weight=(0.5, 1.5)), "forward_kl")
    assert report.verdict == "biased"
    assert "some f-divergence is minimised" in report.summary()


def test_report_is_json_and_reads() -> None:
    report = audit(k3, "reverse_kl")
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["verdict"] == "other_objective"
    assert record["schema_version"] == 1
    assert record["identified"]["objective"] == "forward_kl"
    assert len(record["weight"]["log_u"]) == len(record["weight"]["weight"])
    text = str(report)
    assert text.startswith("k3: OTHER OBJECTIVE")
    assert "forward_kl" in text and "relative bias" in text
    assert max(map(len, text.splitlines())) <= 100


def test_unsound_losses_are_not_faithful() -> None:
    """Exact wherever lengths are fixed, and it reads what padding holds where they are not."""

    def leaks(r: Rollouts) -> torch.Tensor:
        return (r.log_u.square() / 2).sum() / len(r.tokens)

    report = opd.audit(leaks, "reverse_kl")
    assert report.verdict == "exact" and not report.faithful
    assert "masked positions" in report.summary().replace("\n", " ")
    assert opd.audit(lambda r: r.token_sum(r.log_u.square() / 2), "reverse_kl").faithful
