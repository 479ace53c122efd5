"""Losses as settings call them: extras of every batch, micro-batches, and a reward that is set apart."""

from __future__ import annotations

import pytest
import torch

from opdtheory.auditing.accompanied import RewardPart, accompanied, reward_part, without_reward
from opdtheory.auditing.black_box import BlackBox
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import Enumeration, exact_gradient, expected_gradient
from opdtheory.exact.companions import random_rewards
from opdtheory.rollouts import Rollouts
from opdtheory.testing import gradient_gap
from tests.losses import k1, k2, k3
from tests.tolerances import ENUMERATION


def test_a_scenario_without_extras_leaves_the_loss_alone():
    assert accompanied(k2, Scenario(4, eos=0, off_policy=0.3)) is k2


@pytest.mark.parametrize("settings", [{}, {"eos": 0}, {"prompts": 2, "environment": (1,), "eos": 2}])
def test_extras_are_those_of_the_policies_of_the_claim(settings):
    scenario = Scenario(teachers=2, base=True, reward=True, **settings)
    case, seen = scenario.pairs()[3], []
    everything = Enumeration.build(case.student, case.teacher)
    accompanied(lambda r: seen.append(r) or k2(r), scenario)(everything.rollouts())
    (r,) = seen
    second = Enumeration.build(case.student, case.targets[1][1])
    base = Enumeration.build(case.student, scenario.companions()[1].table(case.student))
    live = r.mask > 0
    for scored, policy in ((r.teachers[1], second), (r.extras.base, base)):
        assert torch.equal(scored.logits[live], policy.teacher_logits[live])
        assert torch.equal(scored.logprobs[live], policy.teacher_logprobs[live])
    assert torch.equal(r.rewards, random_rewards(r.tokens, r.mask, 0))
    assert r.teachers[0].logits is r.teacher_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extras_have_the_dtype_of_the_rollouts(dtype):
    case = Scenario().pairs()[0]
    batch = Enumeration.build(case.student, case.teacher).rollouts()
    narrow = {name: x.detach().to(dtype) if x.is_floating_point() else x for name, x in vars(batch).items()}
    seen = []
    accompanied(lambda r: seen.append(r) or k2(r), Scenario(base=True, reward=True))(Rollouts.unchecked(**narrow))
    assert {seen[0].base_logits.dtype, seen[0].base_logprobs.dtype, seen[0].rewards.dtype} == {dtype}


def by_token_mean(r: Rollouts) -> torch.Tensor:
    return r.token_mean(-r.log_u.detach() * r.student_logprobs)


def centred(r: Rollouts) -> torch.Tensor:
    weight = r.mask * r.log_u.detach()
    return r.token_sum(-(weight - weight.mean(0, keepdim=True)) * r.student_logprobs)


@pytest.mark.parametrize("accumulate", ["mean", "sum"])
@pytest.mark.parametrize("loss", [by_token_mean, centred, k3])
def test_micro_batches_have_the_expected_gradient_of_the_whole_batch(loss, accumulate):
    """The second route cuts batches of four in two and enumerates all of them."""
    scenario = Scenario.of(4, 2, eos=0, accumulate=accumulate)
    assert (scenario.batch_size, scenario.to_dict()["batch_size"]) == (2, 4)
    case = Scenario(4, eos=0).pairs()[3]

    def cut(r: Rollouts) -> torch.Tensor:
        parts = [Rollouts.unchecked(**{name: x[s] for name, x in vars(r).items()}) for s in (slice(2), slice(2, None))]
        total = loss(parts[0]) + loss(parts[1])
        return total if accumulate == "sum" else total / 2

    found = scenario.moments(accompanied(loss, scenario), case).mean
    by_hand = expected_gradient(cut, case.student, case.teacher, batch_size=4)
    assert gradient_gap(found, by_hand) <= ENUMERATION
    # The twin: the loss of the whole batch at once, which couples more rollouts.
    if loss is not k3:
        assert gradient_gap(found, expected_gradient(loss, case.student, case.teacher, batch_size=4)) > 1e-3


def reinforce(r: Rollouts) -> torch.Tensor:
    return r.token_sum(-r.rewards.unsqueeze(-1) * r.student_logprobs)


@pytest.mark.parametrize("settings", [{}, {"eos": 0}, {"eos": 1, "off_policy": 0.4}])
@pytest.mark.parametrize("coefficient", [2.0, 0.125, -1.0])
def test_what_is_set_apart_is_the_gradient_of_the_expected_reward(coefficient, settings):
    """The second route differentiates the expected reward, summed over all sequences."""
    scenario = Scenario(reward=True, **settings)
    cases = scenario.pairs()

    def ratio(r: Rollouts) -> torch.Tensor:
        return (r.mask * (r.student_logprobs - r.behavior_logprobs)).sum(-1, keepdim=True).exp().detach()

    def loss(r: Rollouts) -> torch.Tensor:
        weight = r.log_u.detach() + coefficient * r.rewards.unsqueeze(-1)
        return r.token_sum(-ratio(r) * weight * r.student_logprobs)

    part = reward_part(loss, scenario, cases, 1e-9)
    assert part.coefficient == pytest.approx(coefficient, rel=1e-9) and part.error <= 1e-9
    assert "Set apart" in part.words and "%" not in part.words
    rest = without_reward(loss, scenario, part, BlackBox(accompanied(loss, scenario)))
    for case in cases[::3]:
        everything = Enumeration.build(case.student, case.teacher)
        leaves = [z.clone().requires_grad_() for z in case.student.logits]
        logits = everything.gather_logits(leaves)
        log_p = logits.log_softmax(-1).gather(-1, everything.tokens.unsqueeze(-1)).squeeze(-1)
        rewards = random_rewards(everything.tokens, everything.mask, 0)
        value = -((everything.mask * log_p).sum(-1).exp() * rewards).sum()
        policy_gradient = torch.autograd.grad(value, leaves)
        found = scenario.moments(rest, case).mean
        whole = scenario.moments(accompanied(loss, scenario), case).mean
        by_hand = [w - coefficient * g for w, g in zip(whole, policy_gradient, strict=True)]
        assert gradient_gap(found, by_hand) <= ENUMERATION
        if not settings:
            own = exact_gradient(case.student, case.teacher, "reverse_kl")
            assert gradient_gap(found, own) <= ENUMERATION and gradient_gap(whole, own) > 1e-3


def standardised(r: Rollouts) -> torch.Tensor:
    spread = r.rewards.std(unbiased=False) + 0.1
    return r.token_sum(-((r.rewards - r.rewards.mean()) / spread).unsqueeze(-1) * r.student_logprobs)


@pytest.mark.parametrize(
    "loss",
    [
        standardised,
        lambda r: r.token_sum(-(r.log_u.detach() * r.rewards.unsqueeze(-1)) * r.student_logprobs),
        lambda r: r.token_sum(-r.rewards.square().unsqueeze(-1) * r.student_logprobs),
        lambda r: r.token_sum(-r.rewards.clamp(min=0.0).unsqueeze(-1) * r.student_logprobs),
    ],
)
def test_a_reward_that_enters_otherwise_is_measured(loss):
    scenario = Scenario(2, reward=True)
    part = reward_part(loss, scenario, scenario.pairs(), 1e-9)
    assert part.error > 1e-2 and "something else" in part.words


def test_a_loss_that_ignores_the_reward_says_so():
    scenario = Scenario(reward=True)
    for loss in (k1, k2, lambda r: k2(r) + 0.0 * r.rewards.sum()):
        assert reward_part(loss, scenario, scenario.pairs(), 1e-9) == RewardPart(0.0, 0.0, 1e-9)
