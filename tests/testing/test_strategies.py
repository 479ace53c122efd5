"""Strategies draw valid objects, which shrink."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opdtheory
from opdtheory import TabularPolicy, divergence, estimator
from opdtheory.divergences import names
from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from opdtheory.testing import (
    divergences,
    gradient_gap,
    policies,
    policy_pairs,
    rollouts,
)


def minimal(strategy, condition=lambda value: True):
    settings = hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
    return hypothesis.find(strategy, condition, settings=settings)


@pytest.mark.parametrize("name", names())
def test_every_divergence_is_drawn(name):
    assert minimal(divergences(), lambda d: d.name == name).name == name


@given(divergences())
def test_divergences_are_of_the_catalogue(d):
    assert divergence(d.name, **d.parameters) == d


@given(divergences(families=False, smooth=True))
def test_divergences_can_be_restricted(d):
    assert not d.parameters and d.name != "total_variation"


def test_divergences_shrink_to_the_reverse_kl():
    assert minimal(divergences()).label == "reverse_kl"
    assert minimal(divergences(), lambda d: d.parameters).label == "skew_jsd(beta=0.5)"
    assert minimal(divergences(), lambda d: d.parameters.get("alpha", 0.0) > 0.7).label == "alpha(alpha=0.71)"


@given(policies(vocab_size=(2, 5), horizon=(1, 2), eos="any"))
def test_policies_keep_within_their_sizes(policy):
    assert isinstance(policy, TabularPolicy)
    assert 2 <= policy.vocab_size <= 5 and policy.horizon in (1, 2) and policy.eos in (None, 0)
    assert max(float(level.abs().max()) for level in policy.logits) <= 2.0


@given(policies(vocab_size=3, horizon=2, eos=2, zeros=1))
def test_sizes_can_be_fixed(policy):
    assert (policy.vocab_size, policy.horizon, policy.eos) == (3, 2, 2)
    for level in policy.logits:
        assert torch.isneginf(level).sum(-1).eq(1).all() and torch.isneginf(level[:, -1]).all()


def test_policies_shrink_to_a_small_uniform_bandit():
    policy = minimal(policies())
    assert [level.tolist() for level in policy.logits] == [[[0.0, 0.0]]] and policy.eos is None
    large = minimal(policies(vocab_size=6, horizon=3))  # too many logits to draw one by one
    assert not any(level.any() for level in large.logits)


def test_every_kind_of_policy_is_drawn():
    sharp = minimal(policies(sharp=True), lambda p: float(p.logits[0].softmax(-1).max()) > 1 - 1e-9)
    assert sharp.horizon == 1 and sharp.vocab_size == 2
    assert torch.isneginf(minimal(policies(zeros=(0, 2)), lambda p: torch.isneginf(p.logits[0]).any()).logits[0]).any()
    assert minimal(policies(), lambda p: p.eos is not None).eos == 0
    assert minimal(policies(), lambda p: p.horizon == 3 and p.vocab_size == 4).horizon == 3


@given(policy_pairs(zeros=(0, 2), sharp=True))
def test_pairs_range_over_the_same_sequences_and_share_their_zeros(pair):
    student, teacher = pair
    assert [getattr(student, key) == getattr(teacher, key) for key in ("vocab_size", "horizon", "eos")] == [True] * 3
    for ours, theirs in zip(student.logits, teacher.logits, strict=True):
        assert torch.equal(torch.isneginf(ours), torch.isneginf(theirs))


@given(policy_pairs(distinct=True))
def test_distinct_pairs_differ_in_every_row(pair):
    for ours, theirs in zip(*(policy.logits for policy in pair), strict=True):
        assert ((ours.softmax(-1) - theirs.softmax(-1)).abs().amax(-1) > 1e-9).all()


def test_pairs_shrink_to_equal_uniform_bandits():
    student, teacher = minimal(policy_pairs())
    assert student.logits[0].tolist() == teacher.logits[0].tolist() == [[0.0, 0.0]]


def test_near_equal_pairs_are_drawn():
    def near(pair):
        return 0 < gradient_gap(pair[0].logits, pair[1].logits) < 1e-4

    assert near(minimal(policy_pairs(), near))


@given(rollouts(off_policy=True))
def test_rollouts_are_valid_and_differentiable(r):
    assert isinstance(r, Rollouts) and r.student_logits.requires_grad
    (gradient,) = torch.autograd.grad(r.token_sum(r.log_u.square()), r.student_logits)
    assert torch.isfinite(gradient).all()
    assert not gradient[r.mask == 0].any()


@given(rollouts(batch_size=2, horizon=3, vocab_size=5, masked=False, dtype=torch.float32))
def test_rollouts_obey_their_settings(r):
    assert r.student_logits.shape == (2, 3, 5) and r.student_logits.dtype == r.mask.dtype == torch.float32
    assert r.mask.all() and torch.equal(r.behavior_logprobs, r.student_logprobs.detach())


def test_rollouts_shrink_to_one_uniform_token():
    r = minimal(rollouts())
    assert r.tokens.tolist() == [[0]] and r.mask.tolist() == [[1.0]]
    assert r.student_logits.tolist() == r.teacher_logits.tolist() == [[[0.0, 0.0]]]


@pytest.mark.slow
def test_variable_lengths_and_tokens_of_an_environment_are_drawn():
    small = rollouts(vocab_size=2, horizon=(1, 3), batch_size=(1, 2))
    assert minimal(small, lambda r: r.mask.sum(-1).unique().numel() > 1).tokens.shape == (2, 1)
    minimal(small, lambda r: ((r.mask[:, :-1] == 0) & (r.mask[:, 1:] == 1)).any())


@pytest.mark.parametrize("sizes", [0, (3, 2), (0, 2)])
@pytest.mark.parametrize("strategy", [policies, policy_pairs, rollouts])
def test_impossible_sizes_are_refused_by_name(strategy, sizes):
    @given(st.data())
    @hypothesis.settings(max_examples=1, database=None)
    def draw(data):
        with pytest.raises(InvalidArgumentError, match="vocab_size"):
            data.draw(strategy(vocab_size=sizes))

    draw()


def test_a_failing_property_is_reported_on_a_small_case():
    """The counterexample to "plain OPD is unbiased for the forward KL" is a bandit."""

    def fails(pair):
        biased = opdtheory.expected_gradient(estimator("opd", "forward_kl"), *pair)
        return gradient_gap(biased, opdtheory.exact_gradient(*pair, "forward_kl")) > 1e-6

    student, _ = minimal(policy_pairs(), fails)
    assert student.horizon == 1 and student.vocab_size == 2 and student.eos is None
