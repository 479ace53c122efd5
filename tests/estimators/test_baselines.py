"""Baselines and z-scores on batches whose rollouts have different lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import estimator
from opdtheory.rollouts import Rollouts
from tests.estimators.pairs import WEIGHTS, error, expected_gradient, pair, ragged, three_tokens, token_local
from tests.tolerances import ALGEBRA


def test_group_mean_scales_by_one_less_than_the_group() -> None:
    bandit = pair(vocabulary=3, horizon=1)
    exact = token_local(WEIGHTS["forward_kl"], bandit)
    loss = estimator("opd_plus", "forward_kl", baseline="group_mean")
    assert error(expected_gradient(loss, bandit, 2), exact / 2) < ALGEBRA
    assert error(expected_gradient(loss, bandit, 3), exact * 2 / 3) < ALGEBRA


def test_baselines_count_the_unmasked_alone() -> None:
    rollouts = ragged()
    log_u = rollouts.log_u

    def advantages(**options: object) -> Tensor:
        return estimator("k1_reward", **options).token_loss.advantages(rollouts)

    group, others = advantages(baseline="group_mean"), advantages(baseline="leave_one_out")
    assert torch.allclose(group[:, 0], log_u[:, 0] - log_u[:, 0].mean(), atol=ALGEBRA)
    assert torch.allclose(others[0, 0], log_u[0, 0] - (log_u[1, 0] + log_u[2, 0]) / 2, atol=ALGEBRA)
    assert group[0, 1] == 0  # alone at its position: its own mean
    assert torch.allclose(others[0, 1], log_u[0, 1], atol=ALGEBRA)  # no other: no baseline
    z = advantages(zscore=True, eps=1e-9)
    assert torch.allclose(z[:, 0], group[:, 0] / log_u[:, 0].std(), atol=1e-6)
    assert z[0, 1] == 0
    for values in (group, others, z):
        assert (values[1:, 1] == 0).all()


def test_vocabulary_baseline_is_the_expected_advantage() -> None:
    rollouts = ragged()
    p = rollouts.student_logits.softmax(-1)
    u = rollouts.teacher_logits.softmax(-1) / p
    got = estimator("opd_plus", "chi2", baseline="vocabulary", clip_weight=(-0.5, 1.0)).token_loss.advantages(rollouts)
    weight = (u**2 - 1).clamp(-0.5, 1.0)
    at = weight.gather(-1, rollouts.tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(got, (at - (p * weight).sum(-1)) * rollouts.mask, atol=ALGEBRA)


@pytest.mark.parametrize("options", [{"baseline": "group_mean"}, {"baseline": "leave_one_out"}, {"zscore": True}])
def test_group_statistics_need_a_group(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"at least 2 rollouts.*got 1"):
        estimator("k1_reward", **options)(three_tokens(mask=[1.0, 1.0, 1.0]))


@pytest.mark.parametrize("clip", [None, (-0.5, 1.0)])
def test_the_optimal_baseline_has_the_least_variance_of_all(clip: tuple[float, float] | None) -> None:
    rollouts = ragged()
    p = rollouts.student_logits.detach().softmax(-1)
    u = rollouts.teacher_logits.softmax(-1) / p
    weight = u**2 - 1 if clip is None else (u**2 - 1).clamp(*clip)
    options = {} if clip is None else {"clip_weight": clip}
    got = estimator("opd_plus", "chi2", baseline="optimal", **options).token_loss.advantages(rollouts)
    at = weight.gather(-1, rollouts.tokens.unsqueeze(-1)).squeeze(-1)
    baseline = (at - got)[rollouts.mask > 0]

    def spread(constant: Tensor) -> Tensor:
        """The trace of the covariance of one token's gradient, from the scores of every token."""
        score = torch.eye(p.shape[-1], dtype=p.dtype) - p.unsqueeze(-2)
        gradient = (weight - constant.unsqueeze(-1)).unsqueeze(-1) * score
        mean = (p.unsqueeze(-1) * gradient).sum(-2)
        return (p * gradient.square().sum(-1)).sum(-1) - mean.square().sum(-1)

    full = torch.zeros_like(rollouts.mask)
    full[rollouts.mask > 0] = baseline
    # A parabola takes equal values on either side of its lowest point.
    below, above = spread(full - 1)[rollouts.mask > 0], spread(full + 1)[rollouts.mask > 0]
    assert error(below, above) < 1e-11
    assert bool((spread(full)[rollouts.mask > 0] < below).all())


def test_the_optimal_baseline_is_exact_and_finite_where_a_token_is_certain() -> None:
    policies = pair(seed=3, vocabulary=3)
    for name in ("forward_kl", "jsd"):
        loss = estimator("opd_plus", name, baseline="optimal")
        assert loss.claim.verdict == "exact" and "T7a" in loss.claim.theorem
        assert error(expected_gradient(loss, policies), token_local(WEIGHTS[name], policies)) < ALGEBRA
    certain = three_tokens(mask=[1.0, 1.0, 1.0])
    logits = torch.full_like(certain.student_logits.detach(), -torch.inf).scatter(-1, certain.tokens.unsqueeze(-1), 0.0)
    rollouts = Rollouts.from_logits(certain.tokens, logits.requires_grad_(), certain.teacher_logits, certain.mask)
    assert bool(torch.isfinite(estimator("opd_plus", "jsd", baseline="optimal")(rollouts)))
    with pytest.raises(InvalidArgumentError, match="optimal"):
        estimator("return_to_go", "jsd", gamma=1.0, baseline="optimal")
