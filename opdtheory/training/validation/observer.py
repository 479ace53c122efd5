"""`opdtheory train --validate-every N`: check the gradient of the run's own loss while the student trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdtheory.training.batches import longest, task_prompts
from opdtheory.training.config import TrainConfig
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.tasks import Task
from opdtheory.training.validation.comparison import compare
from opdtheory.training.validation.prefixes import Prefixes

if TYPE_CHECKING:
    from opdtheory.training.run import Run

__all__ = ["task_prefixes", "validate_run"]

# Enough for a confidence interval, few enough to be cheap compared with a step.
_PROMPTS, _DRAWS, _DIRECTIONS = 8, 64, 4


def task_prefixes(
    config: TrainConfig,
    task: Task,
    student: LanguageModel,
    teacher: LanguageModel,
    count: int,
    *,
    problems: int,
    seed: int,
) -> Prefixes:
    """Prefixes of the student's answers to `count` problems of the test split, drawn with the seed `problems`.

    They are sampled as the run samples: at another temperature than the scores', the sampler is not the student (T8).
    """
    return Prefixes.sample(
        student,
        teacher,
        task_prompts(student, task.examples("test", count, problems)),
        max_new_tokens=longest(task, config),
        temperature=config.temperature,
        sampling_temperature=config.sampling_temperature,
        environment=task.environment,
        seed=seed,
    )


def validate_run(run: Run, finished: int) -> dict[str, float]:
    """The metrics of a validation on problems of the test split; every process gets those of the first."""
    found: dict[str, float] = {}
    if run.processes.is_first:
        config, seed = run.config, run.config.seed + finished
        models = run.student, run.teacher
        prefixes = task_prefixes(config, run.task, *models, _PROMPTS, problems=config.seed, seed=seed)
        result = compare(prefixes, run.loss, draws=_DRAWS, directions=_DIRECTIONS, seed=seed)
        found = {
            "validation_agrees": float(result.agrees),
            "validation_bias": result.bias,
            "validation_predicted_bias": result.predicted_bias,
            "validation_discrepancy": result.discrepancy,
            "validation_z": result.z or 0.0,
            "validation_signal_to_noise": result.signal_to_noise or 0.0,
        }
        if result.cosine is not None:
            found["validation_cosine"] = result.cosine
    shared: dict[str, float] = run.processes.from_first(found)
    return shared
