"""PPO's surrogate, and ratios that are truncated, masked or one for the whole rollout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdtheory.auditing import audit
from opdtheory.estimators import estimator
from opdtheory.estimators.offpolicy import importance_weight
from opdtheory.exact import TabularPolicy
from opdtheory.exact import expected_gradient as opd_expected
from opdtheory.rollouts import Rollouts
from tests.estimators.pairs import error, expected_gradient, pair, three_tokens
from tests.sparse import some
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


def _stale(seed: int = 2, size: int = 4, steps: int = 3) -> tuple[Rollouts, torch.Tensor]:
    """Rollouts of two lengths under another policy, and the ratios p / mu by hand, one at padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, size, steps, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randint(5, (size, steps), generator=generator)
    mask = torch.ones(size, steps, dtype=torch.float64)
    mask[0, 1:] = 0.0
    student, teacher = logits
    log_p = student.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    noise = 0.5 * torch.randn(size, steps, generator=generator, dtype=torch.float64)
    noise = torch.maximum(noise, 0.9 * log_p)  # no probability above one
    rollouts = Rollouts.from_logits(tokens, student.requires_grad_(), teacher, mask, log_p - noise)
    return rollouts, torch.where(mask > 0, noise.exp(), 1.0)


def test_every_kind_of_ratio_is_its_formula() -> None:
    rollouts, ratio = _stale()
    whole, lengths = ratio.prod(-1, keepdim=True), rollouts.mask.sum(-1, keepdim=True)
    kept = ((ratio >= 0.8) & (ratio <= 1.25)).double()
    whole_kept = ((whole >= 0.8) & (whole <= 3.0)).double()
    assert 0 < float(kept.mean()) < 1 and 0 < float(whole_kept.mean()) < 1
    for kind, options, expected in (
        ("token", {}, ratio),
        ("prefix", {}, ratio.cumprod(-1)),
        ("sequence", {}, whole.expand_as(ratio)),
        ("tis", {}, ratio.clamp(max=2.0)),
        ("tis", {"cap": 1.1}, ratio.clamp(max=1.1)),
        ("mask", {"keep_range": (0.8, 1.25)}, ratio * kept),
        ("sequence_mask", {"keep_range": (0.8, 3.0)}, ratio * whole_kept),
        ("gspo", {}, (whole ** (1 / lengths)).expand_as(ratio)),
    ):
        found = importance_weight(rollouts, kind, **options)
        assert not found.requires_grad
        assert error(found, expected) < ALGEBRA, kind
    # The ends of the range are kept.
    exactly = replace(rollouts, behavior_logprobs=rollouts.student_logprobs.detach())
    assert bool((importance_weight(exactly, "mask", keep_range=(1.0, 5.0)) == 1).all())


@pytest.mark.parametrize("name", some(["opd_plus", "opd_plus_centred", "k2_loss"]))
@pytest.mark.parametrize(
    "options",
    some(
        [
            {"importance": "tis", "clip_range": 1.1},
            {"importance": "mask", "keep_range": (0.8, 1.25)},
            {"importance": "sequence_mask", "keep_range": (0.8, 1.25)},
            {"importance": "gspo"},
        ],
        2,
    ),
    ids=lambda options: options["importance"],
)
def test_replaced_ratios_are_exact_on_policy_and_biased_elsewhere(name: str, options: dict) -> None:
    """The claim is about rollouts of the student; off-policy the bias is T14's, at the sampler's histories too."""
    loss = estimator(name, None if name == "k2_loss" else "jsd", **options)
    assert loss.claim.verdict == "exact" and loss.claim.assumptions.sampler == "on_policy"
    objective = loss.claim.divergence
    assert audit(loss, objective, details=False, eos=0).verdict == "exact"
    for settings in ({}, {"histories": "sampler"}):
        assert audit(loss, objective, details=False, off_policy=0.7, **settings).verdict == "biased"


def test_the_teacher_stays_a_fixed_point_of_centred_weights_alone() -> None:
    policies = TabularPolicy.random(3, 2, eos=0, seed=5)
    sampler = policies.perturbed(0.8, seed=6)
    for options in (
        {"importance": "tis", "clip_range": 1.1},
        {"importance": "mask", "keep_range": (0.8, 1.25)},
        {"importance": "sequence_mask", "keep_range": (0.6, 1.8)},
        {"importance": "gspo"},
    ):
        centred, plain = (estimator(name, "forward_kl", **options) for name in ("opd_plus_centred", "opd_plus"))
        rests = opd_expected(centred, policies, policies, behavior=sampler)
        assert max(float(g.abs().max()) for g in rests) == 0.0
        drifts = opd_expected(plain, policies, policies, behavior=sampler)
        assert max(float(g.abs().max()) for g in drifts) > 1e-3
