"""The batch of one step: its prompts and random numbers depend only on the seed, the step and the prompt's index."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.config import TrainConfig
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.samples import Samples, left_pad
from opdtheory.training.tasks import Example, Task

__all__ = ["demonstrate", "parts", "respond", "seed_of", "step_examples", "uniforms"]


def seed_of(*parts: object) -> int:
    """A seed for one purpose, the same in every process and every version of Python.

    Example:
        >>> seed_of(0, "sample", 3, 1) == seed_of(0, "sample", 3, 1) != seed_of(0, "sample", 31)
        True
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_examples(task: Task, config: TrainConfig, step: int) -> list[Example]:
    """The problems of a step's global batch."""
    return task.examples("train", config.prompts_per_step, seed_of(config.seed, "prompts", step))


def uniforms(seed: int, step: int | str, prompts: Sequence[int], each: int, length: int) -> Float[Tensor, "B T"]:
    """Numbers in [0, 1) for `sample`, `each` rows for every prompt of these global indices.

    Each prompt has its own generator, so a response is independent of the process and the batch that sample it.
    """
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed_of(seed, "sample", step, prompt))
        rows.append(torch.rand(each, length, dtype=torch.float64, generator=generator))
    return torch.cat(rows)


@torch.no_grad()
def respond(
    student: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    config: TrainConfig,
    draws: Tensor | None,
    temperature: float | None = None,
) -> Samples:
    """One response of the student to each example, sampled with the given uniforms, or greedy if they are None.

    The temperature is that of the scores by default: `config.temperature`.
    """
    temperature = config.temperature if temperature is None else temperature
    return student.sample(
        task_prompts(student, examples),
        max_new_tokens=longest(task, config),
        uniforms=draws,
        temperature=temperature if draws is not None else 1.0,
        greedy=draws is None,
        environment=task.environment,
    )


def demonstrate(
    student: LanguageModel, task: Task, examples: Sequence[Example], seed: int, step: int, first: int
) -> Samples:
    """The task's own demonstrations in place of responses; `first` is the global index of the first example."""
    vocabulary, device, dtype = student.vocabulary, student.device, student.dtype
    tokens, marks = [], []
    for number, example in enumerate(examples, start=first):
        rng = random.Random(seed_of(seed, "demonstration", step, number))
        row, own = task.spelled(example, rng, vocabulary)
        tokens.append(torch.tensor(row, device=device))
        marks.append(torch.tensor(own, dtype=dtype, device=device))
    prompts, prompt_mask = left_pad(task_prompts(student, examples), vocabulary.pad, device=device, dtype=dtype)
    mask = pad_sequence(marks, True)
    return Samples(
        prompts=prompts,
        prompt_mask=prompt_mask,
        tokens=pad_sequence(tokens, True, vocabulary.pad),
        mask=mask,
        present=pad_sequence([torch.ones_like(row) for row in marks], True),
        logprobs=torch.zeros_like(mask),
        ended=torch.ones(len(tokens), dtype=torch.bool, device=device),
    )


def parts(samples: Samples, size: int | None) -> Iterator[Samples]:
    """The rows in consecutive parts of `size`, each without padding that it does not need."""
    size = len(samples) if size is None else size
    for start in range(0, len(samples), size):
        yield samples.rows(slice(start, start + size))


def longest(task: Task, config: TrainConfig) -> int:
    """The largest length of a response, in tokens."""
    return task.max_response if config.max_new_tokens is None else config.max_new_tokens


def task_prompts(model: LanguageModel, examples: Sequence[Example]) -> list[list[int]]:
    """The prompts in the model's own tokens.

    Raises:
        InvalidArgumentError: the model's vocabulary cannot encode a prompt.
    """
    prompts = []
    for example in examples:
        try:
            prompts.append(model.vocabulary.encode(example.prompt))
        except InvalidArgumentError as error:
            raise InvalidArgumentError("task", f"must have prompts in the student's vocabulary; {error}") from None
    return prompts
