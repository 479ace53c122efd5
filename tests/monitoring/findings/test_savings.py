"""What could be saved: against the exact variances of whole distributions."""

from __future__ import annotations

import pytest
import torch

from opdtheory.monitoring import diagnose
from opdtheory.monitoring.report import Diagnosis
from tests.monitoring.runs import drawn, laws


def number(found: Diagnosis, name: str) -> float:
    return next(each.number.value for each in found.findings if each.name == name)


def read(rows, estimator: str = "opd_plus", divergence: str = "forward_kl", **options) -> Diagnosis:
    return diagnose(rows["student"], rows["teacher"], estimator=estimator, divergence=divergence, **options)


def test_the_best_constant_saves_what_its_closed_form_says():
    log_p, log_q = laws(20, 8, seed=0, apart=0.5)
    rows = drawn(log_p, log_q, rollouts=3000, length=20, seed=1)
    p, u = log_p.exp(), (log_q - log_p).exp()
    square = (1 - p).square()
    mean = lambda x: float((p * x).sum(-1)[rows["history"]].mean())  # noqa: E731
    best = mean(square * u) / mean(square)
    saving = 1 - mean(square * (u - best).square()) / mean(square * u.square())
    found = read(rows)
    assert number(found, "baseline") == pytest.approx(saving, abs=0.01)
    # The centred weight has less to save.
    assert number(read(rows, "opd_plus_centred"), "baseline") < 0.5 * saving


def test_no_baseline_is_advised_beside_one():
    rows = drawn(*laws(20, 8, seed=0), rollouts=64, length=20, seed=1)
    found = read(rows, baseline="constant", baseline_value=1.0)
    assert "baseline" not in [each.name for each in found.findings]


def test_the_share_of_the_likeliest_tokens_is_a_lower_bound():
    log_p, log_q = laws(50, 30, seed=2, apart=2.0)
    rows = drawn(log_p, log_q, rollouts=2000, length=20, seed=3)
    p, u = log_p.exp(), (log_q - log_p).exp()
    best = number_of_baseline(rows, log_p, log_q)
    second = p * (1 - p).square() * (u - best).square()
    top = torch.zeros_like(p).scatter_(-1, log_q.topk(4, -1).indices, 1.0)
    exact = float((second * top).sum(-1)[rows["history"]].mean() / second.sum(-1)[rows["history"]].mean())
    assert 0.3 < number(read(rows), "top_k") <= exact + 0.02


def number_of_baseline(rows, log_p, log_q) -> float:
    p, u = log_p.exp(), (log_q - log_p).exp()
    square = (1 - p).square()
    return float((p * square * u).sum(-1)[rows["history"]].mean() / (p * square).sum(-1)[rows["history"]].mean())


def test_a_mean_weight_pushes_lengths_and_a_sum_does_not():
    log_p, log_q = laws(50, 8, seed=4)
    rows = drawn(log_p, log_q, rollouts=64, length=20, seed=5)
    mask = torch.ones(64, 20)
    mask[::2, 10:] = 0
    given = {"mask": mask, "reduction": "token_mean"}
    longer = next(each for each in read(rows, "opd_plus", "reverse_kl", **given).findings if each.name == "length")
    assert longer.number.value < -1 and "longer" in longer.sentence and longer.remedy
    shorter = next(each for each in read(rows, "opd_plus", "forward_kl", **given).findings if each.name == "length")
    assert shorter.number.value == pytest.approx(1.0, abs=0.3) and "shorter" in shorter.sentence
    centred = next(each for each in read(rows, "opd_plus_centred", **given).findings if each.name == "length")
    assert not centred.remedy
    for options in ({"mask": mask}, {"reduction": "token_mean"}):
        assert "length" not in [each.name for each in read(rows, **options).findings]
