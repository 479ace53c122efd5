"""A trainer's expected gradient in the student's table: every outcome of its sampling is one step of its optimizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from opdtheory.end_to_end.odometer import Generation, Odometer, sampling_by
from opdtheory.end_to_end.pair import TrainerPair
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError

__all__ = ["BUDGET", "Leaf", "Played", "Update", "play_trainer", "play_update"]

# Outcomes, each a step, that are played before sampling takes over.
BUDGET = 2_000

# What the probabilities of all outcomes may miss: the rounding of a float32 sampler.
_SUM = 1e-5

Update = Callable[[TrainerPair, list[list[int]], list[list[int]]], object]


@dataclass(frozen=True)
class Leaf:
    """One outcome: its probability, the rollouts in the order in which they were drawn, and the gradient it left."""

    probability: float
    rollouts: list[tuple[list[int], list[int]]]
    gradient: Tensor = field(repr=False)


@dataclass(frozen=True)
class Played:
    """What a trainer did, over all outcomes.

    Attributes:
        pair: what it was given.
        leaves: its outcomes; their probabilities add up to one.
        laws: for each prefix that was continued, the law of the next token, as the sampler had it.
        modes: whether losses were computed in train mode: of the student, and of the teacher.
    """

    pair: TrainerPair
    leaves: list[Leaf]
    laws: dict[tuple[int, ...], list[float]]
    modes: tuple[frozenset[bool], frozenset[bool]]

    @property
    def gradient(self) -> Tensor:
        """The expected gradient in the student's table, `(R, V)`, float64."""
        return sum((leaf.probability * leaf.gradient for leaf in self.leaves), torch.zeros(()).double())

    @property
    def variance(self) -> float:
        """The trace of the covariance of one step's gradient."""
        mean = self.gradient
        return sum(leaf.probability * float((leaf.gradient - mean).square().sum()) for leaf in self.leaves)


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Reads the gradient before the optimizer steps, and turns the odometer of the step's prompts."""

    def __init__(self, pair: TrainerPair, limit: int) -> None:
        self.pair, self.limit = pair, limit
        self.before = pair.student.model.table.detach().clone()
        self.current = Odometer()
        # The dataset holds the prompts in turn, so steps repeat theirs with a period that divides their number.
        self.by_phase: list[tuple[Any, ...]] = []
        self.odometers: dict[tuple[Any, ...], Odometer] = {}
        self.open: set[tuple[Any, ...]] = set()
        self.leaves: dict[tuple[Any, ...], list[Leaf]] = {}
        self.laws: dict[tuple[int, ...], list[float]] = {}
        self.steps, self.read, self.played = 0, 0, 0
        self.done = False

    @property
    def generations(self) -> list[Generation]:
        return self.current.generations

    def draw(self, law: list[float]) -> int:
        return self.current.draw(law)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        phase = self.steps % len(self.pair.prompts)
        known = phase < len(self.by_phase)
        self.current = self.odometers[self.by_phase[phase]] if known else Odometer()
        self.current.begin()
        self.read = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        table = self.pair.student.model.table
        found = torch.zeros(table.shape, dtype=torch.float64) if table.grad is None else table.grad.detach().double()
        if not bool(torch.isfinite(found).all()):
            raise LossError("the trainer left a gradient that is not finite")
        self.found, self.read = found.clone(), self.read + 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if not torch.equal(self.before, self.pair.student.model.table.detach()):
            raise LossError(
                "the trainer changed the student at a learning rate of 0; pass **pair.arguments to its configuration, "
                "or audit the update alone with audit_update"
            )
        if self.read != 1:
            raise LossError(f"the trainer must step its optimizer once a step, got {self.read} times")
        self._note()
        self.steps += 1
        if self.done:
            control.should_training_stop = True
        return control

    def _note(self) -> None:
        if not self.generations or not any(answer for call in self.generations for answer in call.answers):
            raise LossError(
                "the trainer drew no token in a step: it decodes greedily, trains on answers of the dataset, or samples "
                "elsewhere (vLLM, a server); let generate sample in this process, or audit the update alone with "
                "audit_update"
            )
        key = tuple(tuple(prompt) for call in self.generations for prompt in call.prompts)
        phase = self.steps % len(self.pair.prompts)
        if phase == len(self.by_phase):
            self.by_phase.append(key)
            if key in self.odometers:
                return  # played already, by a phase with the same prompts
            self.odometers[key] = self.current
            self.open.add(key)
            self.leaves[key] = []
        if self.by_phase[phase] != key:
            raise LossError("the trainer does not replay: it orders the dataset differently in each epoch")
        if key in self.open:
            rollouts = [
                (prompt, answer)
                for call in self.generations
                for prompt, answer in zip(call.prompts, call.answers, strict=True)
            ]
            self.leaves[key].append(Leaf(self.current.probability, rollouts, self.found))
            for call in self.generations:
                for prompt, answer, laws in zip(call.prompts, call.answers, call.laws, strict=True):
                    for n, law in enumerate(laws):
                        self.laws[(*prompt, *answer[:n])] = law
            self.played += 1
            if self.played > self.limit:
                raise BudgetExceededError(
                    f"the trainer's sampling has more than {self.limit} outcomes; use fewer rollouts, a shorter "
                    "horizon, or method='monte_carlo'"
                )
            if not self.current.advance():
                self.open.discard(key)
        self.done = not self.open and len(self.by_phase) == len(self.pair.prompts)


def play_trainer(build: Callable[[TrainerPair], Trainer], pair: TrainerPair, limit: int = BUDGET) -> Played:
    """Play all outcomes of a trainer's sampling, at a learning rate of 0.

    Args:
        build: makes the trainer, unstarted.
        pair: what it is given.
        limit: the largest number of outcomes.

    Raises:
        InvalidArgumentError: `build` returns no trainer of `transformers`, or one with another batch or student.
        LossError: the trainer does not step once a step, does not sample in this process, changes the table or does
            not replay.
        BudgetExceededError: there are more outcomes.
    """
    with _quiet():
        trainer = build(pair)
        _check(trainer, pair)
        steps = _Steps(pair, limit)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(steps)
        settings = {"max_steps": 10**6, "learning_rate": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
        settings |= {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
        for name, value in settings.items():
            setattr(trainer.args, name, value)
        with sampling_by(steps), _in_order():
            trainer.train()
    if not steps.done:
        raise LossError(
            f"the trainer stopped after {steps.steps} steps, before all outcomes were played; it must not limit its "
            "steps or epochs itself"
        )
    return _gathered(pair, steps.leaves, steps.laws)


def play_update(update: Update, pair: TrainerPair, limit: int = BUDGET) -> Played:
    """Play all outcomes of the student's own sampling through an update.

    Args:
        update: `update(pair, prompts, answers)` leaves a gradient in `pair.student`; tokens as lists of numbers, answers
            up to and including the end of the sequence.
        pair: what it is given; a step has `batch_size * accumulate` rollouts, of the prompts in turn.
        limit: the largest number of outcomes.

    Raises:
        LossError: the update leaves no gradient, one that is not finite, or changes the table.
        BudgetExceededError: there are more outcomes.
    """
    table = pair.student.model.table
    before = table.detach().clone()
    laws: dict[tuple[int, ...], list[float]] = {}
    count, prompts = pair.batch_size * pair.accumulate, pair.prompt_tokens
    leaves: dict[tuple[Any, ...], list[Leaf]] = {}
    for step in range(len(prompts)):
        asked = [prompts[(step * count + n) % len(prompts)] for n in range(count)]
        key = tuple(map(tuple, asked))
        if key in leaves:
            continue
        leaves[key], odometer = [], Odometer()
        while True:
            odometer.begin()
            answers = [_answer(pair, prompt, odometer, laws) for prompt in asked]
            table.grad = None
            update(pair, [list(prompt) for prompt in asked], [list(answer) for answer in answers])
            if table.grad is None:
                raise LossError("the update must leave a gradient in pair.student.model.table, it left none")
            found = getattr(table.grad, "full_tensor", lambda: table.grad)().detach().double().clone()
            if not bool(torch.isfinite(found).all()):
                raise LossError("the update left a gradient that is not finite")
            if not torch.equal(before, table.detach()):
                raise LossError("the update must not change the student; leave the optimizer's step out of it")
            leaves[key].append(Leaf(odometer.probability, list(zip(asked, answers, strict=True)), found))
            if len(leaves[key]) > limit:
                raise BudgetExceededError(f"there are more than {limit} outcomes; use fewer rollouts or a shorter horizon")
            if not odometer.advance():
                break
    table.grad = None
    return _gathered(pair, leaves, laws)


def _answer(
    pair: TrainerPair, prompt: list[int], odometer: Odometer, laws: dict[tuple[int, ...], list[float]]
) -> list[int]:
    """An answer of the student, up to and including the end of the sequence."""
    model = pair.student.model
    answer: list[int] = []
    while len(answer) < pair.horizon and (not answer or answer[-1] != pair.tokenizer.eos_token_id):
        row = model.rows.row([*prompt, *answer])
        law = model.table.detach()[row].double().softmax(-1).tolist()
        laws[(*prompt, *answer)] = law
        answer.append(odometer.draw(law))
    return answer


def _gathered(
    pair: TrainerPair, leaves: dict[tuple[Any, ...], list[Leaf]], laws: dict[tuple[int, ...], list[float]]
) -> Played:
    found = []
    for some in leaves.values():
        total = sum(leaf.probability for leaf in some)
        if abs(total - 1.0) > _SUM:
            raise LossError(f"the trainer does not replay: the probabilities of its outcomes add up to {total:.6g}")
        found += [Leaf(leaf.probability / total / len(leaves), leaf.rollouts, leaf.gradient) for leaf in some]
    modes = (frozenset(pair.student.model.modes), frozenset(pair.teacher.model.modes))
    return Played(pair, found, laws, modes)


def _check(trainer: Any, pair: TrainerPair) -> None:
    if not isinstance(trainer, Trainer):
        raise InvalidArgumentError(
            "build", f"must return a transformers.Trainer, got {type(trainer).__name__}; for other loops use audit_update"
        )
    args = trainer.args
    for name, wanted in (
        ("per_device_train_batch_size", pair.batch_size),
        ("gradient_accumulation_steps", pair.accumulate),
    ):
        if getattr(args, name) != wanted:
            raise InvalidArgumentError(
                "build", f"must train with {name} = {wanted}, got {getattr(args, name)}; pass **pair.arguments"
            )
    student = trainer.accelerator.unwrap_model(trainer.model)
    if student is not pair.student:
        raise InvalidArgumentError("build", f"must train pair.student itself, got a {type(student).__name__}")


@contextlib.contextmanager
def _in_order() -> Iterator[None]:
    """Samplers that shuffle keep the order of the dataset, so that every outcome meets the same prompts."""
    shuffled = torch.randperm

    def ordered(n: int, **options: Any) -> Tensor:
        return torch.arange(n)

    torch.randperm = ordered  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randperm = shuffled


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Trainers announce a great deal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
