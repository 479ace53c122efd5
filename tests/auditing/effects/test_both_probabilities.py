"""Top-k sets, and weights of both probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.rollouts import Rollouts
from tests.auditing.effects.subjects import Loss, of


def of_both(advantage: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda r: r.token_sum(-advantage(r.student_logprobs.detach(), r.teacher_logprobs) * r.student_logprobs)


@pytest.mark.parametrize(
    ("form", "k", "support"),
    [("topk_truncated", 2, "student"), ("topk_renormalised", 7, "teacher"), ("topk_tail", 100, "student")],
)
def test_top_k(form: str, k: int, support: str) -> None:
    found = of(opd.estimator(form, "reverse_kl", k=k, support=support))  # type: ignore[arg-type]
    assert found.top_k == k and not found.ratio_only
    assert any(f"the {support}'s {k} likeliest" in text for text in found.words)


@pytest.mark.parametrize(
    ("advantage", "name"),
    [
        (lambda p, q: q.exp() - p.exp(), "density-power divergence, alpha=1"),
        (lambda p, q: (0.37 * q).exp() - (0.37 * p).exp(), "density-power divergence, alpha=0.37"),
        (lambda p, q: (-0.5 * p).exp() - (-0.5 * q).exp(), "density-power divergence, alpha=-0.5"),
        (lambda p, q: q - 1.3 * p, "KL(p||q) plus 0.3 times the negative entropy of p"),
        (lambda p, q: q.exp() - p.exp() + q - p, "Bregman divergence"),
        (lambda p, q: q - p.exp(), "a sum of H(p, q) with dH/dp = h(p) - g(q)"),
        (lambda p, q: (p + q).exp(), "a sum of H(p, q) with dH/dp = -A"),
        (lambda p, q: -p, "a function of the student alone"),
    ],
)
def test_both_probabilities(advantage: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    found = of(of_both(advantage))
    assert not found.ratio_only
    assert found.student_and_teacher == name


def test_density_power_is_told_from_its_neighbour() -> None:
    assert of(opd.estimator("power", alpha=0.5)).student_and_teacher == "density-power divergence, alpha=0.5"
    assert of(opd.estimator("power", alpha=0.501)).student_and_teacher == "density-power divergence, alpha=0.501"


def test_more_than_the_own_probabilities() -> None:
    def loss(r: Rollouts) -> Tensor:
        collision = torch.softmax(r.student_logits.detach(), -1).square().sum(-1)
        return r.token_sum(-r.log_u.detach() * collision * r.student_logprobs)

    found = of(loss)
    assert found.student_and_teacher is None
    assert any("probabilities of other tokens of the same step" in text for text in found.words)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_weight_of_the_other_sign_ascends(alpha: float) -> None:
    def power(p: Tensor, q: Tensor) -> Tensor:
        return (alpha * p).exp() - (alpha * q).exp()

    found = of(of_both(power))
    assert found.student_and_teacher == f"minus density-power divergence, alpha={alpha:g}"
    assert any("ascends the Bregman divergence" in text for text in found.words)
    assert not any("log q - " in text for text in of(of_both(lambda p, q: 2 * p - q)).words)


@pytest.mark.slow
def test_what_a_weight_of_one_step_would_follow_is_not_said_of_a_loss_that_does_not() -> None:
    """Masked ratios off-policy, a mean over tokens, a discount by position: on one step all are density-power."""

    def masked(r: Rollouts) -> Tensor:
        ratio = (r.student_logprobs - r.behavior_logprobs).detach().exp()
        return r.token_sum(-r.log_u.detach() * ratio * ((ratio > 0.8) & (ratio < 1.25)) * r.student_logprobs)

    power = opd.estimator("power", alpha=0.5, reduction="sequence_mean")
    for loss, settings in ((masked, {"off_policy": 0.3}), (power, {"eos": 0})):
        report = opd.audit(loss, "reverse_kl", **settings)
        assert report.dependence is not None and report.dependence.student_and_teacher is None
        assert "follows the Bregman" not in report.summary()
    assert "follows the Bregman" in opd.audit(opd.estimator("power", alpha=0.5), "reverse_kl").summary()
