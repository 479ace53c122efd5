"""A trainer's expected gradient in the student's table: every outcome of its sampling is one step of its optimizer."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from opdtheory.end_to_end.odometer import Draws, Generation, Odometer, sampling_by
from opdtheory.end_to_end.pair import TrainerPair, no_progress
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError

__all__ = ["BUDGET", "Leaf", "Played", "Update", "play_trainer", "play_update"]

# Outcomes, each a step, that are played before sampling takes over.
BUDGET = 2_000

# What the probabilities of all outcomes may miss: the rounding of a float32 sampler.
_SUM = 1e-5

# What the same outcome may leave at another time, relative to its largest entry.
_AGAIN = 1e-5

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
        sampled: whether these are steps that were sampled, not all outcomes.
    """

    pair: TrainerPair
    leaves: list[Leaf]
    laws: dict[tuple[int, ...], list[float]]
    modes: tuple[frozenset[bool], frozenset[bool]]
    sampled: bool = False

    @cached_property
    def gradient(self) -> Tensor:
        """The expected gradient in the student's table, `(R, V)`, float64."""
        return sum((leaf.probability * leaf.gradient for leaf in self.leaves), torch.zeros(()).double())

    @property
    def variance(self) -> float:
        """The trace of the covariance of one step's gradient."""
        mean = self.gradient
        return sum(leaf.probability * float((leaf.gradient - mean).square().sum()) for leaf in self.leaves)


class _Steps(TrainerCallback):
    """Reads the gradient before the optimizer steps, and turns the odometer of the step's prompts."""

    def __init__(self, pair: TrainerPair, limit: int, draws: Draws | None) -> None:
        self.pair, self.limit, self.draws = pair, limit, draws
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
        return self.current.draw(law) if self.draws is None else self.draws.draw(law)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.draws is not None:
            self.current, self.read = Odometer(), 0
            return
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
        if self.pair.teacher_answers:
            self._note_given()
        else:
            self._note()
        self.steps += 1
        if self.done:
            control.should_training_stop = True
        return control

    def _note(self) -> None:
        if not self.generations or not any(answer for call in self.generations for answer in call.answers):
            raise LossError(
                "the trainer drew no token in a step: it decodes greedily, trains on answers of the dataset, or "
                "samples elsewhere (vLLM, a server); let generate sample in this process, or audit the update alone "
                "with audit_update"
            )
        key = tuple(tuple(prompt) for call in self.generations for prompt in call.prompts)
        if self.draws is not None:
            self._keep(key, 1.0 / self.draws.steps)
            self.done = self.played == self.draws.steps
            return
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
        if not self.open and len(self.by_phase) == len(self.pair.prompts):
            _check_again(self.leaves[key][0].gradient, self.found)
            self.done = True
            return
        if key in self.open:
            self._keep(key, self.current.probability)
            if self.played > self.limit:
                raise _too_many(self.limit)
            if not self.current.advance():
                self.open.discard(key)

    def _note_given(self) -> None:
        """Note a step on answers of the teacher, which the dataset holds."""
        if self.generations:
            raise LossError("the trainer generates, although the dataset holds the teacher's answers")
        if self.steps == len(self.pair.given):
            _check_again(self.leaves[()][0].gradient, self.found)
            self.done = True
            return
        chance, rollouts = self.pair.given[self.steps]
        self.leaves.setdefault((), []).append(Leaf(chance, list(rollouts), self.found))

    def _keep(self, key: tuple[Any, ...], probability: float) -> None:
        """Note the step's rollouts, their laws and the gradient."""
        rollouts = []
        for call in self.generations:
            for prompt, answer, laws in zip(call.prompts, call.answers, call.laws, strict=True):
                rollouts.append((prompt, answer))
                for n, law in enumerate(laws):
                    self.laws[tuple(prompt + answer[:n])] = law
        self.leaves.setdefault(key, []).append(Leaf(probability, rollouts, self.found))
        self.played += 1


def play_trainer(
    build: Callable[[TrainerPair], Trainer], pair: TrainerPair, limit: int = BUDGET, draws: Draws | None = None
) -> Played:
    """Play all outcomes of a trainer's sampling, at a learning rate of 0.

    Args:
        build: makes the trainer, unstarted.
        pair: what it is given.
        limit: the largest number of outcomes.
        draws: steps to sample instead.

    Raises:
        InvalidArgumentError: `build` returns no trainer of `transformers`, or one with another batch or student.
        LossError: the trainer does not step once a step, does not sample in this process, changes the table or does
            not replay.
        BudgetExceededError: there are more outcomes.
    """
    if pair.teacher_answers:
        draws = None  # the dataset holds every answer, and each is played
        if len(pair.given) > limit:
            raise _too_many(limit)
    with _quiet():
        trainer = build(pair)
        _check(trainer, pair)
        steps = _Steps(pair, limit, draws)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(steps)
        settings: dict[str, Any] = {"max_steps": 10**6, "learning_rate": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0}
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
    return _gathered(pair, steps.leaves, steps.laws, draws is not None)


def play_update(update: Update, pair: TrainerPair, limit: int = BUDGET, draws: Draws | None = None) -> Played:
    """Play all outcomes of the student's own sampling through an update.

    Args:
        update: `update(pair, prompts, answers)` leaves a gradient in `pair.student`; tokens as lists of numbers,
            answers up to and including the end of the sequence.
        pair: what it is given; a step has `batch_size * accumulate` rollouts, of the prompts in turn.
        limit: the largest number of outcomes.
        draws: steps to sample instead.

    Raises:
        LossError: the update leaves no gradient, one that is not finite, or changes the table.
        BudgetExceededError: there are more outcomes.
    """
    table = pair.student.model.table
    pair.student.train()
    before = table.detach().clone()
    laws: dict[tuple[int, ...], list[float]] = {}
    count, prompts = pair.batch_size * pair.accumulate, pair.prompt_tokens
    leaves: dict[tuple[Any, ...], list[Leaf]] = {}

    def played(asked: list[list[int]], sampler: Odometer | Draws) -> Leaf:
        answers = [_answer(pair, prompt, sampler, laws) for prompt in asked]
        table.grad = None
        update(pair, [list(prompt) for prompt in asked], [list(answer) for answer in answers])
        found = _full(table.grad)
        if not bool(torch.isfinite(found).all()):
            raise LossError("the update left a gradient that is not finite")
        if not torch.equal(before, table.detach()):
            raise LossError("the update must not change the student; leave the optimizer's step out of it")
        chance = sampler.probability if isinstance(sampler, Odometer) else 1.0 / sampler.steps
        return Leaf(chance, list(zip(asked, answers, strict=True)), found)

    for step in range(len(prompts) if draws is None else draws.steps):
        asked = [prompts[(step * count + n) % len(prompts)] for n in range(count)]
        key = tuple(map(tuple, asked))
        if draws is not None:
            leaves.setdefault(key, []).append(played(asked, draws))
            continue
        if key in leaves:
            continue
        leaves[key], odometer = [], Odometer()
        while True:
            odometer.begin()
            leaves[key].append(played(asked, odometer))
            if len(leaves[key]) > limit:
                raise _too_many(limit)
            if not odometer.advance():
                break
        odometer.begin()
        _check_again(leaves[key][0].gradient, played(asked, odometer).gradient)
    table.grad = None
    return _gathered(pair, leaves, laws, draws is not None)


def _full(gradient: Tensor | None) -> Tensor:
    """A gradient in float64, gathered if it is sharded."""
    if gradient is None:
        raise LossError("the update must leave a gradient in pair.student.model.table, it left none")
    whole: Tensor = getattr(gradient, "full_tensor", lambda: gradient)()
    return whole.detach().double().clone()


def _check_again(first: Tensor, again: Tensor) -> None:
    """Raise if the same outcome leaves another gradient than at its first time."""
    gap = float((first - again).abs().max())
    if gap > _AGAIN * max(float(first.abs().max()), float(again.abs().max())):
        raise LossError(
            f"the same step leaves another gradient after others, off by {gap:.3g}: the gradient of the step before is "
            "not cleared, or the trainer keeps a state between steps"
        )


def _answer(
    pair: TrainerPair, prompt: list[int], sampler: Odometer | Draws, laws: dict[tuple[int, ...], list[float]]
) -> list[int]:
    """An answer of the student, up to and including the end of the sequence."""
    model = pair.student.model
    answer: list[int] = []
    while len(answer) < pair.horizon and (not answer or answer[-1] != pair.tokenizer.eos_token_id):
        row = model.rows.row([*prompt, *answer])
        law = model.table.detach()[row].double().softmax(-1).tolist()
        laws[tuple(prompt + answer)] = law
        answer.append(sampler.draw(law))
    return answer


def _gathered(
    pair: TrainerPair,
    leaves: dict[tuple[Any, ...], list[Leaf]],
    laws: dict[tuple[int, ...], list[float]],
    sampled: bool,
) -> Played:
    modes = (frozenset(pair.student.model.modes), frozenset(pair.teacher.model.modes))
    if sampled:
        return Played(pair, [leaf for some in leaves.values() for leaf in some], laws, modes, sampled)
    found = []
    for some in leaves.values():
        total = sum(leaf.probability for leaf in some)
        if abs(total - 1.0) > _SUM:
            raise LossError(f"the trainer does not replay: the probabilities of its outcomes add up to {total:.6g}")
        found += [Leaf(leaf.probability / total / len(leaves), leaf.rollouts, leaf.gradient) for leaf in some]
    return Played(pair, found, laws, modes)


def _too_many(limit: int) -> BudgetExceededError:
    return BudgetExceededError(
        "playing all outcomes of the sampling", limit + 1, limit, "use fewer rollouts, a shorter horizon or fewer steps"
    )


def _check(trainer: Any, pair: TrainerPair) -> None:
    if not isinstance(trainer, Trainer):
        raise InvalidArgumentError(
            "build",
            f"must return a transformers.Trainer, got {type(trainer).__name__}; for other loops use audit_update",
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
        with warnings.catch_warnings(), no_progress():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
