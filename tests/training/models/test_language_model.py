"""Language models of the trainer: masks, cache, scores, and the distribution that samples follow."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import LanguageModel, response_logits, rollouts
from opdtheory.training.models.samples import Samples, left_pad
from opdtheory.training.models.sampling import draw
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.models.variants import drop_layer, perturb
from opdtheory.training.models.vocabulary import CharacterVocabulary
from tests.tolerances import ALGEBRA

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


class LeakyMask(Transformer):
    """Reads padding as if it were text."""

    def _layout(self, tokens, mask):
        positions, _ = super()._layout(tokens, mask)
        return positions, super()._layout(tokens, None)[1]


class ShiftedByPadding(Transformer):
    """Counts padding in a token's position."""

    def _layout(self, tokens, mask):
        return torch.arange(tokens.shape[1]).expand_as(tokens), super()._layout(tokens, mask)[1]


class StaleCache(Transformer):
    """Decodes every token at the position of the first."""

    def decode(self, tokens, cache):
        logits = super().decode(tokens, cache)
        cache.positions = cache.positions - 1
        return logits


class MixedRows(Transformer):
    """Reads the next token into the cache of another row."""

    def decode(self, tokens, cache):
        return super().decode(tokens.roll(1), cache)


# --- masks ---------------------------------------------------------------------------------------------------


def padding_error(subject: LanguageModel) -> float:
    """How far padding, of ids that are real tokens, moves a row's logits."""
    row = torch.tensor([VOCABULARY.encode("abdca")])
    bare = subject.logits(row)
    worst = 0.0
    for left, right in ((3, 0), (0, 3), (2, 2)):
        filler = torch.tensor([[2] * left]), torch.tensor([[5] * right], dtype=torch.int64)
        tokens = torch.cat((filler[0].long(), row, filler[1]), dim=1)
        mask = torch.tensor([[0.0] * left + [1.0] * 5 + [0.0] * right])
        padded = subject.logits(tokens, mask)
        assert torch.isfinite(padded).all()
        worst = max(worst, float((padded[:, left : left + 5] - bare).abs().max()))
    return worst


@torch.no_grad()
def test_padding_changes_no_logits():
    assert padding_error(model()) < ALGEBRA


@torch.no_grad()
@pytest.mark.parametrize("kind", [LeakyMask, ShiftedByPadding])
def test_a_model_that_reads_padding_is_refused(kind):
    assert padding_error(model(kind=kind)) > 1e-3


@torch.no_grad()
def test_logits_see_no_later_token():
    subject = model()
    row = torch.tensor([VOCABULARY.encode("abdca")])
    changed = row.clone()
    changed[0, 3] = 1
    difference = (subject.logits(row) - subject.logits(changed)).abs().amax(-1)[0]
    assert difference[:3].max() == 0 and difference[3:].min() > 1e-6


@torch.no_grad()
def test_rows_can_be_left_out_and_forward_is_logits():
    subject, row = model(), torch.tensor([VOCABULARY.encode("abdca")])
    assert torch.allclose(subject.logits(row)[:, 3:], subject.logits(row, since=3), atol=ALGEBRA, rtol=0)
    assert torch.equal(subject(row), subject.logits(row))


# --- cache ---------------------------------------------------------------------------------------------------


def cache_error(subject: LanguageModel, environment: Echo | None = None) -> float:
    """How far the log-probabilities of the cached loop are from those of one pass over the finished text."""
    samples = subject.sample(PROMPTS * 8, max_new_tokens=20, generator=generator(), environment=environment)
    assert 0 < int(samples.ended.sum()) < len(samples) and samples.present.sum(-1).unique().numel() > 3
    logprobs = torch.log_softmax(response_logits(subject, samples), -1)
    logprobs = logprobs.gather(-1, samples.tokens[..., None]).squeeze(-1)
    return float(((logprobs - samples.logprobs) * samples.mask).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("environment", [None, Echo()])
def test_cached_and_uncached_logits_are_equal(environment):
    assert cache_error(model(), environment) < ALGEBRA


@torch.no_grad()
@pytest.mark.parametrize("kind", [StaleCache, MixedRows])
def test_a_wrong_cache_is_refused(kind):
    assert cache_error(model(kind=kind)) > 1e-3


# --- the distribution that samples --------------------------------------------------------------------------------------


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


@torch.no_grad()
def test_log_probabilities_are_those_of_the_temperature_that_sampled():
    subject = model()
    samples = subject.sample(PROMPTS, max_new_tokens=6, generator=generator(), temperature=1.7)
    for temperature, equal in ((1.7, True), (1.0, False)):
        batch = rollouts(subject, subject, samples, temperature=temperature)
        gap = ((batch.student_logprobs - samples.logprobs) * samples.mask).abs().max()
        assert (float(gap) < ALGEBRA) == equal


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


# --- what a sample marks ---------------------------------------------------------------------------------------


@torch.no_grad()
def conversation(environment: Echo | None = None) -> Samples:
    return model().sample(PROMPTS * 16, max_new_tokens=16, generator=generator(1), environment=environment)


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


def test_some_rows_keep_their_text():
    samples = conversation(Echo())
    short = samples.rows(samples.present.sum(-1) < 5)
    assert 0 < len(short) < len(samples) and short.tokens.shape[1] <= 4
    kept = [text for text, present in zip(samples.texts(VOCABULARY), samples.present, strict=True) if present.sum() < 5]
    assert short.texts(VOCABULARY) == kept
    assert samples.rows(slice(1, 2)).prompts.tolist() == [PROMPTS[1]]


# --- scores ----------------------------------------------------------------------------------------------------


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
    with pytest.raises(InvalidArgumentError, match=r"teacher: has a vocabulary of 7 tokens \(characters:"):
        rollouts(model(), other, samples)


# --- construction and refusals ---------------------------------------------------------------------------------


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, other, different = model(seed=4), model(seed=4), model(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.head.weight, different.head.weight)


@torch.no_grad()
def test_copies_leave_the_model_as_it_was():
    subject, row = model(), torch.tensor([PROMPTS[3]])
    before = subject.logits(row).clone()
    noisy, shorter = perturb(subject, 0.1, seed=2), drop_layer(subject, 0)
    assert torch.equal(subject.logits(row), before)
    assert torch.equal(perturb(subject, 0.0).logits(row), before)
    assert (noisy.logits(row) - before).abs().max() > 1e-2 and noisy.vocabulary is subject.vocabulary
    spread = (noisy.blocks[0].up.weight - subject.blocks[0].up.weight).std() / subject.blocks[0].up.weight.std()
    assert 0.09 < float(spread) < 0.11
    assert len(shorter.blocks) == shorter.config.layers == 1
    assert cache_error(shorter) < ALGEBRA
    kept = subject.blocks[1].up.weight
    assert torch.equal(shorter.blocks[0].up.weight, kept) and shorter.blocks[0].up.weight is not kept
    with pytest.raises(InvalidArgumentError, match="index: is 2; the model has 2 blocks"):
        drop_layer(subject, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: there is none"),
        ({"prompts": [[1], []]}, "prompts: number 1 of 2 is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens: is 0"),
        ({"max_new_tokens": 60}, "tokens: need 63 positions"),
        ({"temperature": 0.0}, "temperature: is 0.0"),
        ({"temperature": math.nan}, "temperature: is nan"),
        ({"generator": None}, "generator: is None"),
        ({"uniforms": torch.rand(1, 4)}, "uniforms: is .* float64 of shape"),
    ],
)
def test_what_cannot_be_sampled_is_refused(change, message):
    arguments = {"prompts": [PROMPTS[0]], "max_new_tokens": 4, "generator": generator()} | change
    with pytest.raises(InvalidArgumentError, match=message):
        model().sample(arguments.pop("prompts"), **arguments)


def test_a_text_beyond_the_context_is_refused():
    with pytest.raises(
        InvalidArgumentError, match="need 49 positions, prompt and response together; the context is 48"
    ):
        model().logits(torch.ones((1, 49), dtype=torch.int64))


def test_sizes_are_checked():
    with pytest.raises(InvalidArgumentError, match="heads: is 3, which does not divide the width 16"):
        TransformerConfig(width=16, heads=3)
    with pytest.raises(InvalidArgumentError, match="layers: is 0"):
        TransformerConfig(layers=0)


def test_a_vocabulary_spells_what_it_has():
    assert VOCABULARY.decode(VOCABULARY.encode("dcba[]")) == "dcba[]"
    assert VOCABULARY.containing("]x") == {6}
    assert VOCABULARY.fingerprint == CharacterVocabulary("abcd[]").fingerprint
    assert VOCABULARY.fingerprint != CharacterVocabulary("abcd][").fingerprint
    with pytest.raises(InvalidArgumentError, match="text: 'ax' holds 'x'"):
        VOCABULARY.encode("ax")
    with pytest.raises(InvalidArgumentError, match="tokens: hold 7"):
        VOCABULARY.decode([7])
    with pytest.raises(InvalidArgumentError, match="holds 'a' more than once"):
        CharacterVocabulary("aba")
    with pytest.raises(InvalidArgumentError, match="at least one character"):
        CharacterVocabulary("")
