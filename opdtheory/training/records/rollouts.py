"""The rollouts of a step in a file, and before a monitor: log-probabilities of the sampled tokens before any update.

A record holds the global batch, whatever number of processes sampled it, in the order of the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from opdtheory.monitoring import Monitor
from opdtheory.rollouts import Rollouts
from opdtheory.training.config import TrainConfig
from opdtheory.training.measures import entropies
from opdtheory.training.models.storage import whole_file
from opdtheory.training.run import RolloutMonitor, Run

__all__ = ["StepLog", "joined", "monitor_of", "record_path", "rows_of", "save_record"]

_LOGPROBS = ("student_logprobs", "teacher_logprobs", "behavior_logprobs")
_LOGITS = ("student_logits", "teacher_logits")


@torch.no_grad()
def rows_of(rollouts: Rollouts, *, logits: bool = False) -> dict[str, Tensor]:
    r"""What is kept of some rollouts, on the CPU; 0 where masked.

    Args:
        rollouts: the rollouts, whose distributions include the temperature.
        logits: keep whole rows of logits, in float32.

    Returns:
        `tokens`, `mask`, `student_logprobs`, `teacher_logprobs`, `behavior_logprobs` and `entropy`, the student's, each
        `(B, T)`, in nats; and `student_logits` and `teacher_logits`, `(B, T, V)`.
    """
    live = rollouts.mask > 0
    rows = {"tokens": rollouts.tokens, "mask": rollouts.mask}
    rows |= {name: torch.where(live, getattr(rollouts, name), 0.0) for name in _LOGPROBS}
    rows["entropy"] = entropies(rollouts)
    if logits:
        rows |= {name: torch.where(live.unsqueeze(-1), getattr(rollouts, name), 0.0).float() for name in _LOGITS}
    return {name: value.detach().cpu() for name, value in rows.items()}


def joined(parts: Sequence[Mapping[str, Tensor]], padding: int = 0) -> dict[str, Tensor]:
    """The rows of all parts, padded on the right to one length, with `padding` as the token there."""
    longest = max(part["tokens"].shape[1] for part in parts)

    def padded(name: str, value: Tensor) -> Tensor:
        room = (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1])
        return pad(value, room, value=padding if name == "tokens" else 0.0)

    return {name: torch.cat([padded(name, part[name]) for part in parts]) for name in parts[0]}


def record_path(folder: Path, finished: int) -> Path:
    """The file of a step's rollouts, the step counted from 1 as in the metrics."""
    return folder / "rollouts" / f"step_{finished:08d}.pt"


def save_record(folder: Path, finished: int, rows: Mapping[str, Tensor]) -> Path:
    """Write the rows of a step, whole or not at all, and its number `step`: tensors, which `weights_only` loads."""
    path = record_path(folder, finished)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save({"step": torch.tensor(finished), **rows}, file)
    return path


def monitor_of(config: TrainConfig) -> RolloutMonitor:
    """A monitor of the run's own estimator, which has seen no step yet, also where the run is resumed."""
    return Monitor(config.loss(), together=config.rollouts_per_prompt)


class StepLog:
    """The rollouts of a step on their way to its record and its monitor; neither, unless the run asks for it.

    Args:
        run: the run.
        finished: number of the step, counted from 1.
    """

    def __init__(self, run: Run, finished: int) -> None:
        self._run, self._finished = run, finished
        self._is_recorded = run.config.records(finished)
        self._is_wanted = self._is_recorded or run.config.monitor
        self._rows: list[dict[str, Tensor]] = []

    def add(self, rollouts: Rollouts) -> None:
        """Take some rollouts of this process, in order."""
        if self._is_wanted:
            self._rows.append(rows_of(rollouts, logits=self._is_recorded and self._run.config.record_logits))

    def finish(self) -> dict[str, float]:
        """Record and monitor the rollouts of all processes, in the first one; return the metrics, to every process."""
        if not self._is_wanted:
            return {}
        run, found = self._run, dict[str, float]()
        parts = [part for rows in run.processes.gather(self._rows) for part in rows]
        if parts:
            whole = joined(parts, run.student.vocabulary.pad)
            if run.folder is not None and self._is_recorded:
                save_record(run.folder, self._finished, whole)
            if run.monitor is not None:
                student, teacher, behavior = (whole[name] for name in _LOGPROBS)
                run.monitor.add(student, teacher, behavior, whole["mask"], entropy=whole["entropy"])
                found = run.monitor.step(self._finished)
        shared: dict[str, float] = run.processes.from_first(found)
        return shared
