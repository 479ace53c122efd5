"""`opdtheory train --validate-every N`: the gradient of the run's own loss, checked as the student moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdtheory.training.validation.comparison import compare
from opdtheory.training.validation.prefixes import Prefixes

if TYPE_CHECKING:
    from opdtheory.training.run import Run

__all__ = ["validate_run"]

# Enough for a confidence interval, few enough to be cheap beside a step.
_PROMPTS, _DRAWS, _DIRECTIONS = 8, 64, 4


def validate_run(run: Run, finished: int) -> dict[str, float]:
    """The metrics of a validation on problems of the test split; every process gets the first one's."""
    found: dict[str, float] = {}
    if run.processes.is_first:
        config = run.config
        examples = run.task.examples("test", _PROMPTS, config.seed)
        prompts = [run.student.vocabulary.encode(example.prompt) for example in examples]
        prefixes = Prefixes.sample(
            run.student,
            run.teacher,
            prompts,
            max_new_tokens=config.max_new_tokens or run.task.max_response,
            temperature=config.temperature,
            environment=run.task.environment,
            seed=config.seed + finished,
        )
        result = compare(prefixes, run.loss, draws=_DRAWS, directions=_DIRECTIONS, seed=config.seed + finished)
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
