"""Losses that are NaN somewhere: where, and which setting makes them finite."""

from __future__ import annotations

import math

import pytest
import torch

import opdtheory as opd
from opdtheory.auditing import audit
from opdtheory.errors import LossError
from opdtheory.testing import assert_minimises, assert_same_gradient
from tests.losses import k2


def kl(student, teacher):
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def shifts(student, teacher, labels):
    """As trainers do: row n of the logits scores token n + 1."""
    mask = (labels[:, 1:] != -100).double()
    return (kl(student[:, :-1], teacher[:, :-1]) * mask).sum() / mask.sum()


def shifts_by_rollout(student, teacher, labels):
    return kl(student, teacher)[:, :-1].mean(-1).mean()


def normalised(r):
    """Rewards of a group, centred and scaled; the spread of one rollout is 0/0."""
    rewards = (r.log_u.detach() * r.mask).sum(-1)
    centred = rewards - rewards.mean()
    spread = (centred.square().sum() / (len(rewards) - 1 if len(rewards) > 1 else math.nan)).sqrt()
    return r.token_sum(-(centred / (spread + 1e-6)).unsqueeze(-1) * r.student_logprobs)


def of_three(r):
    """Leaves out the best and the worst of a group."""
    rewards = (r.log_u.detach() * r.mask).sum(-1)
    kept = rewards.sort().values[1:-1].mean()
    return r.token_sum((kept - rewards).unsqueeze(-1) * r.student_logprobs)


def nowhere(r):
    return r.token_sum(r.log_u) * math.nan


def no_gradient_at_zero(r):
    return r.token_sum((r.log_u * 0).sqrt())


def of_negative(r):
    return r.token_sum(r.log_u.log())


@pytest.mark.parametrize("f", [shifts, shifts_by_rollout])
def test_a_loss_that_shifts_itself_is_told_of_shifted(f):
    with pytest.raises(LossError) as caught:
        audit(opd.from_logits(f))
    said = str(caught.value)
    assert "must be finite, got nan on a batch of shape (B, T, V) = " in said and ", 1, " in said
    assert "opdtheory.from_logits(..., shifted=True)" in said and "batch_size" not in said
    # The advice is right.
    assert audit(opd.from_logits(f, shifted=True), details=False).verdict == "exact_up_to_scale"


@pytest.mark.parametrize(("loss", "count"), [(normalised, 2), (of_three, 3)])
def test_a_loss_of_a_group_is_told_of_the_batch_size(loss, count):
    with pytest.raises(LossError) as caught:
        audit(loss)
    said = str(caught.value)
    assert f"audit it with batch_size={count}" in said and "shifted" not in said
    assert "shape (B, T, V) = (1, 3, 4), on the pair 'sharpness 1, distance 0.03'" in said
    assert torch.isfinite(torch.tensor(audit(loss, batch_size=count, details=False).cosine))


def of_all_tokens(r):
    """Divides by the spread of all tokens, which a single one has not."""
    reward = r.log_u.detach()
    centred = reward - reward.mean()
    spread = (centred.square().sum() / torch.tensor(reward.numel() - 1.0)).sqrt() + 1e-6
    return r.token_sum(-centred / spread * r.student_logprobs)


def test_a_loss_that_a_setting_of_either_kind_makes_finite_is_told_of_both():
    with pytest.raises(LossError) as caught:
        audit(of_all_tokens)
    said = str(caught.value)
    assert "shifted=True" in said and "audit it with batch_size=2" in said
    assert torch.isfinite(torch.tensor(audit(of_all_tokens, batch_size=2, details=False).cosine))


def without_eps(r):
    """Divides by a spread that is zero where two rollouts are equal, however many there are."""
    rewards = (r.log_u.detach() * r.mask).sum(-1)
    centred = rewards - rewards.mean()
    return r.token_sum(-(centred / centred.square().mean().sqrt()).unsqueeze(-1) * r.student_logprobs)


def test_no_setting_is_named_where_the_size_of_the_batch_is_not_the_cause():
    with pytest.raises(LossError) as caught:
        audit(without_eps, batch_size=2)
    said = str(caught.value)
    assert "must be finite, got nan on a batch of shape (B, T, V) = (2, " in said
    assert "batch_size=" not in said and "shifted" not in said


@pytest.mark.parametrize("loss", [nowhere, no_gradient_at_zero, of_negative])
def test_where_no_setting_helps_none_is_named(loss):
    with pytest.raises(LossError) as caught:
        audit(loss)
    said = str(caught.value)
    assert "shape (B, T, V) = (4, 3, 4), on the pair 'sharpness 1, distance 0.03'" in said
    assert "batch_size=" not in said and "shifted" not in said


def test_a_sampled_audit_gives_the_same_advice():
    with pytest.raises(LossError, match=r"drawn batch of shape \(B, T, V\) = \(1, .*batch_size=2"):
        audit(normalised, method="monte_carlo")
    with pytest.raises(LossError, match="has NaN or inf although its value is finite, on a drawn batch of shape"):
        audit(no_gradient_at_zero, method="monte_carlo")


def test_assertions_pass_the_advice_on():
    with pytest.raises(LossError, match="batch_size=2"):
        assert_minimises(normalised, "reverse_kl")
    with pytest.raises(LossError, match="batch_size=2"):
        assert_same_gradient(k2, normalised)
    with pytest.raises(LossError, match="shifted=True"):
        assert_minimises(opd.from_logits(shifts), "reverse_kl")
