"""Histograms of log u: their moments against the tokens themselves, and how often their intervals hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from opdtheory.monitoring.measures import moment
from opdtheory.monitoring.sums import COLUMNS, EDGE, GROUPS, WIDTH, Number, Sums, group_of, number_of
from tests.monitoring.runs import drawn, laws, tokens_of


def filled(log_u: Tensor, log_p: Tensor, group: Tensor, weight: Tensor | None = None) -> Sums:
    sums = Sums.empty()
    sums.add(log_u, log_p, group, weight)
    return sums


def test_moments_are_those_of_the_tokens():
    rows = drawn(*laws(50, 12, seed=0), rollouts=64, length=40, seed=1)
    tokens = tokens_of(rows)
    log_u, p = tokens.log_u, tokens.student.exp()
    sums = filled(log_u, tokens.student, group_of(tokens.rollout))
    assert sums.count == len(tokens)
    # The mean of log u is kept itself; of a smooth function, up to the square of a bin's width.
    assert sums.number(moment(lambda x: x)).value == pytest.approx(float(log_u.mean()), rel=1e-12)
    for function in (torch.exp, torch.square, torch.sinh):
        exact = float(function(log_u).mean())
        assert sums.number(moment(function)).value == pytest.approx(exact, rel=WIDTH**2 / 2)
    expected = {"length": 1 - p, "square": (1 - p).square(), "apart": tokens.teacher.exp() - p}
    for name, values in expected.items():
        assert float(sums.total[COLUMNS.index(name)].sum()) == pytest.approx(float(values.sum()), rel=1e-12)


def test_weights_multiply_every_column():
    rows = drawn(*laws(20, 6, seed=2), rollouts=16, length=10, seed=3, temperature=0.7)
    tokens = tokens_of(rows, "behavior")
    rho = (tokens.student - tokens.behavior).exp()
    group = group_of(tokens.rollout)
    weighted = filled(tokens.log_u, tokens.student, group, rho)
    assert weighted.count == pytest.approx(float(rho.sum()), rel=1e-12)
    mean = float((rho * tokens.log_u).sum() / rho.sum())
    assert weighted.number(moment(lambda x: x)).value == pytest.approx(mean, rel=1e-12)
    # The twin: without the weights.
    assert abs(filled(tokens.log_u, tokens.student, group).number(moment(lambda x: x)).value - mean) > 1e-3


def test_what_lies_beyond_the_edge_counts_at_the_edge():
    log_u = torch.tensor([-torch.inf, -100.0, 0.0, 100.0], dtype=torch.float64)
    points, tables = filled(log_u, torch.full((4,), -1.0, dtype=torch.float64), torch.arange(4)).occupied()
    assert points.tolist() == [-EDGE, 0.0, EDGE] and tables[0, 0].tolist() == [2.0, 1.0, 1.0]


def test_parts_add_up_to_the_whole():
    tokens = tokens_of(drawn(*laws(10, 5, seed=4), rollouts=40, length=7, seed=5))
    group = group_of(tokens.rollout)
    whole, parts = filled(tokens.log_u, tokens.student, group), Sums.empty()
    for part in torch.arange(len(tokens)).split(37):
        parts.add(tokens.log_u[part], tokens.student[part], group[part])
    assert torch.allclose(whole.table, parts.table, rtol=1e-12, atol=1e-12)


def test_groups_hold_whole_prompts():
    rollout = torch.arange(100)
    assert bool((group_of(rollout, together=4)[::4] == group_of(rollout, together=4)[3::4]).all())
    assert int(group_of(torch.tensor([0]), first=GROUPS + 3)[0]) == 3


def correlated_means(seed: int, together: bool) -> Number:
    """The mean of numbers that share half their variance within a rollout, by rollouts or by tokens."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(96, 1, dtype=torch.float64, generator=generator)
    own = torch.randn(96, 20, dtype=torch.float64, generator=generator)
    log_u = ((shared + own) / 4).flatten()
    number = torch.arange(96).repeat_interleave(20)
    group = group_of(number if together else torch.randperm(96 * 20, generator=generator))
    return filled(log_u, torch.full_like(log_u, -1.0), group).number(moment(lambda x: x), 0.95)


def test_intervals_hold_as_often_as_they_say():
    def misses(together: bool) -> int:
        found = [correlated_means(seed, together) for seed in range(400)]
        return sum(not each.low <= 0.0 <= each.high for each in found)

    # 400 intervals of 95 % miss 20 times, give or take 4.4.
    assert 8 <= misses(True) <= 33
    # The twin: tokens of one rollout taken as independent.
    assert misses(False) > 100


def test_too_few_groups_give_no_interval():
    values = torch.arange(8.0, dtype=torch.float64)
    assert number_of(values[:8]).interval is None
    assert number_of(torch.arange(9.0, dtype=torch.float64)).interval is not None
    assert number_of(torch.tensor([1.0] + [math.inf] * 20)).interval is None
    assert str(Number(0.5)) == "0.5" and str(Number(0.5, 0.25, 0.75)) == "0.5 [0.25, 0.75]"
