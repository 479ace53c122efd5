"""Temperatures found from outside, on one side or both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.temperatures import heated, temperatures
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import cure, facts_of, zoo
from tests.sparse import some


def softened(divergence: str, student: float, teacher: float, factor: float = 1.0) -> Loss:
    def loss(r: Rollouts) -> Tensor:
        log_p = (r.student_logits / student).log_softmax(-1)
        log_u = (r.teacher_logits / teacher).log_softmax(-1) - log_p
        return factor * r.token_sum((log_p.exp() * opd.divergence(divergence).generator(log_u)).sum(-1))

    return loss


@pytest.mark.parametrize(
    ("divergence", "student", "teacher", "factor", "words"),
    some(
        [
            ("forward_kl", 2.0, 2.0, 1.0, "softmax(logits / 2), times 0.5"),
            ("forward_kl", 3.0, 3.0, 9.0, "softmax(logits / 3), times 3"),
            ("jsd", 1.5, 1.5, 1.0, "softmax(logits / 1.5), times 0.666667"),
            ("reverse_kl", 1.0, 1.7, 1.0, "The teacher alone is softened by a temperature of 1.7"),
            ("forward_kl", 0.5, 1.0, 1.0, "The student alone is softened by a temperature of 0.5"),
            ("hellinger", 1.5, 2.5, 1.0, "The student is softened by a temperature of 1.5 and the teacher by 2.5"),
        ]
    ),
)
def test_temperatures_are_named(divergence: str, student: float, teacher: float, factor: float, words: str) -> None:
    first = cure(softened(divergence, student, teacher, factor), divergence, pairs=2)[0]
    assert (first.kind, first.verdict, first.verified) == ("temperature", "exact", True)
    assert words in first.cause
    assert ("drop the factor" in first.text) == (factor != 1.0)


def test_a_sampled_teacher_at_a_temperature_is_named() -> None:
    def loss(r: Rollouts) -> Tensor:
        log_q = (r.teacher_logits / 2).log_softmax(-1).gather(-1, r.tokens.unsqueeze(-1)).squeeze(-1)
        return r.token_sum(-(log_q - r.student_logprobs).detach() * r.student_logprobs)

    assert "teacher alone" in cure(loss, "reverse_kl", pairs=2)[0].cause


def test_what_a_temperature_hides_is_found_too_and_nothing_is_said_to_be_followed() -> None:
    def loss(r: Rollouts) -> Tensor:
        log_p, log_q = ((x / 2).log_softmax(-1) for x in (r.student_logits, r.teacher_logits))
        return r.token_mean((log_q.exp() * (log_q - log_p)).sum(-1))

    first = cure(loss, "forward_kl", pairs=2, eos=0)[0]
    assert first.kind == "temperature, reduction" and first.verified
    assert "softened by a temperature of 2" in first.cause and "follows" not in first.cause


def test_no_temperature_is_found_where_there_is_none() -> None:
    for loss in (
        zoo("full_vocab", "jsd"),
        zoo("opd", "jsd"),
        zoo("power", alpha=0.5),
        zoo("topk_truncated", "jsd", k=2),
    ):
        assert list(temperatures(facts_of(loss, "jsd"))) == []


def test_heat_undoes_a_division() -> None:
    r = Rollouts.from_logits(
        torch.tensor([[1, 0]]), torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    )
    torch.testing.assert_close(heated(softened("jsd", 2.0, 3.0), 2.0, 3.0)(r), softened("jsd", 1.0, 1.0)(r))
