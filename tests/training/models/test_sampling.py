"""Samples: the distribution that they follow, and what they mark."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import LanguageModel, response_logits
from opdtheory.training.models.samples import Samples
from opdtheory.training.models.sampling import draw
from tests.tolerances import ALGEBRA
from tests.training.models.small import PROMPTS, VOCABULARY, Echo, conversation, generator, model


def two_token_distribution(subject: LanguageModel, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The probability of every response of at most two tokens."""
    size, eos = VOCABULARY.size, VOCABULARY.eos
    first = torch.softmax(subject.logits(torch.tensor([prompt]))[0, -1], -1)
    rows = torch.tensor([[*prompt, token] for token in range(size)])
    second = torch.softmax(subject.logits(rows)[:, -1], -1)
    distribution = {(eos, eos): float(first[eos])}
    for one in range(size):
        if one != eos:
            distribution |= {(one, other): float(first[one] * second[one, other]) for other in range(size)}
    return distribution


def distribution_p_value(temperature: float) -> float:
    """Of Pearson's chi-square of 20,000 samples at a temperature against the distribution at temperature 1."""
    subject, prompt, count = model(spread=8.0), PROMPTS[0], 20_000
    samples = subject.sample([prompt] * count, max_new_tokens=2, generator=generator(3), temperature=temperature)
    distribution = two_token_distribution(subject, prompt)
    assert math.isclose(sum(distribution.values()), 1, abs_tol=ALGEBRA)
    seen = dict.fromkeys(distribution, 0)
    for row in samples.tokens.tolist():
        seen[tuple(row)] += 1
    # Cells that hardly occur are put together, as the statistic's distribution needs.
    large = [cell for cell in distribution if distribution[cell] * count >= 10]
    observed = [seen[cell] for cell in large] + [count - sum(seen[cell] for cell in large)]
    expected = [distribution[cell] * count for cell in large]
    expected.append(count - sum(expected))
    assert len(large) > 15
    return float(stats.chisquare(observed, expected).pvalue)


@torch.no_grad()
def test_samples_follow_the_distribution():
    assert distribution_p_value(1.0) > 0.01


@torch.no_grad()
def test_samples_at_another_temperature_are_refused():
    assert distribution_p_value(1.15) < 1e-9


def test_a_draw_inverts_the_cumulative_probabilities():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64).log()
    points = torch.tensor([0.0, 0.19999, 0.20001, 0.69999, 0.70001, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(6, 5), points)
    # Tokens 1 and 4 have no probability; not even the largest number below one draws them.
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert torch.allclose(logprobs, logits[tokens], atol=ALGEBRA, rtol=0)


@torch.no_grad()
def test_a_rows_sample_does_not_depend_on_its_neighbours():
    subject = model()
    uniforms = torch.rand((4, 20), dtype=torch.float64, generator=generator(5))
    together = subject.sample(PROMPTS, max_new_tokens=20, uniforms=uniforms)
    for row, prompt in enumerate(PROMPTS):
        alone = subject.sample([prompt], max_new_tokens=20, uniforms=uniforms[row : row + 1])
        length = int(alone.present.sum())
        assert alone.tokens[0, :length].tolist() == together.tokens[row, : int(together.present[row].sum())].tolist()


@torch.no_grad()
def test_greedy_takes_the_likeliest_token():
    subject = model()
    samples = subject.sample(PROMPTS, max_new_tokens=9, greedy=True)
    likeliest = response_logits(subject, samples).argmax(-1)
    assert torch.equal(likeliest[samples.mask > 0], samples.tokens[samples.mask > 0])
    assert samples.logprobs.abs().max() == 0


def test_a_response_ends_with_eos_or_at_the_cap():
    samples = conversation()
    assert 0 < int(samples.ended.sum()) < len(samples)
    for tokens, mask, present, ended in zip(
        samples.tokens.tolist(), samples.mask.tolist(), samples.present.tolist(), samples.ended.tolist(), strict=True
    ):
        length = int(sum(present))
        assert present == [1.0] * length + [0.0] * (len(present) - length) and mask == present
        assert (VOCABULARY.eos in tokens[:length]) == ended
        assert tokens.index(VOCABULARY.eos) == length - 1 if ended else length == 16


def test_the_environments_tokens_are_history_without_a_loss():
    samples = conversation(Echo())
    replies = 0
    for text, tokens, mask in zip(
        samples.texts(VOCABULARY), samples.tokens.tolist(), samples.mask.tolist(), strict=True
    ):
        for place, character in enumerate(text):
            opened = "[" in text[:place]
            spoken = [mask[later] for later in range(place + 1, min(place + 3, len(tokens)))]
            if character == "]" and mask[place] and opened:
                assert "ab".startswith(text[place + 1 : place + 3]) and not any(spoken)
                replies += 1
    assert replies > 5
    foreign = (samples.present > 0) & (samples.mask == 0)
    assert samples.logprobs[foreign].abs().max() == 0
    subject, changed = model(), samples.tokens.clone()
    row, place = foreign[:, :-2].nonzero()[0].tolist()
    changed[row, place] = 4
    before, after = (
        response_logits(subject, Samples(**(samples.__dict__ | {"tokens": tokens})))[row, place + 1 :]
        for tokens in (samples.tokens, changed)
    )
    assert (before - after).abs().max() > 1e-4


def test_an_environment_nobody_calls_changes_nothing():
    class Silent(Echo):
        def reply(self, text):
            return None

    plain, silent = conversation(), conversation(Silent())
    assert torch.equal(plain.tokens, silent.tokens) and torch.equal(plain.mask, silent.mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: must be at least one prompt of at least one token, got none"),
        ({"prompts": [[1], []]}, "prompts: .* got an empty prompt, number 1 of 2"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 60}, "tokens: must be at most 48, the context, got 63"),
        ({"temperature": 0.0}, "temperature: must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, "temperature: must be positive and finite, got nan"),
        ({"generator": None}, "generator: must be given"),
        ({"uniforms": torch.rand(1, 4)}, "uniforms: must be float64 of shape .* got torch.float32 of"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change, message):
    arguments = {"prompts": [PROMPTS[0]], "max_new_tokens": 4, "generator": generator()} | change
    with pytest.raises(InvalidArgumentError, match=message):
        model().sample(arguments.pop("prompts"), **arguments)
