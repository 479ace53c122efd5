"""The gradients of single rollouts: against a loop, and their moments against the enumeration."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.exact import gradient_moments, random_pair, rollout_gradients, sampled_moments
from opdtheory.exact.sampling import Sampler, sample_rollouts
from opdtheory.testing import gradient_gap
from tests.tolerances import ENUMERATION


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opd_plus", {}),
        ("full_vocab", {}),
        ("topk_tail", {"k": 2}),
        ("topk_renormalised", {"k": 2}),
        ("return_to_go", {"gamma": 0.5}),
    ],
)
def test_all_at_once_is_one_by_one(name, options):
    estimator = opd.estimator(name, "jsd", **options)
    sample = sample_rollouts(*random_pair(4, 3, eos=0), 12)
    found = rollout_gradients(estimator, sample)
    for b in range(12):
        one = sample.select(torch.tensor([b]))
        (gradient,) = torch.autograd.grad(estimator(one.rollouts), one.rollouts.student_logits)
        assert gradient_gap([found[b]], [gradient[0]]) <= ENUMERATION


@pytest.mark.parametrize("name", ["jsd", "forward_kl", "chi2"])
def test_far_ratios_and_missing_tokens_are_mapped_too(name):
    student, teacher = random_pair(4, 2, zeros=1)
    student.logits[0][0, 1] = -740.0
    estimator = opd.estimator("full_vocab", name)
    sample = sample_rollouts(student, teacher, 6)
    found = rollout_gradients(estimator, sample)
    for b in range(6):
        one = sample.select(torch.tensor([b]))
        (gradient,) = torch.autograd.grad(estimator(one.rollouts), one.rollouts.student_logits)
        assert gradient_gap([found[b]], [gradient[0]]) <= ENUMERATION


def test_a_support_without_a_token_is_refused_when_it_is_mapped():
    student, teacher = random_pair(4, 2)
    student.logits[0][0, teacher.logits[0][0].topk(2).indices] = -torch.inf
    estimator = opd.estimator("topk_renormalised", "jsd", k=2)
    sample = sample_rollouts(student, teacher, 6)
    with pytest.raises(InvalidArgumentError, match="probability zero"):
        estimator(sample.rollouts)
    with pytest.raises(LossError, match="NaN or inf"):
        rollout_gradients(estimator, sample)


def test_moments_of_rollouts_agree_with_enumeration():
    """100,000 rollouts, seed 1: within four standard errors."""
    student, teacher = random_pair(4, 3, eos=0)
    for estimator in (opd.estimator("opd_plus", "jsd"), opd.estimator("full_vocab", "jsd")):
        sampled = sampled_moments(estimator, student, teacher, 100_000, seed=1)
        exact = gradient_moments(estimator, student, teacher)
        assert abs(sampled.variance - exact.variance) <= 4 * sampled.variance_error
        difference = sum(float((a - b).square().sum()) for a, b in zip(sampled.mean, exact.mean, strict=True))
        assert difference <= 4 * exact.variance / sampled.rollouts
        assert sampled.variance_error < exact.variance / 50


def test_the_variance_of_a_few_rollouts_is_without_bias():
    student, teacher = random_pair(3, 2, seed=1)
    estimator, sampler = opd.estimator("opd_plus", "jsd"), Sampler.build(student, teacher)
    sample = sampler.draw(5, torch.Generator().manual_seed(7))
    gradients = rollout_gradients(estimator, sample)
    tables = torch.stack([sampler.scatter(sample.rows[n : n + 1], gradients[n : n + 1]) for n in range(5)])
    found = sampled_moments(estimator, student, teacher, 5, seed=7)
    assert found.variance == pytest.approx(float(tables.var(0, correction=1).sum()), rel=1e-12)
    assert found.variance != pytest.approx(float(tables.var(0, correction=0).sum()), rel=1e-3)
    norms = tables.square().sum((1, 2))
    assert found.variance_error == pytest.approx(float(norms.std()) / 5**0.5, rel=1e-12)


def test_rollouts_off_policy_have_the_sampling_distribution():
    student, teacher = random_pair(3, 2)
    behavior = student.perturbed(0.5, seed=4)
    estimator = opd.estimator("opd_plus", "jsd", importance="prefix")
    sampled = sampled_moments(estimator, student, teacher, 50_000, behavior)
    exact = gradient_moments(estimator, student, teacher, behavior=behavior)
    assert abs(sampled.variance - exact.variance) <= 4 * sampled.variance_error
    assert exact.variance > 1.05 * gradient_moments(estimator, student, teacher).variance


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda r: r.student_logprobs.sum() if r.student_logprobs.sum() > 0 else -r.student_logprobs.sum(), "vmap"),
        (lambda r: r.student_logprobs, "shape"),
        (lambda r: 1.0, "float"),
        (lambda r: (r.student_logprobs * torch.inf).sum(), "NaN or inf"),
    ],
)
def test_a_loss_that_cannot_be_mapped_is_refused(loss, said):
    with pytest.raises(LossError, match=said):
        rollout_gradients(loss, sample_rollouts(*random_pair(3, 2), 4))


@pytest.mark.parametrize("rollouts", [1, pytest.param(2.0, marks=pytest.mark.bad_input), True])
def test_a_variance_needs_two_rollouts(rollouts):
    with pytest.raises(InvalidArgumentError, match="rollouts"):
        sampled_moments(opd.estimator("opd_plus", "jsd"), *random_pair(3, 2), rollouts)
