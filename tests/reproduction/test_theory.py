"""What theory says of each arm: its weight, and the objective that it follows."""

from __future__ import annotations

import pytest

from opdtheory import divergence, random_pair
from opdtheory.exact.tree import pointwise
from opdtheory.reproduction.plan import DIVERGENCES
from opdtheory.reproduction.theory import objective_value, reading
from tests.reproduction.rows import ARMS


def test_theory_reads_the_weights():
    found = {name: reading(arm.config()) for name, arm in ARMS.items()}
    genuine = {name for name, each in found.items() if each.descends}
    falling = {name for name, each in found.items() if each.descends is False}
    assert falling == {
        *("forward_kl/opd", "jsd/opd", "chi2/opd", "hellinger/opd", "forward_kl -2(u-1)/opd"),
        *("forward_kl/opd, whole vocabulary", "jsd/opd, whole vocabulary"),
    }
    assert found["jsd/opd, whole vocabulary"] == found["jsd/opd"]
    assert {f"{name}/opd_plus" for name in DIVERGENCES} < genuine
    assert {"forward_kl -7(u-1)/opd", "jsd -log(2)/2(u-1)/opd", "sign", "reverse_kl/opd"} < genuine
    assert found["forward_kl/opd"].slope == pytest.approx(-1, abs=1e-3)
    assert found["forward_kl/opd"].falls == pytest.approx((-1, 6), abs=0.01)
    assert found["forward_kl -2(u-1)/opd"].slope == pytest.approx(1, abs=1e-3)
    assert found["forward_kl -2(u-1)/opd"].falls == pytest.approx((1, 6), abs=0.01)
    assert "repels" in str(found["forward_kl/opd"]) and "attracts" in str(found["forward_kl -2(u-1)/opd"])
    assert "zero" in str(found["constant advantage -1"]) and "demonstrations" in str(found["supervised"])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_objective_followed_is_the_divergence_where_the_estimator_is_exact(name):
    student, teacher = random_pair(9, 1, distance=1.0, seed=3)
    log_p, log_q = (policy.logits[0].log_softmax(-1) for policy in (student, teacher))
    exact = float(pointwise(divergence(name), log_p, log_q).sum(-1).mean())
    assert objective_value(ARMS[f"{name}/full_vocab"].config(), log_p, log_q) == pytest.approx(exact, rel=1e-5)
    followed = objective_value(ARMS[f"{name}/opd"].config(), log_p, log_q)
    assert (followed == pytest.approx(exact, rel=1e-2)) == (name == "reverse_kl")
    assert objective_value(ARMS["supervised"].config(), log_p, log_q) is None
