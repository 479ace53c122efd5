"""Small transformers in float64, and what is measured of them, shared by the tests of the models."""

from __future__ import annotations

import torch

from opdtheory.training.models.language_model import LanguageModel, response_logits
from opdtheory.training.models.samples import Samples
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.models.vocabulary import CharacterVocabulary

VOCABULARY = CharacterVocabulary("abcd[]")
PROMPTS = [VOCABULARY.encode(text) for text in ("abc", "d", "ba", "cdabd")]


def model(*, seed: int = 0, spread: float = 12.0, kind: type[Transformer] = Transformer) -> Transformer:
    """A transformer in float64 whose distribution is far from uniform."""
    built = kind(TransformerConfig(width=16, layers=2, heads=2, context=48), VOCABULARY, seed=seed).double()
    with torch.no_grad():
        built.head.weight *= spread
    return built


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Echo:
    """Answers a closed bracket with `ab`."""

    closers = "]"

    def reply(self, text: str) -> str | None:
        return "ab" if "[" in text else None


def cache_error(subject: LanguageModel, environment: Echo | None = None) -> float:
    """How far the log-probabilities of the cached loop are from those of one pass over the finished text."""
    samples = subject.sample(PROMPTS * 8, max_new_tokens=20, generator=generator(), environment=environment)
    assert 0 < int(samples.ended.sum()) < len(samples) and samples.present.sum(-1).unique().numel() > 3
    logprobs = torch.log_softmax(response_logits(subject, samples), -1)
    logprobs = logprobs.gather(-1, samples.tokens[..., None]).squeeze(-1)
    return float(((logprobs - samples.logprobs) * samples.mask).abs().max())


@torch.no_grad()
def conversation(environment: Echo | None = None) -> Samples:
    return model().sample(PROMPTS * 16, max_new_tokens=16, generator=generator(1), environment=environment)
