"""PPO's surrogate."""

from __future__ import annotations

from dataclasses import replace

import torch

from opdtheory.estimators import estimator
from tests.estimators.pairs import error, expected_gradient, pair, three_tokens
from tests.tolerances import ALGEBRA


def test_ppo_on_policy_is_the_plain_estimator() -> None:
    policies = pair(seed=3, vocabulary=3)
    plain = expected_gradient(estimator("opd_plus", "jsd"), policies)
    assert error(expected_gradient(estimator("opd_plus", "jsd", importance="ppo"), policies), plain) < ALGEBRA


def test_ppo_leaves_no_gradient_outside_the_interval() -> None:
    rollouts = three_tokens(mask=[1.0, 1.0, 1.0])
    stale = replace(rollouts, behavior_logprobs=rollouts.behavior_logprobs - 1)  # ratio e everywhere
    for sign, finite in ((1.0, False), (-1.0, True)):
        loss = estimator("sign", baseline="constant", baseline_value=-3 * sign, importance="ppo", clip_range=0.1)
        (grad,) = torch.autograd.grad(loss(stale), rollouts.student_logits, retain_graph=True)
        assert bool((grad != 0).any()) is finite
