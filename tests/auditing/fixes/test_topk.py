"""Losses of the k likeliest tokens recognised from outside."""

from __future__ import annotations

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.topk import TopKForm, recognise
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import times, zoo
from tests.sparse import some


@pytest.mark.parametrize("form", ["topk_truncated", "topk_renormalised", "topk_tail"])
def test_recognises_the_form_of_a_top_k_loss(form: str) -> None:
    divergence = opd.divergence("hellinger")
    expected = TopKForm(form, 2, "student")
    assert recognise(times(2.0, zoo(form, divergence, k=2, support="student")), divergence) == expected
    assert recognise(zoo("full_vocab", "jsd"), divergence) is None
    assert recognise(zoo("opd_plus", divergence), divergence) is None


def top_10(r: Rollouts) -> Tensor:
    ids, log_q = r.teacher_top_k(min(10, r.teacher_logits.shape[-1]))
    log_p = r.student_at(ids)
    return r.token_sum((log_p.exp() * (log_p - log_q)).sum(-1))


def renormalised_6(student_logits: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor) -> Tensor:
    log_p, log_q = student_logits.log_softmax(-1).gather(-1, ids).log_softmax(-1), logprobs.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize(
    ("loss", "k", "words"),
    some(
        [
            (top_10, 10, "truncated, so that it is not at rest at the teacher"),
            (opd.from_top_k(renormalised_6, 6), 6, "conditional distribution on them, whatever the mass of the others"),
            (zoo("topk_renormalised", "reverse_kl", k=2), 2, "conditional distribution on them"),
            (zoo("topk_truncated", "reverse_kl", k=5, support="student"), 5, "truncated"),
        ],
        2,
    ),
)
def test_a_top_k_loss_is_named_with_where_it_is_at_rest(loss: Loss, k: int, words: str) -> None:
    """Also where the panel has no more tokens than k, so that it shows the whole vocabulary."""
    named = next(remedy for remedy in opd.audit(loss, "reverse_kl").remedies if remedy.cause)
    assert named.kind == "vocabulary" and named.verified
    assert f"{k} likeliest tokens only" in named.cause and words in named.cause


def test_a_clamp_is_no_top_k() -> None:
    def clamped(r: Rollouts) -> Tensor:
        log_p, log_q = r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)
        return r.token_sum((log_q.exp() * (log_q - log_p)).clamp(max=0.05).sum(-1))

    assert recognise(clamped, opd.divergence("forward_kl")) is None
