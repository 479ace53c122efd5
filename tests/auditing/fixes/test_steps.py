"""Logits and tokens out of step by one, in losses that shift and in losses that get rows aligned with their tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.steps import moved
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import cure, zoo
from tests.sparse import some


def kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def summed(values: Tensor, labels: Tensor) -> Tensor:
    return (values * (labels != -100)).sum() / len(labels)


def unshifted(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return summed(kl(student, teacher), labels)


def unshifted_tokens(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = (
        x.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1) for x in (student, teacher)
    )
    return summed((log_q - log_p).square() / 2, labels)


def teacher_ahead(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return summed(kl(student[:, :-1], teacher[:, 1:]), labels[:, 1:])


def student_ahead(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return summed(kl(student[:, 1:], teacher[:, :-1]), labels[:, 1:])


def shifted(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return summed(kl(student[:, :-1], teacher[:, :-1]), labels[:, 1:])


def shifted_again(r: Rollouts) -> Tensor:
    return (kl(r.student_logits[:, :-1], r.teacher_logits[:, :-1]) * r.mask[:, 1:]).sum() / len(r.mask)


def teacher_late(r: Rollouts) -> Tensor:
    return (kl(r.student_logits[:, 1:], r.teacher_logits[:, :-1]) * r.mask[:, 1:]).sum() / len(r.mask)


def teacher_rolled(r: Rollouts) -> Tensor:
    return r.token_sum(kl(r.student_logits, r.teacher_logits.roll(-1, 1)))


def logprobs_late(r: Rollouts) -> Tensor:
    reward = (r.teacher_logprobs[:, :-1] - r.student_logprobs[:, 1:]).detach()
    return -(reward * r.student_logprobs[:, 1:] * r.mask[:, 1:]).sum() / len(r.mask)


def given(f: Loss) -> Loss:
    return opd.from_logits(f, shifted=True)


CASES: dict[str, tuple[Loss, str, str]] = {
    "unshifted": (
        given(unshifted),
        "forward_kl",
        "Logits and labels are out of step: the loss scores each token with ",
    ),
    "unshifted tokens": (given(unshifted_tokens), "reverse_kl", "the row after its own"),
    "teacher ahead": (given(teacher_ahead), "forward_kl", "The teacher is out of step"),
    "student ahead": (given(student_ahead), "forward_kl", "The student is out of step"),
    "shifted again": (shifted_again, "forward_kl", "the row before its own"),
    "teacher late": (
        teacher_late,
        "forward_kl",
        "The teacher is out of step: each token meets the teacher's row before",
    ),
    "teacher rolled": (teacher_rolled, "forward_kl", "the teacher's row after its own"),
    "log-probabilities late": (logprobs_late, "reverse_kl", "The teacher is out of step"),
}


@pytest.mark.parametrize("eos", some([None, 0]))
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_named(case: str, eos: int | None) -> None:
    loss, objective, words = CASES[case]
    first = cure(loss, objective, pairs=2, eos=eos)[0]
    assert (first.kind, first.verified) == ("shift", True)
    assert words in first.cause


def test_a_loss_in_step_is_left_alone() -> None:
    assert cure(given(shifted), "forward_kl", pairs=2) == []
    assert all(remedy.kind != "shift" for remedy in cure(zoo("opd", "jsd"), "jsd", pairs=2, eos=0))


def test_moving_by_nothing_changes_nothing_but_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    r = Rollouts.from_logits(torch.tensor([[0, 1, 2], [3, 2, 1]]), student, teacher)
    loss = zoo("full_vocab", "jsd")
    torch.testing.assert_close(moved(loss, 0, 0)(r), loss(r))
    assert float((moved(loss, 0, 1)(r) - loss(r)).abs()) > 1e-3
