"""A training run: what its steps use, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from opdtheory.estimators import Estimator
from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import Processes
from opdtheory.training.metrics import Metrics
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.tasks import Task

__all__ = ["Observer", "RolloutMonitor", "Run", "TrainResult"]


@runtime_checkable
class RolloutMonitor(Protocol):
    """What a step asks of a monitor: to take the log-probabilities of its tokens, and to say what they foretell."""

    def add(
        self,
        student_logprobs: Any,
        teacher_logprobs: Any,
        behavior_logprobs: Any = None,
        mask: Any = None,
        *,
        entropy: Any = None,
    ) -> None:
        """Take the tokens of some rollouts, `(B, T)` each."""

    def step(self, number: int | None = None) -> dict[str, float]:
        """The metrics of the tokens since the last call."""


@dataclass
class Run:
    """What a step uses.

    Attributes:
        config: the settings.
        processes: this process among those of the run.
        task: the task, which makes prompts and verifies answers.
        student: the model that is trained, in place.
        teacher: the model that scores, frozen.
        loss: the loss that is minimised.
        optimizer: AdamW on the student's parameters.
        metrics: rows of finished steps.
        monitor: in the first process, what watches the rollouts of all; None if nothing does.
    """

    config: TrainConfig
    processes: Processes
    task: Task
    student: LanguageModel
    teacher: LanguageModel
    loss: Estimator
    optimizer: torch.optim.Optimizer
    metrics: Metrics
    monitor: RolloutMonitor | None = None

    @property
    def folder(self) -> Path | None:
        """The folder of the run, or None."""
        return None if self.config.out is None else Path(self.config.out)


Observer = Callable[[Run, int], Mapping[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        student: the trained model.
        config: the settings.
        rows: the metrics of every step, as in `metrics.jsonl`; the evaluation at the start has step 0.
    """

    student: LanguageModel = field(repr=False)
    config: TrainConfig
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows with an evaluation."""
        return [row for row in self.rows if "greedy_accuracy" in row]
