"""The monitor: one warning, at the first step that foresees a collapse, and none where nothing does."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring import CollapseWarning, Monitor, diagnose
from tests.monitoring.runs import drawn, laws


def watched(estimator: str, divergence: str | None = None, steps: int = 4, **options) -> tuple[Monitor, list[str]]:
    log_p, log_q = laws(200, 10, seed=0, apart=0.5)
    monitor = Monitor(estimator, divergence, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            rows = drawn(log_p, log_q, rollouts=32, length=20, seed=step)
            monitor.add(rows["student"], rows["teacher"])
            monitor.step()
    return monitor, [str(each.message) for each in caught if issubclass(each.category, CollapseWarning)]


def test_it_warns_once_and_the_diagnosis_says_when():
    monitor, messages = watched("opd", "forward_kl")
    assert len(messages) == 1 and "a collapse is to be expected" in messages[0] and "opd_plus" in messages[0]
    found = monitor.diagnosis()
    assert found.verdict == "collapse" and found.first_warning == 2  # the first step has fewer than 1,000 tokens
    assert [step.number for step in found.steps] == [1, 2, 3, 4]
    assert found.steps[-1].metrics["opd/collapse_foreseen"] == 1.0


@pytest.mark.parametrize("estimator", ["opd_plus", "opd_plus_centred"])
def test_it_is_silent_where_the_weight_rises(estimator):
    monitor, messages = watched(estimator, "forward_kl")
    assert messages == [] and monitor.foreseen == () and monitor.diagnosis().first_warning is None


def test_parts_of_a_step_are_one_step():
    log_p, log_q = laws(50, 6, seed=1)
    rows = drawn(log_p, log_q, rollouts=16, length=10, seed=2)
    whole, parts = Monitor("opd", "jsd"), Monitor("opd", "jsd")
    whole.add(rows["student"], rows["teacher"])
    for part in torch.arange(16).split(5):
        parts.add(rows["student"][part], rows["teacher"][part])
    assert whole.step() == pytest.approx(parts.step(), rel=1e-12)
    assert torch.allclose(whole.diagnosis().sums.table, parts.diagnosis().sums.table, rtol=1e-12, atol=1e-12)


def test_it_says_what_diagnose_says():
    rows = drawn(*laws(50, 6, seed=1), rollouts=64, length=20, seed=2)
    monitor = Monitor("opd_plus", "jsd")
    monitor.add(rows["student"], rows["teacher"], rows["behavior"])
    direct = diagnose(rows["student"], rows["teacher"], rows["behavior"], estimator="opd_plus", divergence="jsd")
    found = monitor.diagnosis()
    assert found.zoo == direct.zoo and found.log_u == direct.log_u
    assert [each.sentence for each in found.findings] == [each.sentence for each in direct.findings]


def test_empty_steps_and_masked_ones_say_nothing():
    monitor = Monitor()
    assert monitor.step() == {}
    monitor.add(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.zeros(2, 3))
    assert monitor.step() == {}
    with pytest.raises(InvalidArgumentError, match="tokens"):
        monitor.diagnosis()


def test_gradients_and_values_of_the_run_are_left_alone():
    student = torch.full((4, 5), -1.0, requires_grad=True)
    before = student.clone()
    monitor = Monitor("opd", "jsd")
    monitor.add(student, torch.full((4, 5), -1.2))
    assert all(math.isfinite(value) for value in monitor.step().values())
    assert torch.equal(student, before) and student.grad is None


def test_what_it_keeps_does_not_grow():
    monitor, _ = watched("opd_plus", "jsd", steps=3)
    size = sum(sums.table.numel() for sums in (monitor._whole.sampled, monitor._whole.likely))
    more, _ = watched("opd_plus", "jsd", steps=12)
    assert size == sum(sums.table.numel() for sums in (more._whole.sampled, more._whole.likely))
    assert more._now == []


def test_an_estimator_of_the_library_is_taken_as_it_is():
    loss = opd.estimator("opd", "jsd", clip_log_ratio=3.0)
    assert Monitor(loss).loss is loss
    with pytest.raises(InvalidArgumentError, match="estimator"):
        Monitor(loss, "jsd")


def test_the_only_divergence_of_an_estimator_may_be_named():
    assert Monitor("k1_reward", "reverse_kl").loss.name == "k1_reward"
    assert Monitor("opd").loss.claim.divergence.name == "reverse_kl"
    for wrong in (("k1_reward", "jsd"), ("opd", "no such")):
        with pytest.raises(InvalidArgumentError, match="divergence"):
            Monitor(*wrong)
