"""One job of the experiment in its own process: `python -m opdtheory.reproduction.arm < job.json`.

A job trains a model that the cache lacks, or runs one arm and writes its row. A failed step, such as a loss that is not
finite, is a result, so it makes a row too.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opdtheory.errors import TrainingError
from opdtheory.machine import cores, processor
from opdtheory.reproduction.plan import STARTS, Arm
from opdtheory.reproduction.theory import objective_value
from opdtheory.training.config import TrainConfig
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.storage import whole_file
from opdtheory.training.pairs import Recipe, Role, load_model, recipe_for
from opdtheory.training.tasks import Task
from opdtheory.training.tasks import task as task_of
from opdtheory.training.trainer import train
from opdtheory.training.validation import Prefixes, compare
from opdtheory.training.validation.observer import task_prefixes

__all__ = ["machine", "main", "model_keys", "recipe_of", "run_arm"]

_CURVE = (
    *("reverse_kl", "forward_kl", "entropy", "gradient_norm"),
    *("clip_fraction", "response_length", "sampled_accuracy"),
)
_POINTS = 40  # of a curve
_DIGITS = 5
_BIAS_ROLLOUTS, _BIAS_DIRECTIONS, _BIAS_DRAWS = 32, 2, 2
_OBJECTIVE_ROLLOUTS = 64
_PROBE_SEED = 12345  # for the rollouts on which bias and objective are measured


# SmolLM2 trained further on demonstrations: the teacher whole, the student for fewer steps and without six layers.
_COPIES: dict[Role, dict[str, Any]] = {
    "teacher": {"width": 576, "layers": 30, "heads": 9, "steps": 300, "batch_size": 16, "learning_rate": 1e-4},
    "student": {"width": 576, "layers": 24, "heads": 9, "steps": 100, "batch_size": 16, "learning_rate": 1e-4},
}


def model_keys(task: str, seed: int, base: str | None = None) -> dict[str, str]:
    """The keys of an arm's student and teacher, which change with their recipes."""
    return {"student": recipe_of(task, "student", seed, base).key, "teacher": recipe_of(task, "teacher", 0, base).key}


def recipe_of(task: str, role: Role, seed: int, base: str | None = None) -> Recipe:
    """The recipe of a model of the experiment: students that start alike, or copies of a pretrained model."""
    if base is not None:
        return Recipe(task, role, seed, base=base, **_COPIES[role])
    return recipe_for(task, role, seed, STARTS.get(task) if role == "student" else None)


def run_arm(arm: Arm, *, cache: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Train one arm, measure it at the start and at the end, and return its row as JSON values."""
    wall, processor_time = time.perf_counter(), time.process_time()
    task = task_of(arm.task)
    student, teacher = _models(arm, cache)
    config = arm.config(device=device, cache=cache, progress=False)
    row: dict[str, Any] = {
        **{"name": arm.name, "group": arm.group, "task": arm.task, "seed": arm.seed, "identity": arm.identity},
        "models": model_keys(arm.task, arm.seed, arm.base),
        "status": "finished",
        "machine": machine(),
    }
    try:
        # Of a large model, bias and objective in float64 would take longer than the run.
        small = arm.base is None
        row["bias"] = _bias(config, _probe(config, task, student, teacher, _BIAS_ROLLOUTS)) if small else None
        row["objective"] = [_objective(config, task, student, teacher) if small else None]
        result = train(config, student=student, teacher=teacher, task=task)
        row["objective"].append(_objective(config, task, result.student, teacher) if small else None)
        row |= {"start": result.evaluations[0], "end": result.evaluations[-1], "curve": _curve(result.rows)}
        row["end"] = {name: value for name, value in row["end"].items() if name not in _CURVE}
        row["means"] = {name: _mean([each.get(name) for each in result.rows[1:]]) for name in _CURVE}
    except TrainingError as error:
        row |= {"status": "failed", "error": str(error)}
    row["seconds"] = time.perf_counter() - wall
    row["processor_seconds"] = time.process_time() - processor_time
    rounded: dict[str, Any] = _rounded(row)
    return rounded


def _models(arm: Arm, cache: str | None) -> tuple[LanguageModel, LanguageModel]:
    student, _ = load_model(recipe_of(arm.task, "student", arm.seed, arm.base), cache=cache)
    teacher, _ = load_model(recipe_of(arm.task, "teacher", 0, arm.base), cache=cache)
    return student, teacher.requires_grad_(False)


def machine() -> dict[str, Any]:
    """The machine on which a row is measured."""
    software = {"torch": str(torch.__version__), "python": platform.python_version()}
    found = {"processor": processor(), "cores": cores(), **software}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _probe(config: TrainConfig, task: Task, student: LanguageModel, teacher: LanguageModel, count: int) -> Prefixes:
    # In float64 the sums over the vocabulary are exact to rounding, even for weights that grow like u.
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    return task_prefixes(config, task, student, teacher, count, problems=_PROBE_SEED, seed=_PROBE_SEED)


def _bias(config: TrainConfig, prefixes: Prefixes) -> dict[str, Any] | None:
    """The expected gradient of the estimator, its clip included, against the exact one of its divergence."""
    if config.control is not None:
        return None
    found = compare(prefixes, config.loss(), draws=_BIAS_DRAWS, directions=_BIAS_DIRECTIONS).to_dict()
    kept = ("bias", "predicted_bias", "discrepancy", "agrees", "cosine", "variance", "signal_to_noise", "rollouts")
    return {name: found[name] for name in (*kept, "prefixes")}


def _objective(config: TrainConfig, task: Task, student: LanguageModel, teacher: LanguageModel) -> float | None:
    prefixes = _probe(config, task, student.cpu(), teacher.cpu(), _OBJECTIVE_ROLLOUTS)
    return objective_value(config, prefixes.log_p, prefixes.log_q)


def _curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Some `_POINTS` steps of the run, among them the last."""
    steps = [row for row in rows if row["step"] > 0]
    every = max(1, len(steps) // _POINTS)
    kept = [row for row in steps if (row["step"] - 1) % every == 0 or row is steps[-1]]
    return {name: [row.get(name) for row in kept] for name in ("step", *_CURVE) if name in kept[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return sum(finite) / len(finite) if finite else None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def main() -> int:
    """Do the job that standard input describes, as JSON."""
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    if "role" in job:
        load_model(recipe_of(job["task"], job["role"], job["seed"], job["base"]), cache=job["cache"])
        return 0
    row = run_arm(Arm(**job["arm"]), cache=job["cache"], device=job["device"])
    with whole_file(Path(job["out"])) as file:
        file.write(json.dumps(row, allow_nan=False).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
