"""Tiny students, teachers and samplers in float64 for the tests of the validation."""

from __future__ import annotations

import torch

import opdtheory as opd
from opdtheory.training import CharacterVocabulary, Transformer, TransformerConfig

DIGITS = CharacterVocabulary("01234+=")
LETTERS = CharacterVocabulary("ab")
PROMPTS = [DIGITS.encode(text) for text in ("1+2=", "3+", "40+1=")]
E = opd.estimator


def transformer(seed: int, vocabulary: CharacterVocabulary = DIGITS) -> Transformer:
    """An untrained model with wider logits."""
    built = Transformer(TransformerConfig(8, 1, 2, 16), vocabulary, seed=seed).double()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        built.head.weight += 0.4 * torch.randn(built.head.weight.shape, generator=noise, dtype=torch.float64)
    return built


STUDENT, TEACHER, STALE = (transformer(seed) for seed in range(3))
