"""Rows of samples."""

from __future__ import annotations

from tests.training.models.small import PROMPTS, VOCABULARY, Echo, conversation


def test_some_rows_keep_their_text():
    samples = conversation(Echo())
    short = samples.rows(samples.present.sum(-1) < 5)
    assert 0 < len(short) < len(samples) and short.tokens.shape[1] <= 4
    kept = [text for text, present in zip(samples.texts(VOCABULARY), samples.present, strict=True) if present.sum() < 5]
    assert short.texts(VOCABULARY) == kept
    assert samples.rows(slice(1, 2)).prompts.tolist() == [PROMPTS[1]]
