"""Losses of the sampled token against closed forms, with false twins that the same checks refute."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import Estimator, estimator
from opdtheory.rollouts import Rollouts
from tests.estimators.pairs import (
    NAMES,
    WEIGHTS,
    error,
    expected_gradient,
    pair,
    sequence,
    three_tokens,
    token_local,
    token_return,
)
from tests.tolerances import ALGEBRA


def twin(loss: Estimator, change: Callable[[Rollouts, Tensor], Tensor]) -> Estimator:
    """The same estimator with its loss of each token changed."""
    token_loss = loss.token_loss
    return replace(loss, token_loss=lambda rollouts: change(rollouts, token_loss(rollouts)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["opd_plus", "opd_plus_centred", "full_vocab"])
def test_corrected_weights_match_the_closed_form(kind: str, name: str) -> None:
    bandit = pair(vocabulary=5, horizon=1)
    loss, exact = estimator(kind, name), token_local(WEIGHTS[name], bandit)
    assert error(expected_gradient(loss, bandit), exact) < ALGEBRA
    assert error(expected_gradient(twin(loss, lambda r, x: -x), bandit), exact) > 1e-2


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (estimator("opd", "forward_kl"), lambda u: -u * torch.log(u)),
        (estimator("opd", "chi2"), lambda u: -((u - 1) ** 2)),
        (estimator("opd", "reverse_kl"), torch.log),
        (estimator("k1_loss"), torch.ones_like),
        (estimator("k2_loss"), torch.log),
        (estimator("k3_loss"), lambda u: u),
        (estimator("k1_reward"), torch.log),
        (estimator("k2_reward"), lambda u: -0.5 * torch.log(u) ** 2),
        (estimator("k3_reward"), lambda u: torch.log(u) - u + 1),
        (estimator("box_cox", alpha=0.5), lambda u: 2 * torch.sqrt(u)),
        (estimator("box_cox", alpha=0.0), torch.log),
        (estimator("box_cox", alpha=1e-14), torch.log),
        (estimator("sign"), lambda u: torch.sign(u - 1)),
        (estimator("k1_reward", clip_log_ratio=0.5), lambda u: torch.log(u).clamp(-0.5, 0.5)),
        (estimator("opd_plus", "forward_kl", clip_weight=(0.5, 1.2)), lambda u: u.clamp(0.5, 1.2)),
        (estimator("k2_loss", clip_log_ratio=0.5), lambda u: torch.log(u) * (torch.log(u).abs() < 0.5)),
        (estimator("opd_plus", "forward_kl", clip_log_ratio=0.5), lambda u: u.clamp(math.exp(-0.5), math.exp(0.5))),
        (estimator("opd", divergences.skew_reverse_kl(0.3)), lambda u: torch.log(0.3 + 0.7 * u)),
    ],
    ids=lambda value: repr(value) if isinstance(value, Estimator) else "",
)
def test_local_weight(loss: Estimator, weight: Callable[[Tensor], Tensor]) -> None:
    bandit = pair(vocabulary=5, horizon=1)
    assert error(expected_gradient(loss, bandit), token_local(weight, bandit)) < ALGEBRA


def test_power_follows_the_difference_of_powers() -> None:
    bandit = pair(vocabulary=5, horizon=1)
    p, q = bandit.student[0].detach().softmax(-1), bandit.teacher[0].softmax(-1)
    weight = q**0.7 - p**0.7
    exact = (-p * (weight - (p * weight).sum())).reshape(-1)
    assert error(expected_gradient(estimator("power", alpha=0.7), bandit), exact) < ALGEBRA


def test_box_cox_is_the_weight_of_the_alpha_divergence() -> None:
    log_u = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for alpha in (-1.0, 0.0, 0.5, 1.0, 2.5):
        difference = estimator("box_cox", alpha=alpha).token_loss.advantage.function(log_u)
        difference = difference - divergences.alpha(alpha).weight(log_u)
        assert float(difference.max() - difference.min()) < 1e-9


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_two_steps(name: str, eos: bool) -> None:
    policies = pair(seed=2, vocabulary=3, eos=eos)
    local = token_local(WEIGHTS[name], policies)
    assert error(expected_gradient(estimator("opd_plus", name), policies), local) < ALGEBRA
    assert error(expected_gradient(estimator("full_vocab", name), policies), local) < ALGEBRA
    assert error(expected_gradient(estimator("return_to_go", name, gamma=0.0), policies), local) < ALGEBRA
    whole = expected_gradient(estimator("sequence_opd_plus", name), policies)
    assert error(whole, sequence(name, policies)) < ALGEBRA
    full = token_return(name, policies, 1.0)
    assert error(expected_gradient(estimator("return_to_go", name, gamma=1.0), policies), full) < ALGEBRA
    discounted = estimator("return_to_go", name, gamma=0.6, discounted=True)
    assert error(expected_gradient(discounted, policies), token_return(name, policies, 0.6)) < ALGEBRA
    # False twins: the future dropped, and the discount of the outer sum.
    assert error(local, full) > 1e-3
    practised = expected_gradient(estimator("return_to_go", name, gamma=0.6), policies)
    assert error(practised, token_return(name, policies, 0.6)) > 1e-3


def test_discount_zero_without_an_outer_discount_is_local() -> None:
    policies = pair(seed=2, vocabulary=3)
    discounted = expected_gradient(estimator("return_to_go", "jsd", gamma=0.0, discounted=True), policies)
    assert error(discounted, token_return("jsd", policies, 0.0)) < ALGEBRA


def test_return_to_go_skips_masked_tokens() -> None:
    policies = pair(vocabulary=3, horizon=1)
    rollouts = three_tokens(mask=[1.0, 0.0, 1.0])
    advantage = estimator("return_to_go", "forward_kl", gamma=0.5).token_loss.advantages(rollouts)
    u = torch.exp(rollouts.log_u.detach())[0]
    assert advantage[0].tolist() == pytest.approx([float(u[0] - 0.25 * u[2] * torch.log(u[2])), 0.0, float(u[2])])
    assert policies.vocabulary == 3


def test_tokens_that_the_student_cannot_write_contribute_nothing() -> None:
    student = torch.tensor([[[0.0, -torch.inf]]], requires_grad=True)
    rollouts = Rollouts.from_logits(
        torch.tensor([[1]]), student, torch.tensor([[[0.0, 0.0]]]), behavior_logprobs=torch.tensor([[-1.0]])
    )
    for loss in (estimator("opd_plus", "chi2", importance="prefix"), estimator("k3_loss"), estimator("k1_reward")):
        value = loss(rollouts)
        (grad,) = torch.autograd.grad(value, student, retain_graph=True)
        assert float(value.detach()) == 0
        assert (grad == 0).all()
