"""Policies and rewards that are functions of the prefix: the same wherever a loss meets the same tokens."""

from __future__ import annotations

import pytest
import torch

from opdtheory.exact import Enumeration, TabularPolicy, random_pair
from opdtheory.exact.companions import PrefixPolicy, random_rewards, softened


@pytest.mark.parametrize(("eos", "environment"), [(None, ()), (0, ()), (2, (0,)), (None, (1,))])
def test_tokens_and_table_give_the_same_logits(eos, environment):
    student, teacher = random_pair(3, 4, eos=eos, environment=environment)
    policy = PrefixPolicy(3, scale=1.5)
    everything = Enumeration.build(student, policy.table(teacher))
    by_tokens = policy.logits(everything.tokens, everything.mask, 3)
    written = everything.mask > 0
    assert torch.equal(by_tokens[written], everything.teacher_logits[written])
    # Other masked tokens change nothing; the twin reads what an environment wrote.
    changed = torch.where(written, everything.tokens, (everything.tokens + 1) % 3)
    assert torch.equal(policy.logits(changed, everything.mask, 3)[written], by_tokens[written])
    if environment:
        other = policy.logits(everything.tokens, torch.ones_like(everything.mask), 3)
        assert not torch.equal(other[written], by_tokens[written])


def test_every_prefix_has_logits_of_its_own():
    like = TabularPolicy.random(4, 5)
    levels = PrefixPolicy(0).table(like).logits
    every = torch.cat([level.flatten() for level in levels])
    assert len(every.unique()) >= len(every) - 2
    assert abs(float(every.mean())) < 0.1 and abs(float(every.std()) - 1.0) < 0.05
    assert not torch.equal(levels[1], PrefixPolicy(1).table(like).logits[1])
    assert torch.equal(levels[4], PrefixPolicy(0).table(like).logits[4])


def test_a_large_vocabulary_needs_no_table():
    tokens = torch.randint(50_000, (2, 64), generator=torch.Generator().manual_seed(0))
    logits = PrefixPolicy(7).logits(tokens, torch.ones(2, 64), 50_000)
    assert logits.shape == (2, 64, 50_000) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("eos", [0, 2])
def test_rewards_are_functions_of_what_the_student_wrote(eos):
    everything = Enumeration.build(*random_pair(3, 3, eos=eos, environment=(1,)))
    tokens, mask = everything.tokens, everything.mask
    rewards = random_rewards(tokens, mask, 5)
    elsewhere = torch.where(mask > 0, tokens, (tokens + 1) % 3)
    assert torch.equal(random_rewards(elsewhere, mask, 5), rewards)
    assert not torch.equal(random_rewards((tokens + 1) % 3, mask, 5), rewards)
    assert not torch.equal(random_rewards(tokens, mask, 6), rewards)
    written = {tuple(row[live > 0].tolist()) for row, live in zip(tokens, mask, strict=True)}
    assert len(rewards.unique()) == len(written)


def test_softened_policies_keep_the_environment():
    policy = TabularPolicy.random(3, 3, environment=(1,))
    soft = softened(policy, 2.0)
    assert torch.equal(soft.logits[1], policy.logits[1])
    assert torch.equal(soft.logits[2], policy.logits[2] / 2.0)
    assert softened(policy, 1.0) is policy
