"""A remembered loss is the loss: the same value, the same gradient under whatever is done to it, fewer calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes import changes
from opdtheory.auditing.remembered import Remembered, content
from opdtheory.exact import Enumeration, Loss, gradient_moments, random_pair
from opdtheory.rollouts import Rollouts
from tests.tolerances import ALGEBRA


def linear_logits(r: Rollouts) -> Tensor:
    return r.token_sum((r.student_logits * r.teacher_logits).mean(-1) + r.log_u.square())


LOSSES: dict[str, Loss] = {
    "log-probabilities": opd.estimator("opd", "jsd"),
    "logits": opd.estimator("full_vocab", "forward_kl"),
    "both": linear_logits,
    "batch": opd.estimator("opd_plus", "jsd", baseline="leave_one_out"),
}
CHANGES = {
    "none": lambda loss: loss,
    "scaled": lambda loss: changes.scaled(loss, -2.5),
    "weighted": lambda loss: changes.weighted_tokens(loss, changes.rollout_lengths),
    "added": lambda loss: changes.advantage_added(loss, lambda r: r.log_u),
    "padding": changes.padding_hidden,
    "averaged": changes.averaged_over_rollouts,
}


def pair() -> tuple[opd.TabularPolicy, opd.TabularPolicy]:
    return random_pair(2, 2, eos=0, seed=3)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_expected_gradients_are_those_of_the_loss(name: str, change: str) -> None:
    size = 2 if name == "batch" else 1
    loss, remembered = LOSSES[name], Remembered(LOSSES[name])
    expected = gradient_moments(CHANGES[change](loss), *pair(), size)
    for _ in range(2):
        found = gradient_moments(CHANGES[change](remembered), *pair(), size)
        for a, b in zip(found.mean, expected.mean, strict=True):
            torch.testing.assert_close(a, b, rtol=ALGEBRA, atol=ALGEBRA)
        assert found.second_moment == pytest.approx(expected.second_moment, rel=ALGEBRA)
    other = gradient_moments(CHANGES[change](Remembered(lambda r: -loss(r))), *pair(), size)
    assert not torch.allclose(other.mean[0], expected.mean[0])


def test_every_batch_is_met_once() -> None:
    calls: list[int] = []

    def counted(r: Rollouts) -> Tensor:
        calls.append(len(r.tokens))
        return r.token_sum(r.log_u.square())

    remembered = Remembered(counted)
    gradient_moments(remembered, *pair(), thorough=False)
    once = len(calls)
    gradient_moments(changes.scaled(remembered, 2.0), *pair(), thorough=False)
    assert len(calls) == once > 0
    gradient_moments(changes.on_policy_view(remembered), *random_pair(2, 2, eos=0, seed=4))
    assert len(calls) > once


def test_what_a_loss_reads_tells_batches_apart() -> None:
    everything = Enumeration.build(*pair())
    batch = everything.rollouts(torch.tensor([0, 1]))
    swapped = replace(batch, teacher_logprobs=batch.behavior_logprobs, behavior_logprobs=batch.teacher_logprobs)
    assert content(vars(batch)) != content(vars(swapped))
    # The order in which fields were given is no difference.
    assert content(vars(batch)) == content(dict(reversed(vars(batch).items())))
    narrow = {name: x.float() if x.is_floating_point() else x for name, x in vars(batch).items()}
    assert content(narrow) != content(vars(batch))


def test_a_loss_without_a_gradient_stays_without() -> None:
    batch = Enumeration.build(*pair()).rollouts(torch.tensor([0, 1]))
    logits = batch.student_logits.detach().requires_grad_()
    recorded = replace(batch, student_logits=logits)
    assert not Remembered(lambda r: r.teacher_logprobs.sum())(recorded).requires_grad
    value = Remembered(lambda r: r.student_logits.sum())(recorded)
    assert torch.equal(torch.autograd.grad(value, logits)[0], torch.ones_like(logits))
