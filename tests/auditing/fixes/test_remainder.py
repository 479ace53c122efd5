"""Losses from whose expected gradient the teacher is absent, and what is left of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.remainder import length_push, remainder
from opdtheory.exact import Loss
from opdtheory.exact.enumeration import Enumeration
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import cure, facts_of, zoo
from tests.sparse import some
from tests.tolerances import ENUMERATION


def k1(r: Rollouts) -> Tensor:
    return r.student_logprobs - r.teacher_logprobs


def rewarded(r: Rollouts) -> Tensor:
    reward = (r.tokens == 1).to(r.mask).sum(-1, keepdim=True)
    return r.token_sum(-reward * r.student_logprobs + 0.1 * k1(r))


def rewarded_against_the_others(r: Rollouts) -> Tensor:
    reward = (r.tokens == 1).to(r.mask).sum(-1, keepdim=True)
    return r.token_sum(-(reward - reward.flip(0)) * r.student_logprobs + k1(r))


def rewarded_early(r: Rollouts) -> Tensor:
    return r.token_sum(-(r.tokens[:, :1] == 0).to(r.mask) * r.student_logprobs + k1(r))


def negative_entropy(r: Rollouts) -> Tensor:
    log_p = r.student_logits.log_softmax(-1)
    return r.token_sum((log_p.exp() * log_p).sum(-1))


@pytest.mark.parametrize(
    ("loss", "batch_size"), some([(rewarded, 1), (rewarded_early, 1), (rewarded_against_the_others, 2)])
)
def test_a_reward_set_apart_is_named_and_no_detach_is_called_verified(loss: Loss, batch_size: int) -> None:
    first = cure(loss, "reverse_kl", pairs=2, batch_size=batch_size)[0]
    assert (first.kind, first.verified) == ("reward", False)
    assert "teacher is absent" in first.cause and "reward set apart" in first.cause


@pytest.mark.parametrize(
    ("loss", "batch_size", "words"),
    [
        (lambda r: r.token_mean(k1(r)), 1, "tokens of the batch: rollouts get longer"),
        (lambda r: r.token_mean(k1(r)), 2, "tokens of the batch: rollouts get longer"),
        (lambda r: r.sequence_mean(k1(r)), 2, "tokens of the rollout: rollouts get longer"),
        (lambda r: -0.5 * r.token_mean(k1(r)), 1, "rollouts get shorter"),
    ],
)
def test_a_push_on_lengths_is_named(loss: Loss, batch_size: int, words: str) -> None:
    found = remainder(facts_of(loss, "reverse_kl", eos=0, batch_size=batch_size))
    assert found is not None and words in found.cause and "E[1/N]" in found.cause


def test_a_push_on_lengths_is_the_gradient_of_the_mean_of_one_over_n() -> None:
    """Against a derivative of the enumerated expectation."""
    student, teacher = opd.random_pair(3, 3, eos=0, seed=4)
    actual = torch.cat([g.flatten() for g in opd.expected_gradient(length_push("token_mean"), student, teacher)])
    logits = [level.clone().requires_grad_() for level in student.logits]
    everything = Enumeration.build(opd.TabularPolicy([level.detach() for level in logits], eos=0), teacher)
    live = everything.mask > 0
    rows = everything.gather_logits(logits).log_softmax(-1).gather(-1, everything.tokens.unsqueeze(-1)).squeeze(-1)
    probability = torch.where(live, rows, 0.0).sum(-1).exp()
    found = torch.autograd.grad((probability / live.sum(-1)).sum(), logits, materialize_grads=True, allow_unused=True)
    expected = torch.cat([g.flatten() for g in found])
    torch.testing.assert_close(actual, expected, rtol=0, atol=ENUMERATION)


def test_a_loss_that_never_sees_the_teacher_is_named() -> None:
    found = remainder(facts_of(negative_entropy, "reverse_kl"))
    assert found is not None and found.cause.startswith("The teacher does not enter the loss")


def test_nothing_is_named_where_the_teacher_counts() -> None:
    for loss in (zoo("opd", "jsd"), zoo("k3_loss"), zoo("k1_reward", reduction="token_mean")):
        assert remainder(facts_of(loss, "forward_kl", eos=0)) is None
