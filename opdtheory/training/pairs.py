"""Teachers and under-trained students from demonstrations: trained from a seed, cached, with a checksum.

`python -m opdtheory.training.pairs --task arithmetic` trains the models that the cache lacks and prints their records.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from opdtheory.errors import InvalidArgumentError, TrainingError
from opdtheory.training.batches import task_prompts
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.storage import cache_folder, load_tensors, save_tensors, stored
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.models.vocabulary import Vocabulary
from opdtheory.training.tasks import TASKS, Split, Task
from opdtheory.training.tasks import task as task_named

__all__ = ["Recipe", "accuracy", "load_model", "load_pair", "recipe_for", "train_supervised"]

Role = Literal["teacher", "student"]
Report = Callable[[int, float], None]

# Incremented when the same recipe would give other weights: a new initialisation, loss or order of the examples.
_FORMAT = 1

# Test problems by which the record of a model tells its accuracy.
_SCORED = 512

_TEACHER_STEPS = {"arithmetic": 1200, "tools": 1500, "modular": 4000}
_STUDENT_STEPS = {"arithmetic": 700, "tools": 500, "modular": 700}

# Students that start alike: the most steps, the steps between looks, and the held-out problems of a look, with the
# distance from the target that they allow: few at first, so that most looks are short. The problems are of the train
# split, in an order that no model reads.
_MOST_STEPS, _LOOK_EVERY, _HELD_OUT_SEED = 3000, 10, 987_654_321
_LOOKS = ((256, 0.08), (2048, 0.02))


@dataclass(frozen=True)
class Recipe:
    """All that a model's weights depend on, apart from the rounding of the machine.

    Attributes:
        task: name of the task.
        role: teacher or student; with one seed, they read different examples.
        seed: seed of the initial weights and of the examples.
        width, layers, heads: size of the model.
        steps: optimiser steps, each on new examples.
        batch_size: examples per step.
        learning_rate: peak learning rate of AdamW, after `warmup` steps; it then falls linearly to a tenth.
        warmup: steps of linear warm-up.
        target: training ends as soon as the share of right sampled answers on held-out problems is within .02 of this;
            if it passes by, at twice the target, the nearest of what was looked at is taken. None takes all steps.
        base: `smollm2` to train SmolLM2-135M-Instruct further, without its middle layers if `layers` is smaller than
            its own number; None for a new model.
    """

    task: str
    role: Role
    seed: int
    width: int
    layers: int
    heads: int
    steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 50
    target: float | None = None
    base: str | None = None

    @property
    def key(self) -> str:
        """The name of the cached file, with a digest of the recipe and of the code's format."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        text = json.dumps([_FORMAT, values], sort_keys=True)
        return f"{self.task}-{self.role}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


# While a model is made that the cache lacks.
Making = Callable[[Recipe, Path], contextlib.AbstractContextManager[Report]]


def recipe_for(task: str, role: Role, seed: int = 0, target: float | None = None) -> Recipe:
    """The recipe of the repository's experiments.

    Args:
        task: name of the task.
        role: teacher or student.
        seed: seed of the model.
        target: of a student, the held-out accuracy at which its training ends (default: after a number of steps).

    Raises:
        InvalidArgumentError: the task or the role is unknown.
    """
    if task not in TASKS:
        raise InvalidArgumentError("task", f"must be one of {', '.join(TASKS)}, got {task!r}")
    if role == "teacher":
        return Recipe(task, role, seed, width=96, layers=3, heads=4, steps=_TEACHER_STEPS[task])
    if role == "student":
        steps = _STUDENT_STEPS[task] if target is None else _MOST_STEPS
        return Recipe(task, role, seed, width=48, layers=2, heads=4, steps=steps, target=target)
    raise InvalidArgumentError("role", f"must be 'teacher' or 'student', got {role!r}")


def load_pair(
    task: Task | str,
    seed: int = 0,
    *,
    cache: Path | str | None = None,
    teacher_seed: int = 0,
    making: Making | None = None,
) -> tuple[LanguageModel, LanguageModel]:
    """The student of a seed and the teacher, from the cache; a model that it lacks is trained first.

    Args:
        task: a task or its name.
        seed: seed of the student; the teacher does not depend on it.
        cache: folder; by default `$OPDTHEORY_CACHE`, else `~/.cache/opdtheory`.
        teacher_seed: seed of the teacher.
        making: as for `load_model`.

    Returns:
        `(student, teacher)`; the teacher's parameters require no gradient.
    """
    name = task if isinstance(task, str) else task.name
    student, _ = load_model(recipe_for(name, "student", seed), cache=cache, making=making)
    teacher, _ = load_model(recipe_for(name, "teacher", teacher_seed), cache=cache, making=making)
    return student, teacher.requires_grad_(False)


def load_model(
    recipe: Recipe,
    *,
    cache: Path | str | None = None,
    report: Report | None = None,
    making: Making | None = None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """A model and its record, from the cache; if it is not there, it is trained and stored first.

    The record holds the recipe, the steps taken, the checksum of the weights, the training time in seconds and the
    accuracy on 512 problems of the test split.

    Args:
        recipe: what to load or train.
        cache: folder; by default `$OPDTHEORY_CACHE`, else `~/.cache/opdtheory`.
        report: called with each step's number and loss, if the model is trained.
        making: entered while the model is made, if the cache lacks it, with the recipe and the file that it will be
            kept in; what it yields is called like `report`.

    Raises:
        InvalidArgumentError: the cached weights do not have the recorded checksum, or are of another model.
        ImportError: the base model is not installed.
        TrainingError: the recipe's target is not reached.
    """
    path = cache_folder(cache) / f"{recipe.key}.safetensors"
    task = task_named(recipe.task)
    if stored(path):
        tensors, record = load_tensors(path)
        model = _untrained(recipe, task, cache)
        if tensors.keys() != _own_tensors(model).keys():
            raise InvalidArgumentError("cache", f"{path} must hold the model's tensors; delete it to make it again")
        model.load_state_dict(tensors, strict=False)  # a tied output layer is stored under one name
        return model, record
    with contextlib.nullcontext(None) if making is None else making(recipe, path) as told:
        return _made(recipe, task, path, cache, [each for each in (report, told) if each is not None])


def _made(
    recipe: Recipe, task: Task, path: Path, cache: Path | str | None, reports: Sequence[Report]
) -> tuple[LanguageModel, dict[str, Any]]:
    """Train a model, score it and store it."""
    wall, processor = time.perf_counter(), time.process_time()
    steps = 0

    def noted(step: int, loss: float) -> None:
        nonlocal steps
        steps = step
        for report in reports:
            report(step, loss)

    model = train_supervised(recipe, cache=cache, report=noted)
    record = {
        "recipe": dataclasses.asdict(recipe),
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "greedy_accuracy": accuracy(model, task, _SCORED, greedy=True),
        "sampled_accuracy": accuracy(model, task, _SCORED),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }
    return model.cpu(), save_tensors(path, _own_tensors(model), record)


def train_supervised(recipe: Recipe, *, cache: Path | str | None = None, report: Report | None = None) -> LanguageModel:
    """Train on demonstrations of the train split, each used once.

    The loss is the mean over the policy's own tokens, including the end-of-sequence token; the environment's tokens
    are history only.

    Args:
        recipe: what to train.
        cache: folder of a base model.
        report: called with the number of finished steps and the loss in nats per token.

    Raises:
        TrainingError: the recipe's target is not reached.
    """
    task = task_named(recipe.task)
    model = _untrained(recipe, task, cache)
    if recipe.base is not None and torch.cuda.is_available():
        model = model.cuda()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    rng = random.Random(f"demonstrations/{recipe.task}/{recipe.role}/{recipe.seed}")
    near = _Near(model, task, recipe.target)
    for step in range(recipe.steps):
        tokens, own = (each.to(model.device) for each in _batch(task, recipe, step, rng, model.vocabulary))
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.warmup, recipe.steps)
        logits = model.logits(tokens[:, :-1])
        loss = cross_entropy(logits[own], tokens[:, 1:][own])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if report is not None:
            report(step + 1, float(loss.detach()))
        if recipe.target is not None and (step + 1) % _LOOK_EVERY == 0 and near.is_over():
            return model
    if recipe.target is not None:
        raise TrainingError(
            f"the {recipe.role} {recipe.seed} of {recipe.task} does not reach an accuracy of {recipe.target:g} in "
            f"{recipe.steps} steps"
        )
    return model


class _Near:
    """Looks at a model in training until its held-out accuracy is near a target, or has passed it by."""

    def __init__(self, model: LanguageModel, task: Task, target: float | None) -> None:
        self.model, self.task, self.target = model, task, target or 0.0
        self._nearest: tuple[float, dict[str, Tensor]] = (math.inf, {})

    def is_over(self) -> bool:
        """Whether training ends here; the model then has the weights that are kept."""
        share = 0.0
        for count, within in _LOOKS:
            share = accuracy(self.model, self.task, count, seed=_HELD_OUT_SEED, split="train")
            if abs(share - self.target) > within:
                break
        else:
            return True
        if count == _LOOKS[-1][0] and abs(share - self.target) < self._nearest[0]:
            held = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self._nearest = abs(share - self.target), held
        if share < 2 * self.target or not self._nearest[1]:
            return False
        self.model.load_state_dict(self._nearest[1])
        return True


def accuracy(
    model: LanguageModel,
    task: Task,
    count: int = _SCORED,
    *,
    greedy: bool = False,
    seed: int = 0,
    split: Split = "test",
) -> float:
    """The share of a split's problems that a model answers correctly, with one response each."""
    examples = task.examples(split, count, seed)
    generator = torch.Generator().manual_seed(seed)
    samples = model.sample(
        task_prompts(model, examples),
        max_new_tokens=task.max_response,
        greedy=greedy,
        generator=generator,
        environment=task.environment,
    )
    return sum(task.correct(examples, samples, model.vocabulary)) / count


def _own_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The state without further names of a tensor that it holds already."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())


def _untrained(recipe: Recipe, task: Task, cache: Path | str | None = None) -> LanguageModel:
    if recipe.base is not None:
        return _pretrained(recipe, cache)
    config = TransformerConfig(recipe.width, recipe.layers, recipe.heads, task.max_prompt + task.max_response)
    return Transformer(config, task.vocabulary, seed=recipe.seed + (10_000 if recipe.role == "teacher" else 0))


def _pretrained(recipe: Recipe, cache: Path | str | None) -> LanguageModel:
    from opdtheory.training.models.huggingface import smollm2
    from opdtheory.training.models.variants import drop_layer

    if recipe.base != "smollm2":
        raise InvalidArgumentError("base", f"must be 'smollm2' or None, got {recipe.base!r}")
    model: Any = smollm2(cache=cache)
    while (layers := int(model.network.config.num_hidden_layers)) > recipe.layers:
        model = drop_layer(model, layers // 2)
    return cast(LanguageModel, model)


def _batch(task: Task, recipe: Recipe, step: int, rng: random.Random, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Tokens `(B, L)`, padded on the right, and whether each next token is the policy's, `(B, L - 1)`."""
    # Different for every role, seed and step; the split keeps test problems out.
    seed = (recipe.seed * 2 + (recipe.role == "teacher")) * 1_000_000 + step
    rows, owns = [], []
    for example in task.examples("train", recipe.batch_size, seed):
        prompt, (row, own) = vocabulary.encode(example.prompt), task.spelled(example, rng, vocabulary)
        rows.append(torch.tensor([*prompt, *row]))
        owns.append(torch.tensor([*[False] * len(prompt), *own]))
    return pad_sequence(rows, True, vocabulary.pad), pad_sequence(owns, True)[:, 1:]


def _schedule(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a task's teacher and students, unless they are in the cache, and print their records as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m opdtheory.training.pairs", description=main.__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), nargs="+", default=tuple(TASKS))
    parser.add_argument(
        "--seeds", type=int, default=1, help="number of students, of seeds 0 to SEEDS - 1 (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, help="folder (default: $OPDTHEORY_CACHE, else ~/.cache/opdtheory)")
    options = parser.parse_args(arguments)
    for name in options.task:
        wanted = [recipe_for(name, "teacher"), *(recipe_for(name, "student", seed) for seed in range(options.seeds))]
        for recipe in wanted:

            def report(step: int, loss: float, recipe: Recipe = recipe) -> None:
                if step % 100 == 0 or step == recipe.steps:
                    print(f"{recipe.key}: step {step} of {recipe.steps}, loss {loss:.4f}", file=sys.stderr, flush=True)

            _, record = load_model(recipe, cache=options.cache, report=report)
            print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
