"""T9, T10 and T12: exact checks pass, and random divergences, policies and horizons yield no counterexample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from opdtheory import TabularPolicy, divergence, estimator, exact_gradient, exact_value, expected_gradient
from opdtheory.testing import divergences, gradient_gap, policy_pairs
from opdtheory.theorems import theorems
from opdtheory.theorems.instances.minimisers import critical_ratio
from tests.tolerances import ALGEBRA, ENUMERATION

THEOREMS = theorems("T9", "T9c", "T9d", "T9e", "T10", "T10b", "T12", "T12b")


def test_every_theorem_has_a_derivation_a_check_and_rounding_for_a_tolerance():
    for theorem in THEOREMS:
        assert theorem.derivation and theorem.identities
        assert all(identity.twins and identity.tolerance <= ALGEBRA for identity in theorem.identities)


def test_all_parts_are_there():
    assert [theorem.number for theorem in THEOREMS] == ["T9", "T9c", "T9d", "T9e", "T10", "T10b", "T12", "T12b"]


# T9: the terms on S alone.


def lowest(d, q, inside):
    """The claimed minimum of the terms on S, whose teacher mass is `inside`."""
    level = max(critical_ratio(d), inside)
    return inside / level * float(d.generator(torch.tensor([level], dtype=torch.float64).log()))


def truncated_value(d, p, q, k):
    return float((p[:k] * d.generator(q[:k].log() - p[:k].log())).sum())


one_row = policy_pairs(vocab_size=(3, 5), horizon=1, eos=None, distinct=True)


def distributions(pair):
    p, q = (policy.logits[0][0].softmax(-1) for policy in pair)
    return p, q


@given(one_row, divergences())
def test_no_distribution_lies_below_the_claimed_minimum(pair, d):
    p, q = distributions(pair)
    # A teacher's mass that its truncated loss never reaches: where w_f < 0 throughout, it falls for ever.
    assume(math.isfinite(critical_ratio(d)))
    for k in range(1, len(q)):
        assert truncated_value(d, p, q, k) >= lowest(d, q, float(q[:k].sum())) - ALGEBRA


def test_the_same_assertion_refutes_the_teacher_as_the_minimiser():
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    for name in ("reverse_kl", "forward_kl"):
        d = divergence(name)
        better = p if name == "reverse_kl" else torch.tensor([0.6, 0.35, 0.05], dtype=torch.float64)
        at_teacher = truncated_value(d, q, q, 2)
        assert not truncated_value(d, better, q, 2) >= at_teacher - ALGEBRA


# T9c: renormalised.


def moved_tail(policy, teacher, k, by):
    """The student with its logits outside each row's top k of the teacher moved by `by`."""
    levels = []
    for own, other in zip(policy.logits, teacher.logits, strict=True):
        on = torch.zeros_like(own).scatter(-1, other.topk(k, dim=-1).indices, 1.0) > 0
        levels.append(torch.where(on, own, own + by))
    return TabularPolicy(levels, eos=policy.eos)


def tail_moves(name, pair, d, by):
    """How far the gradient moves when the student's tail does."""
    student, teacher = pair
    loss = estimator(name, d, k=2)
    return gradient_gap(
        expected_gradient(loss, moved_tail(student, teacher, 2, by), teacher), expected_gradient(loss, student, teacher)
    )


@given(one_row, divergences(), st.sampled_from((-1.0, 0.5, 2.0)))
def test_the_renormalised_loss_does_not_see_the_tail(pair, d, by):
    assert tail_moves("topk_renormalised", pair, d, by) <= ENUMERATION


@pytest.mark.parametrize("name", ["topk_truncated", "topk_tail"])
def test_the_other_forms_do(name):
    student = TabularPolicy([torch.zeros(1, 3, dtype=torch.float64)])
    teacher = TabularPolicy([torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)])
    assert not tail_moves(name, (student, teacher), divergence("reverse_kl"), 1.0) <= ENUMERATION


# T9d: one bucket.


def bucket(p, k):
    return torch.cat([p[:k], p[k:].sum(0, keepdim=True)])


def excess(d, pair, k):
    """The fine divergence minus the one with a bucket, relative to their size."""
    p, q = distributions(pair)
    fine = truncated_value(d, p, q, len(q))
    coarse = truncated_value(d, bucket(p, k), bucket(q, k), k + 1)
    return (fine - coarse) / max(1.0, abs(fine))


@given(one_row, divergences(), st.integers(1, 2))
def test_a_bucket_never_adds(pair, d, k):
    assert excess(d, pair, k) >= -ALGEBRA


def test_the_same_assertion_refutes_a_bucket_that_never_loses():
    student = TabularPolicy([torch.zeros(1, 3, dtype=torch.float64)])
    teacher = TabularPolicy([torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)])
    assert not -excess(divergence("reverse_kl"), (student, teacher), 1) >= -ALGEBRA


# T9e: a detached reward.


def reward_gap(loss, pair):
    gradient = expected_gradient(loss, *pair)
    return gradient_gap(gradient, [torch.zeros_like(level) for level in gradient])


small = policy_pairs(vocab_size=(2, 3), horizon=(1, 3))


@given(small, divergences())
def test_a_reward_of_the_history_moves_nothing(pair, d):
    assert reward_gap(estimator("topk_reward", d, k=1), pair) <= ENUMERATION * 1e3


def test_the_same_assertion_refutes_a_reward_of_the_token():
    pair = (TabularPolicy.random(3, 2, seed=1), TabularPolicy.random(3, 2, seed=2))
    assert not reward_gap(estimator("opd", "reverse_kl"), pair) <= ENUMERATION * 1e3


# T10: support.


def approach(d, p, limit):
    """The term of a token with student mass p and teacher mass one tenth, over its claimed limit."""
    log_u = math.log(0.1) - math.log(p)
    return p * float(d.generator(torch.tensor([log_u], dtype=torch.float64))) - 0.1 * limit


@given(divergences())
def test_a_vanishing_token_costs_its_slope_at_infinity(d):
    if math.isinf(d.slope_at_infinity):
        assert approach(d, 1e-300, 0.0) > approach(d, 1e-100, 0.0) + 1
    else:
        # Convexity: f(u)/u rises to f'(inf), within |f(0)|-like terms of order u^(alpha-1) or log(u)/u.
        gaps = [abs(approach(d, p, d.slope_at_infinity)) for p in (1e-2, 1e-30, 1e-300)]
        assert gaps[2] <= gaps[1] + ALGEBRA and gaps[1] <= gaps[0] + ALGEBRA
        slow = d.name == "alpha" and d.parameters["alpha"] > 0.9
        assert slow or gaps[2] <= ALGEBRA


def test_the_same_assertion_refutes_that_nothing_is_missed():
    assert not abs(approach(divergence("jsd"), 1e-300, 0.0)) <= ALGEBRA


# T10b: other samplers.


def sampled_gap(pair, d, temperature, importance):
    student, teacher = pair
    sampler = TabularPolicy([level / temperature for level in student.logits], eos=student.eos)
    loss = estimator("opd_plus", d, importance=importance)
    return gradient_gap(expected_gradient(loss, *pair, behavior=sampler), exact_gradient(*pair, d))


@given(small, divergences(), st.sampled_from((0.5, 0.8, 1.3)))
def test_prefix_weights_undo_a_temperature(pair, d, temperature):
    assert sampled_gap(pair, d, temperature, "prefix") <= 1e-11


def test_the_same_assertion_refutes_unweighted_rollouts():
    pair = (TabularPolicy.random(3, 2, seed=1), TabularPolicy.random(3, 2, seed=2))
    assert not sampled_gap(pair, divergence("forward_kl"), 0.8, None) <= 1e-11


# T12: the whole vocabulary, and the generalised JSD.


def vocabulary_gap(loss, pair, d):
    return gradient_gap(expected_gradient(loss, *pair), exact_gradient(*pair, d))


@given(small, divergences())
def test_backpropagation_over_the_vocabulary_is_token_local(pair, d):
    assert vocabulary_gap(estimator("full_vocab", d), pair, d) <= ENUMERATION


def test_the_same_assertion_refutes_a_detached_ratio():
    def loss(rollouts):
        log_p = rollouts.student_logits.log_softmax(-1)
        log_u = (rollouts.teacher_logits.log_softmax(-1) - log_p).detach()
        return rollouts.token_sum((log_p.exp() * log_u.exp() * log_u).sum(-1))

    pair = (TabularPolicy.random(3, 2, seed=1), TabularPolicy.random(3, 2, seed=2))
    assert not vocabulary_gap(loss, pair, divergence("forward_kl")) <= ENUMERATION


def excess_over_beta(pair, beta, kls=("forward_kl", "reverse_kl")):
    """How far the generalised JSD exceeds beta times one KL, or 1 - beta times the other."""
    value = float(exact_value(*pair, divergence("skew_jsd", beta=beta)))
    ends = (share * float(exact_value(*pair, kl)) for share, kl in zip((beta, 1 - beta), kls, strict=True))
    return max(value - end for end in ends)


@given(policy_pairs(), st.integers(1, 99))
def test_the_generalised_jsd_lies_below_both_scaled_kls(pair, hundredths):
    assert excess_over_beta(pair, hundredths / 100) <= ALGEBRA


def test_the_same_assertion_refutes_the_kls_exchanged():
    student = TabularPolicy([torch.tensor([[9.0, 0.0]], dtype=torch.float64)])
    teacher = TabularPolicy([torch.zeros(1, 2, dtype=torch.float64)])
    assert not excess_over_beta((student, teacher), 0.1, ("reverse_kl", "forward_kl")) <= ALGEBRA
