"""What theory says of each arm: its weight, and the objective that it follows."""

from __future__ import annotations

import pytest

from opdtheory import divergence, random_pair
from opdtheory.exact.tree import pointwise
from opdtheory.reproduction.plan import DIVERGENCES
from opdtheory.reproduction.theory import objective_value, reading
from opdtheory.training.config import TrainConfig
from tests.reproduction.rows import ARMS

SUPERVISED = TrainConfig(control="supervised")


@pytest.mark.slow
def test_theory_reads_the_weights():
    found = {name: reading(arm.config()) for name, arm in ARMS.items()}
    genuine = {name for name, each in found.items() if each.descends}
    falling = {name for name, each in found.items() if each.descends is False}
    assert falling == {"forward_kl/opd", "jsd/opd", "hellinger/opd"}
    assert {f"{name}/opd_plus" for name in DIVERGENCES} < genuine
    assert {"forward_kl -7(u-1)/opd", "jsd -log(2)/2(u-1)/opd", "reverse_kl/opd", "jsd/top 4 and tail"} < genuine
    assert reading(TrainConfig(estimator="sign")).descends
    assert found["forward_kl/opd"].slope == pytest.approx(-1, abs=1e-3)
    assert found["forward_kl/opd"].falls == pytest.approx((-1, 6), abs=0.01)
    later = reading(TrainConfig(estimator="opd", divergence="u*log(u) - 2*(u-1)", clip_log_ratio=6.0))
    assert later.slope == pytest.approx(1, abs=1e-3) and later.falls == pytest.approx((1, 6), abs=0.01)
    assert "repels" in str(found["forward_kl/opd"]) and "attracts" in str(later)
    assert "zero" in str(found["constant advantage -1"]) and "demonstrations" in str(reading(SUPERVISED))
    whole = TrainConfig(control="exact_opd", divergence="jsd", clip_log_ratio=6.0)
    assert reading(whole) == found["jsd/opd"]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_objective_followed_is_the_divergence_where_the_estimator_is_exact(name):
    student, teacher = random_pair(9, 1, distance=1.0, seed=3)
    log_p, log_q = (policy.logits[0].log_softmax(-1) for policy in (student, teacher))
    exact = float(pointwise(divergence(name), log_p, log_q).sum(-1).mean())
    assert objective_value(ARMS[f"{name}/full_vocab"].config(), log_p, log_q) == pytest.approx(exact, rel=1e-5)
    # The sampled tail follows the same, whatever its baseline.
    for form in ("top 4 and tail", "top 4 and tail, no baseline"):
        assert objective_value(ARMS[f"{name}/{form}"].config(), log_p, log_q) == pytest.approx(exact, rel=1e-5)
    followed = objective_value(ARMS[f"{name}/opd"].config(), log_p, log_q)
    assert (followed == pytest.approx(exact, rel=1e-2)) == (name == "reverse_kl")
    assert objective_value(SUPERVISED, log_p, log_q) is None
