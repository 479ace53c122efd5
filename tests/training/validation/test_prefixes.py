"""Prefixes: the two maps between logits and parameters, and the exact gradient."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.training import response_logits, rollouts
from opdtheory.training.validation import Prefixes
from opdtheory.training.validation.expectation import moments
from opdtheory.training.validation.vectors import dot
from tests.tolerances import ALGEBRA, FINITE_DIFFERENCE
from tests.training.validation.pairs import PROMPTS, STUDENT, TEACHER, E


def test_the_two_maps_are_adjoint(prefixes: Prefixes) -> None:
    logits = torch.randn(prefixes.log_p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = prefixes.random(3)
    assert dot(direction, direction) == pytest.approx(1.0)
    there = float((logits * prefixes.push_forward(direction)).sum())
    assert dot(prefixes.pull_back(logits), direction) == pytest.approx(there, rel=1e-10)


def test_a_pushed_direction_is_how_the_logits_move(prefixes: Prefixes) -> None:
    step, direction, ends = 1e-5, prefixes.random(1), []
    for sign in (1, -1):
        moved = copy.deepcopy(STUDENT)
        with torch.no_grad():
            for parameter, change in zip(moved.parameters(), direction, strict=True):
                parameter.add_(sign * step * change)
            ends.append(response_logits(moved, prefixes.samples)[prefixes.live])
    slope = (ends[0] - ends[1]) / (2 * step)
    assert float((slope - prefixes.push_forward(direction)).abs().max()) < FINITE_DIFFERENCE


@pytest.mark.parametrize("reduction", ["token_sum", "token_mean", "sequence_mean"])
def test_gradients_are_those_of_a_training_step(prefixes: Prefixes, reduction: str) -> None:
    for loss in (E("opd_plus", "chi2", reduction=reduction), E("full_vocab", "jsd", reduction=reduction)):
        value = loss(rollouts(STUDENT, TEACHER, prefixes.samples))
        trained = torch.autograd.grad(value, prefixes.parameters, materialize_grads=True)
        distribution = moments(
            dataclasses.replace(loss, reduction="token_sum"), prefixes.log_p, prefixes.log_q, prefixes.log_p
        )
        logits = distribution.mean()
        if loss.name == "opd_plus":
            own = prefixes.samples.tokens[prefixes.live].unsqueeze(-1)
            kappa = distribution.kappa.gather(-1, own)
            logits = kappa * (torch.zeros_like(logits).scatter(-1, own, 1.0) - prefixes.log_p.exp())
        pulled = prefixes.pull_back(prefixes.shares(reduction).unsqueeze(-1) * logits)
        gap = [a - b for a, b in zip(trained, pulled, strict=True)]
        assert dot(gap, gap) <= ALGEBRA**2 * dot(trained, trained)


def test_exact_gradient_is_that_of_the_weights(prefixes: Prefixes) -> None:
    for name in ("forward_kl", "hellinger"):
        divergence, p = opd.divergence(name), prefixes.log_p.exp()
        weight = divergence.weight(prefixes.log_q - prefixes.log_p)
        closed = -p * (weight - (p * weight).sum(-1, keepdim=True))
        found = prefixes.exact(divergence)
        assert float((found - closed).abs().max()) < ALGEBRA


def test_a_student_without_parameters_that_count_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="parameters"):
        Prefixes.sample(STUDENT, TEACHER, PROMPTS, max_new_tokens=2, parameters=lambda name: False)
