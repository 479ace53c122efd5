"""Scores and rollouts of a pair of models."""

from __future__ import annotations

import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import response_logits, rollouts
from opdtheory.training.models.samples import left_pad
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.models.vocabulary import CharacterVocabulary
from tests.tolerances import ALGEBRA
from tests.training.models.small import PROMPTS, VOCABULARY, conversation, generator, model


@torch.no_grad()
def test_log_probabilities_are_those_of_the_temperature_that_sampled():
    subject = model()
    samples = subject.sample(PROMPTS, max_new_tokens=6, generator=generator(), temperature=1.7)
    for temperature, equal in ((1.7, True), (1.0, False)):
        batch = rollouts(subject, subject, samples, temperature=temperature)
        gap = ((batch.student_logprobs - samples.logprobs) * samples.mask).abs().max()
        assert (float(gap) < ALGEBRA) == equal


@torch.no_grad()
def test_scores_are_the_log_probabilities_of_tokens_after_the_first():
    subject = model()
    tokens, mask = left_pad(PROMPTS, VOCABULARY.pad, dtype=torch.float64)
    scores = subject.score(tokens, mask)
    for row, prompt in enumerate(PROMPTS):
        logprobs = torch.log_softmax(subject.logits(torch.tensor([prompt]))[0], -1)
        expected = [0.0] + [float(logprobs[n, token]) for n, token in enumerate(prompt[1:])]
        padding = tokens.shape[1] - len(prompt)
        assert scores[row, :padding].abs().sum() == 0
        assert torch.allclose(scores[row, padding:], torch.tensor(expected, dtype=torch.float64), atol=ALGEBRA, rtol=0)


def test_rollouts_differentiate_the_student_alone():
    student, teacher = model(), model(seed=1)
    samples = student.sample(PROMPTS, max_new_tokens=6, generator=generator())
    batch = rollouts(student, teacher, samples)
    assert batch.student_logits.requires_grad and not batch.teacher_logits.requires_grad
    assert torch.equal(batch.behavior_logprobs, samples.logprobs) and torch.equal(batch.mask, samples.mask)
    exact = torch.log_softmax(response_logits(teacher, samples), -1).gather(-1, samples.tokens[..., None])[..., 0]
    assert torch.allclose(batch.teacher_logprobs, exact, atol=ALGEBRA, rtol=0)


def test_a_teacher_of_another_vocabulary_is_refused():
    other = Transformer(TransformerConfig(width=8, layers=1, heads=1), CharacterVocabulary("abdc[]"))
    samples = conversation()
    with pytest.raises(
        InvalidArgumentError, match=r"teacher: must have the student's vocabulary, of 7 tokens \(characters:"
    ):
        rollouts(model(), other, samples)
