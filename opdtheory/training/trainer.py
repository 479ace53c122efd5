r"""The reference trainer. `training_step` is one step from prompts to new parameters; the rest starts and ends a run.

Every loss is a sum over rollouts or tokens divided by a count of the *global* batch, so its gradient is the same
however the batch is split over backward passes and processes. Every random number is seeded by the run's seed, the
step and the prompt's index in the global batch, so a step is the same on any number of processes and after a resume.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts, gather_logprobs
from opdtheory.training import checkpoint
from opdtheory.training.batches import demonstrate, longest, parts, respond, step_examples, uniforms
from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import Processes, processes
from opdtheory.training.evaluation import evaluate
from opdtheory.training.loading import load_models
from opdtheory.training.measures import Tally, clipped, distances, step_report
from opdtheory.training.metrics import Metrics
from opdtheory.training.models.language_model import LanguageModel, response_logits
from opdtheory.training.models.samples import Samples
from opdtheory.training.objective import summed
from opdtheory.training.progress import Display, Silent, StepsOnly, plan
from opdtheory.training.records.failures import failure
from opdtheory.training.records.rollouts import StepLog, monitor_of
from opdtheory.training.run import Observer, Run, TrainResult
from opdtheory.training.tasks import Example, Task
from opdtheory.training.tasks import task as task_of
from opdtheory.training.validation.observer import validate_run

__all__ = ["train", "training_step", "update_on"]


def training_step(run: Run, step: int) -> dict[str, float]:
    """Take step number `step`, counted from 0, and return its metrics."""
    # 1. The student answers this process's share of the step's prompts, several times each if rollouts form groups.
    return update_on(run, step, *collect(run, step))


def update_on(run: Run, step: int, examples: list[Example], samples: Samples) -> dict[str, float]:
    """Update the student on this process's rollouts of a step, leave the gradient in place, and return the metrics."""
    config, loss = run.config, run.loss
    for settings in run.optimizer.param_groups:
        settings["lr"] = config.learning_rate_at(step)

    # 2. What the loss is divided by: a count of the global batch, known before the first backward pass.
    tokens = float(run.processes.total(samples.mask.sum(dtype=torch.float64)))
    denominator = tokens if loss.reduction == "token_mean" else config.batch_size

    pieces = list(parts(samples, config.microbatch))
    teacher_logits: dict[int, Tensor] = {}
    tallies, norms = [], []
    log, logged = StepLog(run, step + 1), dict[str, float]()
    for update in range(config.updates_per_batch):
        tally = Tally.empty(run.processes.device)
        run.optimizer.zero_grad(set_to_none=True)
        for number, piece in enumerate(pieces):
            # 3. The teacher scores the student's histories, once for all updates.
            scores = teacher_logits.get(number)
            if scores is None:
                scores = score(run, piece)
            if config.updates_per_batch > 1:
                teacher_logits[number] = scores

            # 4. The student's own logits, with gradient, and the loss of the estimator.
            try:
                rollouts = as_rollouts(run, piece, scores)
                value = summed(loss, rollouts, config.rollouts_per_prompt) / denominator
            except InvalidArgumentError as error:  # such as NaN in the logits
                raise fail(run, step, str(error), examples, samples) from error
            value.backward()
            tally.add(loss=value, clipped=clipped(loss, rollouts), tokens=rollouts.mask.sum())
            if update == 0 and config.control != "supervised":
                tally.add(**distances(rollouts))
            if update == 0:
                log.add(rollouts)

        # 5. The sum over processes is the gradient of the global batch; then one AdamW step.
        if update == 0:
            logged = log.finish()
            tally.add(present=samples.present.sum(), rollouts=len(samples))
            tally.add(correct=sum(run.task.correct(examples, samples, run.student.vocabulary)))
        run.processes.total(tally.sums)
        run.processes.sum_gradients(run.student.parameters())
        limit = float("inf") if config.clip_gradient is None else config.clip_gradient
        norm = float(torch.nn.utils.clip_grad_norm_(run.student.parameters(), limit))
        if not (abs(tally["loss"]) < float("inf") and norm < float("inf")):  # NaN fails both
            problem = f"the loss is {tally['loss']:g} and the gradient's norm {norm:g} in update {update + 1}"
            raise fail(run, step, problem, examples, samples)
        run.optimizer.step()
        tallies.append(tally)
        norms.append(norm)
    report = step_report(tallies, norms) | {"learning_rate": config.learning_rate_at(step)} | logged
    if config.control == "supervised":  # there are no rollouts
        return {key: report[key] for key in ("loss", "gradient_norm", "learning_rate", "tokens")}
    return report


def collect(run: Run, step: int) -> tuple[list[Example], Samples]:
    """This process's rollouts of a step, or demonstrations, with the problem of each."""
    config, each = run.config, run.config.rollouts_per_prompt
    mine = run.processes.share(config.prompts_per_step)
    chosen = step_examples(run.task, config, step)[mine.start : mine.stop]
    examples = [example for example in chosen for _ in range(each)]
    if config.control == "supervised":
        return examples, demonstrate(run.student, run.task, examples, config.seed, step, mine.start * each)
    draws = uniforms(config.seed, step, mine, each, longest(run.task, config))
    samples = respond(run.student, run.task, examples, config, draws, config.rollout_temperature)
    empty = (samples.mask.sum(-1) == 0).nonzero().flatten().tolist()
    if empty:
        problem = f"{len(empty)} of {len(samples)} rollouts have no token of the student, the first for the prompt "
        raise fail(run, step, problem + repr(examples[empty[0]].prompt), examples, samples)
    return examples, samples


@torch.no_grad()
def score(run: Run, piece: Samples) -> Tensor:
    """The teacher's logits at every response position, divided by the temperature."""
    return response_logits(run.teacher, piece) / run.config.temperature


def as_rollouts(run: Run, piece: Samples, teacher_logits: Tensor) -> Rollouts:
    """The estimator's input: the piece with both models' logits, the student's differentiable.

    The sampled log-probabilities are those of the behaviour policy, which is the student before its first update, at
    the temperature of the sampling.
    """
    logits = response_logits(run.student, piece) / run.config.temperature
    if run.config.check_rollouts:
        return Rollouts.from_logits(piece.tokens, logits, teacher_logits, piece.mask, piece.logprobs)
    return Rollouts.unchecked(
        tokens=piece.tokens,
        mask=piece.mask,
        student_logits=logits,
        teacher_logits=teacher_logits,
        student_logprobs=gather_logprobs(logits, piece.tokens, piece.mask),
        teacher_logprobs=gather_logprobs(teacher_logits, piece.tokens, piece.mask),
        behavior_logprobs=piece.logprobs,
    )


def fail(run: Run, step: int, problem: str, examples: Sequence[Example], samples: Samples) -> Exception:
    """Save the batch of a failed step, and return the error to raise."""
    models = (run.student, run.teacher)
    return failure(problem, run.folder, step + 1, run.processes.rank, models, examples, samples)


def train(
    config: TrainConfig,
    *,
    student: LanguageModel | None = None,
    teacher: LanguageModel | None = None,
    task: Task | None = None,
    observers: Sequence[Observer] = (),
    display: Display | None = None,
) -> TrainResult:
    """Train a student on its own samples, scored by a teacher; a stopped run in the same folder is resumed.

    Under `torchrun` every process calls this function and gets the same result; the first one writes the files.

    Args:
        config: all settings.
        student: the student, trained in place; by default the one that `config` names.
        teacher: the teacher; by default the one that `config` names.
        task: the task; by default the one that `config` names.
        observers: called after each step with the run and the number of finished steps; what they return is added to
            the metrics.
        display: what is told, in the first process, of models in the making and of the steps, such as
            `opdtheory.training.progress.display_on(sys.stderr)`; by default nothing, but for a bar of the steps if
            `config.progress` and standard error is a terminal.

    Raises:
        InvalidArgumentError: the models and the task do not fit together, the folder holds another run, or it is a
            file.
        TrainingError: a step fails because a rollout is empty, or a loss or gradient is not finite. The error names a
            file with the prompts and the tokens.
    """
    for name, path in (("out", config.out), ("cache", config.cache)):
        _check_folder(name, path)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = None if config.out is None else Path(config.out)
    with contextlib.ExitStack() as held:
        team = held.enter_context(processes(config.device))
        held.enter_context(checkpoint.locked(folder if team.is_first else None))
        shown: Display = StepsOnly() if config.progress and team.is_first else Silent()
        if display is not None and team.is_first:
            shown = display
        shown.say(plan(config))
        run, first = held.enter_context(started(config, team, student, teacher, task, shown))
        for step in range(first, config.steps):
            began = time.perf_counter()
            row: dict[str, Any] = {"step": step + 1, **training_step(run, step)}
            row["seconds"] = time.perf_counter() - began
            if config.is_due(step + 1, config.eval_every) and config.eval_examples:
                row |= evaluate(run.student, run.teacher, run.task, config, team)
            if config.validate_every and config.is_due(step + 1, config.validate_every):
                row |= validate_run(run, step + 1)
            for observer in observers:
                row |= observer(run, step + 1)
            finish_step(run, step + 1, row)
        return TrainResult(run.student, config, run.metrics.rows)


def _check_folder(name: str, path: str | None) -> None:
    """Raise if a folder cannot be made because there is a file in its place; models take minutes to train first."""
    try:
        there = None if path is None else next((p for p in (Path(path), *Path(path).parents) if p.exists()), None)
    except OSError as error:  # such as a name that is too long
        raise InvalidArgumentError(name, f"must be a folder, got {path!r}: {error.strerror}") from None
    if there is not None and not there.is_dir():
        raise InvalidArgumentError(name, f"must be a folder, got {path!r}, where {there} is a file")


@contextlib.contextmanager
def started(
    config: TrainConfig,
    team: Processes,
    student: LanguageModel | None,
    teacher: LanguageModel | None,
    task: Task | None,
    display: Display | None = None,
) -> Iterator[tuple[Run, int]]:
    """A run that is ready for its next step, and the number of finished steps."""
    if team.size > config.prompts_per_step:
        raise InvalidArgumentError(
            "prompts_per_step", f"must be at least the number of processes, {team.size}, got {config.prompts_per_step}"
        )
    task = task_of(config.task) if task is None else task
    shown = Silent() if display is None else display
    student, teacher = load_models(config, task, team, student, teacher, shown)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=0.0, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, foreach=True
    )
    folder = None if config.out is None else Path(config.out)
    saved = checkpoint.newest(folder / "checkpoints") if folder is not None and team.is_first else None
    saved = team.from_first(saved)
    first = 0
    if saved is not None:
        saved.check_config(config.identity(), str(folder))
        student.load_state_dict(saved.student)
        optimizer.load_state_dict(saved.optimizer)
        first = saved.step
        shown.say(f"{folder} holds this run up to step {first:,} of {config.steps:,}.")
    kept = folder if team.is_first else None
    with contextlib.ExitStack() as held:
        show = held.enter_context(shown.training(config, first)) if first < config.steps else None
        metrics = Metrics(kept, first, tensorboard=config.tensorboard and team.is_first, show=show)
        held.callback(metrics.close)
        if kept is not None:
            (kept / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        run = Run(config, team, task, student, teacher, config.loss(), optimizer, metrics)
        if config.monitor and team.is_first:
            run.monitor = monitor_of(config)
        metrics.rows = team.from_first(metrics.rows)
        # The rows of finished steps may be lost. A student that is trained is never evaluated as step 0.
        last = metrics.rows[-1]["step"] if metrics.rows else -1
        if first and last < first and team.is_first:
            warnings.warn(_lost_rows(folder, last, first), stacklevel=4)
        if config.eval_examples and last < first:
            metrics.add({"step": first, **evaluate(student, teacher, task, config, team)})
        yield run, first


def _lost_rows(folder: Path | None, last: int, first: int) -> str:
    found = "no row can be read" if last < 0 else f"the last row that can be read is of step {last}"
    return f"{folder}/metrics.jsonl is lost or damaged: {found}, and the run goes on from step {first}"


def finish_step(run: Run, finished: int, row: dict[str, Any]) -> None:
    """Record a step and write its checkpoint if one is due; the step is finished once its checkpoint is written."""
    run.metrics.add(row)
    if run.folder is not None and run.config.is_due(finished, run.config.checkpoint_every):
        if run.processes.is_first:
            run.metrics.sync()
            state = checkpoint.Checkpoint(
                finished, run.config.identity(), run.student.state_dict(), run.optimizer.state_dict()
            )
            checkpoint.save(run.folder / "checkpoints", state, run.config.keep_checkpoints)
        run.processes.wait()
