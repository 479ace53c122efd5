"""What a trainer is given: an exactly known student and teacher, their tokenizer, a dataset and a folder."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from opdtheory.end_to_end.language_model import TabularConfig, TabularForCausalLM
from opdtheory.end_to_end.tokenization import letters
from opdtheory.errors import InvalidArgumentError, check_integer

__all__ = ["TrainerPair", "no_progress", "trainer_pair"]

# Rows of the dataset: enough for a step of any trainer, and a multiple of most batches.
_ROWS = 48

# The logit of a padding token that is no end of sequence: neither model ever writes it.
_NEVER = -50.0

# Tokens beyond prompt and response that have rows, so that what a fault reads is seen for what it is.
_BEYOND = 1

# An answer of the teacher less likely than this is left out.
_FLOOR = 1e-15


class _Folder:
    """A temporary folder that goes with its last owner."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="opdtheory-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class TrainerPair:
    """A student and a teacher that are known exactly, and what a trainer needs beside them.

    Attributes:
        student: a `PreTrainedModel` whose next-token logits are a table of the prefix.
        teacher: another one.
        tokenizer: one letter a token, padding on the left.
        prompts: the prompts.
        answers: the reference answer beside each prompt, for trainers that read one.
        horizon: the largest length of a response; pass it on as `max_new_tokens` or `max_completion_length`.
        batch_size: rollouts that are scored at once.
        accumulate: such batches in one step of the optimizer.
        seed: seed of the tables.
        teacher_answers: whether the dataset holds the teacher's answers, for trainers that do not sample.
        folder: a temporary folder for what the trainer writes.
    """

    student: TabularForCausalLM
    teacher: TabularForCausalLM
    tokenizer: PreTrainedTokenizerFast
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    horizon: int
    batch_size: int
    accumulate: int
    seed: int
    teacher_answers: bool
    _kept: _Folder = field(repr=False)

    @property
    def folder(self) -> str:
        """The temporary folder; it is removed with the pair."""
        return self._kept.path

    @cached_property
    def dataset(self) -> Dataset:
        """Rows with `prompt`, `messages` and `completion`, the prompts in turn."""
        rows = []
        for prompt, answer in self._texts():
            asked = {"role": "user", "content": prompt}
            rows.append(
                {
                    "prompt": prompt,
                    "completion": answer,
                    "messages": [asked, {"role": "assistant", "content": answer}],
                }
            )
        return Dataset.from_list(rows)

    def _texts(self) -> list[tuple[str, str]]:
        """The prompt and the answer of each row."""
        if not self.teacher_answers:
            return [
                (self.prompts[n % len(self.prompts)], self.answers[n % len(self.answers)])
                for n in range(_ROWS * len(self.prompts))
            ]
        decode = self.tokenizer.decode
        return [(str(decode(prompt)), str(decode(answer[:-1]))) for _, step in self.given for prompt, answer in step]

    @cached_property
    def given(self) -> list[tuple[float, list[tuple[list[int], list[int]]]]]:
        """With the teacher's answers: all that a step may hold, with its probability, in the order of the dataset."""
        count, prompts = self.batch_size * self.accumulate, self.prompt_tokens
        # Steps repeat their prompts with a period that divides the number of prompts.
        period = len(prompts) // math.gcd(len(prompts), count)
        found = []
        for step in range(period):
            asked = [prompts[(step * count + n) % len(prompts)] for n in range(count)]
            for answers in itertools.product(*(self._answers_of_teacher(prompt) for prompt in asked)):
                chance = math.prod(each for each, _ in answers) / period
                found.append((chance, [(prompt, answer) for prompt, (_, answer) in zip(asked, answers, strict=True)]))
        return found

    def _answers_of_teacher(self, prompt: list[int]) -> list[tuple[float, list[int]]]:
        """Every answer of the teacher, up to and including the end of the sequence, with its probability."""
        model, end = self.teacher.model, self.tokenizer.eos_token_id
        found: list[tuple[float, list[int]]] = []
        begun: list[tuple[float, list[int]]] = [(1.0, [])]
        while begun:
            chance, answer = begun.pop()
            law = model.table.detach()[model.rows.row(prompt + answer)].double().softmax(-1).tolist()
            for token, share in enumerate(law):
                if share > _FLOOR:
                    (found if token == end else begun).append((chance * share, [*answer, token]))
        return found

    @property
    def prompt_tokens(self) -> list[list[int]]:
        """The tokens of each prompt."""
        return [self.tokenizer.encode(prompt, add_special_tokens=False) for prompt in self.prompts]

    @property
    def answer_tokens(self) -> list[list[int]]:
        """The tokens of each reference answer, with the end of the sequence."""
        end = [self.tokenizer.eos_token_id]
        return [self.tokenizer.encode(answer, add_special_tokens=False) + end for answer in self.answers]

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields of `TrainingArguments` that the audit is about; pass them to the trainer's configuration."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }


def trainer_pair(
    prompts: Sequence[str] = ("a", "ba"),
    horizon: int = 2,
    pad_is_eos: bool = False,
    seed: int = 0,
    *,
    batch_size: int = 2,
    accumulate: int = 1,
    answers: Sequence[str] = ("b", "b"),
    words: str = "ab",
    distance: float = 1.0,
    dtype: torch.dtype = torch.float64,
    teacher_answers: bool = False,
) -> TrainerPair:
    """An exactly known student and teacher for a trainer.

    Args:
        prompts: letters of `words`; prompts of unequal length make a trainer pad.
        horizon: the largest length of a response.
        pad_is_eos: whether padding and the end of a sequence are one token.
        seed: seed of the tables.
        batch_size: rollouts that are scored at once.
        accumulate: such batches in one step of the optimizer.
        answers: reference answers, one for each prompt, for trainers that read them.
        words: the letters, one token each.
        distance: standard deviation of the teacher's logits around the student's.
        dtype: of the tables.
        teacher_answers: whether the dataset holds every answer of the teacher, for trainers that do not sample; the
            teacher then always ends by the horizon.

    Raises:
        InvalidArgumentError: a prompt or an answer is empty or holds another letter, or a number is out of range.

    Example:
        >>> import opdtheory as opd
        >>> pair = opd.trainer_pair(prompts=("a", "ba"), horizon=2)
        >>> pair.student.policy(pair.prompt_tokens[0], pair.horizon).horizon
        2
    """
    for name, number in (("horizon", horizon), ("batch_size", batch_size), ("accumulate", accumulate)):
        check_integer(name, number, 1)
    tokenizer = letters(words, pad_is_eos=pad_is_eos)
    for name, texts in (("prompts", prompts), ("answers", answers)):
        if isinstance(texts, str) or not texts:
            raise InvalidArgumentError(name, f"must be a sequence of texts, got {texts!r}")
        for text in texts:
            if not text or set(text) - set(words):
                raise InvalidArgumentError(name, f"must hold letters of {words!r}, got {text!r}")
    kept = _Folder()
    longest = max(map(len, prompts)) + max(horizon, *(len(answer) + 1 for answer in answers)) + _BEYOND
    student, teacher = _models(tokenizer, longest, distance, seed, dtype)
    if teacher_answers:
        _end_by(horizon, teacher, [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts])
    # A trainer that keeps a reference model loads it from the student's path: the teacher takes its place.
    saved = Path(kept.path) / "teacher"
    with no_progress():
        teacher.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    for model in (student, teacher):
        model.config._name_or_path = model.name_or_path = str(saved)
    # Trainers look its class up among those of transformers, a module that others replace while they are imported.
    setattr(sys.modules["transformers"], TabularForCausalLM.__name__, TabularForCausalLM)
    texts_of = (tuple(prompts), tuple(answers))
    return TrainerPair(
        student, teacher, tokenizer, *texts_of, horizon, batch_size, accumulate, seed, teacher_answers, kept
    )


def _end_by(horizon: int, teacher: TabularForCausalLM, prompts: list[list[int]]) -> None:
    """Let the teacher end every answer by the horizon, so that a dataset can hold all of them."""
    with torch.no_grad():
        for prompt in prompts:
            rows = teacher.model.table[teacher.model.rows.after(prompt, horizon - 1)]
            rows[:, teacher.config.eos_token_id] = -_NEVER


@contextlib.contextmanager
def no_progress() -> Iterator[None]:
    """Without the progress bars of transformers and datasets: a table needs none."""
    switches = (
        (
            transformers_logging.is_progress_bar_enabled,
            transformers_logging.disable_progress_bar,
            transformers_logging.enable_progress_bar,
        ),
        (datasets.are_progress_bars_disabled, datasets.disable_progress_bars, datasets.enable_progress_bars),
    )
    shown = [switches[0][0](), not switches[1][0]()]
    for _, off, _ in switches:
        off()
    try:
        yield
    finally:
        for was, (_, _, on) in zip(shown, switches, strict=True):
            if was:
                on()


def _models(
    tokenizer: PreTrainedTokenizerFast, longest: int, distance: float, seed: int, dtype: torch.dtype
) -> tuple[TabularForCausalLM, TabularForCausalLM]:
    """Random tables; those of a longer table begin with those of a shorter one."""
    vocabulary, made = len(tokenizer), []
    generator = torch.Generator().manual_seed(seed)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": vocabulary,
        "longest": longest,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    models = [TabularForCausalLM(TabularConfig(**config)) for _ in range(2)]
    noise = torch.randn(models[0].model.rows.count, 2, vocabulary, generator=generator, dtype=torch.float64)
    for number, model in enumerate(models):
        torch.nn.Module.to(model, dtype)
        logits = noise[:, 0] + number * distance * noise[:, 1]
        if tokenizer.pad_token_id != tokenizer.eos_token_id:
            logits[:, tokenizer.pad_token_id] = _NEVER
        with torch.no_grad():
            model.model.table.copy_(logits)
        model.config.architectures = [type(model).__name__]
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        made.append(model.eval())
    made[1].requires_grad_(False)
    return made[0], made[1]
