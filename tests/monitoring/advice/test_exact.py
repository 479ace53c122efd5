"""Bias and variance at each history, against every next token through the estimators' own losses."""

from __future__ import annotations

import math

import pytest
import torch

from opdtheory import divergence
from opdtheory.exact import least_variance
from opdtheory.monitoring.advice.candidates import Candidate, candidates
from opdtheory.monitoring.advice.exact import Groups, Histories, Sizes
from tests.monitoring.advice import brute
from tests.tolerances import ALGEBRA, ENUMERATION

NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger")


def of(name: str, histories: Histories, k: int = 2, group: int = 1) -> list[Candidate]:
    found = candidates(divergence(name), "vocabulary", k, group, False)
    best = [histories.parabola(each) if each.best else (0.0, 1.0) for each in found]
    return [
        each.with_constant(top / bottom) if each.best else each for each, (top, bottom) in zip(found, best, strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 3])
def test_every_candidate_is_that_of_every_next_token(name: str, k: int) -> None:
    student, teacher = brute.pair(4, 5, seed=1, scale=3.0)
    assert float((teacher.log_softmax(-1) - student.log_softmax(-1)).abs().max()) > 6.0
    histories = Histories(divergence(name), student, teacher)
    target = brute.exact(name, student, teacher)
    torch.testing.assert_close(histories.gradient(), target, rtol=ENUMERATION, atol=ENUMERATION * float(target.norm()))
    for candidate in of(name, histories, k):
        found = histories.moments(candidate)
        mean, spread, second = brute.mean_and_spread(candidate.loss, student, teacher)
        bias = torch.zeros_like(target) if found.bias is None else found.bias
        size = float(torch.maximum(target.norm(), second.sqrt().norm()))
        torch.testing.assert_close(bias, mean - target, rtol=0, atol=ENUMERATION * size, msg=candidate.loss.label)
        room = ENUMERATION * (1 + second)
        assert bool(((found.variance - spread).abs() <= room).all()), candidate.loss.label


def test_leaving_out_the_bias_or_the_constant_is_seen() -> None:
    """Wrong twins of the comparison above."""
    student, teacher = brute.pair(4, 5, seed=1)
    histories = Histories(divergence("jsd"), student, teacher)
    named = {each.loss.label: each for each in of("jsd", histories)}
    target = brute.exact("jsd", student, teacher)
    mean, spread, _ = brute.mean_and_spread(named["opd(jsd)"].loss, student, teacher)
    assert float((mean - target).norm()) > 1e-2 * float(target.norm())
    plain = histories.moments(named["opd_plus(jsd)"]).variance
    optimal = histories.moments(named["opd_plus(jsd, baseline=optimal)"]).variance
    assert bool((optimal <= plain).all()) and float(optimal.sum()) < float(plain.sum()) * (1 - 1e-2)
    assert not torch.allclose(plain, spread, rtol=1e-3)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("size", [2, 3])
def test_groups_are_those_of_every_draw_together(name: str, size: int) -> None:
    """Rows of one position differ, as the rollouts of a prompt do after their first token."""
    student, teacher = brute.pair(size, 3, seed=2)
    groups = Groups.of(torch.zeros(size, dtype=torch.int64), size)
    histories = Histories(divergence(name), student, teacher, groups)
    target = brute.exact(name, student, teacher)
    for candidate in of(name, histories, group=size):
        if not candidate.grouped:
            continue
        scale = size / (size - 1) if candidate.loss.settings["baseline"] == "group_mean" else 1.0
        found = histories.moments(candidate)
        chance, gradients = brute.outcomes(candidate.loss, student, teacher)
        gradients = scale * gradients
        mean = torch.einsum("o,onv->nv", chance, gradients)
        assert found.bias is not None and found.pairs is not None
        torch.testing.assert_close(found.bias, mean - target, rtol=0, atol=ENUMERATION * float(gradients.norm()))
        apart = torch.einsum("o,onv->n", chance, (gradients - mean).square())
        torch.testing.assert_close(found.variance, apart, rtol=ENUMERATION, atol=ENUMERATION)
        # In parameters that all rows share, the noise of two rollouts does not add up apart.
        together = (chance * (gradients - mean).sum(1).square().sum(-1)).sum()
        products = target @ target.T
        joint = found.variance.sum() + (found.pairs[0] * (products.sum() - products.diagonal().sum()))
        torch.testing.assert_close(joint, together, rtol=1e-11, atol=ENUMERATION)
        assert abs(float(found.variance.sum() - together)) > 1e-6 * float(together)


def test_identical_histories_give_the_theorem_on_groups() -> None:
    student, teacher = (x.expand(4, -1) for x in brute.pair(1, 6, seed=3))
    groups = Groups.of(torch.zeros(4, dtype=torch.int64), 4)
    histories = Histories(divergence("jsd"), student, teacher, groups)
    candidate = next(x for x in of("jsd", histories, group=4) if x.loss.settings.get("baseline") == "leave_one_out")
    found, stated = histories.moments(candidate), least_variance(student[:1], teacher[:1], "jsd", group=4)
    assert found.pairs is not None
    joint = found.variance[0] + found.pairs[0] * 3 * stated.squared_gradient[0]
    torch.testing.assert_close(joint, stated.leave_one_out.variance[0], rtol=ALGEBRA, atol=0)


def test_a_token_without_companion_has_no_baseline_and_no_group_mean() -> None:
    student, teacher = brute.pair(3, 4, seed=4)
    groups = Groups.of(torch.tensor([0, 0, 1]), 2)
    histories = Histories(divergence("jsd"), student, teacher, groups)
    named = {each.loss.label: each for each in of("jsd", histories, group=2)}
    alone = histories.moments(named["opd_plus(jsd)"]).variance[2]
    left = histories.moments(named["opd_plus(jsd, baseline=leave_one_out)"])
    torch.testing.assert_close(left.variance[2], alone, rtol=ALGEBRA, atol=0)
    mean = histories.moments(named["opd_plus(jsd, baseline=group_mean)"])
    assert mean.bias is not None and float(mean.variance[2]) == 0.0
    torch.testing.assert_close(mean.bias[2], -histories.gradient()[2], rtol=ALGEBRA, atol=ALGEBRA)


@pytest.mark.parametrize("name", ["forward_kl", "chi2"])
def test_outcomes_that_are_too_large_are_left_out(name: str) -> None:
    student, teacher = brute.pair(3, 5, seed=5, scale=2.5)
    histories = Histories(divergence(name), student, teacher)
    target = brute.exact(name, student, teacher)
    for candidate in of(name, histories):
        if candidate.loss.name not in ("opd", "opd_plus", "opd_plus_centred"):
            continue
        sizes = Sizes()
        histories.add_sizes(candidate, sizes)
        largest, dropped = sizes.largest(0.05), 0.0
        assert math.isfinite(largest)
        found = histories.moments(candidate, largest)
        assert found.bias is not None
        for row in range(3):
            chance, gradients = brute.outcomes(candidate.loss, student[row : row + 1], teacher[row : row + 1])
            gradients = gradients.squeeze(1)
            seen = gradients.norm(dim=-1) <= largest
            dropped += float(chance[~seen].sum())
            gradients = gradients * seen.unsqueeze(-1)
            mean = (chance.unsqueeze(-1) * gradients).sum(0)
            spread = (chance * (gradients - mean).square().sum(-1)).sum()
            room = ENUMERATION * float(gradients.norm() + target.norm())
            torch.testing.assert_close(found.bias[row], mean - target[row], rtol=0, atol=room)
            torch.testing.assert_close(found.variance[row], spread, rtol=1e-11, atol=ENUMERATION)
        assert dropped <= 0.05
        whole = histories.moments(candidate)
        assert whole.bias is not None
        assert dropped == 0.0 or float((whole.bias - found.bias).norm()) > 0.0
