"""The count of what sampled audits get wrong: it must see an interval that is too short, and a wrong verdict."""

from __future__ import annotations

import math

import pytest
import torch

import opdtheory as opd
from benchmarks import coverage
from benchmarks.coverage import SUBJECTS, Count, Truth, audited, pair, rate
from opdtheory.auditing.sampling.confidence import Moments
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.scenario import Scenario
from opdtheory.objective import Objective

BY_NAME = {subject.name: subject for subject in SUBJECTS}


@pytest.mark.parametrize("name", ["exact, without noise", "exact, skewed noise", "biased by 0.1, noisy"])
def test_a_few_audits_are_right(name: str) -> None:
    found = sum((audited(BY_NAME[name], i, 0.05, 100 + i) for i in range(3)), Count())
    assert found.audits == 3 and found.looks >= 3 and found.intervals > 3 * 15
    assert (found.missed, found.out, found.wrong) == (0, 0, 0)
    assert sum(found.verdicts.values()) == 3


def test_intervals_that_are_too_short_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a quantile that half of all draws exceed; the same audits as they are miss nothing."""

    def short(moments: Moments, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
        width = 0.67 * moments.deviation / math.sqrt(moments.count)
        return moments.mean - width, moments.mean + width

    monkeypatch.setattr("opdtheory.auditing.sampling.montecarlo.interval", short)
    found = sum((audited(BY_NAME["exact, noisy"], i, 0.05, 100 + i) for i in range(3)), Count())
    assert found.missed == 3 and found.out > 3 and found.wrong > 0


def test_wrong_verdicts_are_counted() -> None:
    claim = Objective.of(opd.divergence("reverse_kl"))
    for name, right, wrong in (
        ("exact, noisy", ("exact", "undecided"), ("biased", "exact_up_to_scale", "zero")),
        ("exact up to scale, noisy", ("exact_up_to_scale",), ("biased", "exact", "zero")),
        ("biased by 0.1, noisy", ("biased", "undecided"), ("exact", "exact_up_to_scale", "zero")),
    ):
        subject = BY_NAME[name]
        search = Search(subject.loss, [pair(1)], claim, Scenario(), 0.05, 10, 30.0)
        true = Truth.of(search, subject, 1)
        assert not any(true.refutes(verdict, search, subject.faithful) for verdict in right), name
        assert all(true.refutes(verdict, search, subject.faithful) for verdict in wrong), name


def test_the_true_gradients_are_as_the_names_say() -> None:
    for subject in SUBJECTS:
        for number in range(coverage.PAIRS):
            expected, exact = (torch.cat([g.flatten() for g in levels]) for levels in coverage.truth(subject, number))
            scale = float(expected @ exact / (exact @ exact))
            off = float((expected - scale * exact).norm()) / (scale * float(exact.norm()))
            assert (off < 1e-12) is subject.faithful, subject.name


def test_rates_have_the_exact_interval_of_a_binomial() -> None:
    assert rate(0, 100) == "0 of 100 (0 to 5.2 %)"  # 1 - .005 ** (1 / 100)
    assert Count(1, 2, 3) + Count(4, 5, 6) == Count(5, 7, 9)
