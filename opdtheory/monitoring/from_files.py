r"""`diagnose_file`: what the files of a run say, read step by step."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch

from opdtheory.divergences import Divergence
from opdtheory.estimators import Estimator
from opdtheory.monitoring.files.reading import Progress, read_run
from opdtheory.monitoring.monitor import CollapseWarning, Monitor
from opdtheory.monitoring.report import Diagnosis

__all__ = ["diagnose_file"]

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def diagnose_file(
    path: Paths,
    estimator: str | Estimator = "opd",
    divergence: str | Divergence | None = None,
    *,
    student: str | None = None,
    teacher: str | None = None,
    behavior: str | None = None,
    mask: str | None = None,
    together: int = 1,
    batch_tokens: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Diagnosis:
    """What the log-probabilities in a run's files say of it, over its steps.

    The fields of TRL, verl, slime, prime-rl, NeMo-RL, ms-swift, OpenRLHF and of our own trainer are recognised; the
    names of others are given. Memory does not grow with the run.

    Args:
        path: files that end in `.jsonl`, `.jsonl.gz`, `.json`, `.parquet`, `.pt` or `.pth`, or folders of them.
        estimator: the estimator in use, or its name.
        divergence: the divergence that it is for, where the name needs one; the reverse KL by default.
        student: the field of the student's log-probabilities, in nats.
        teacher: the teacher's.
        behavior: those of the engine or policy that sampled.
        mask: 1 on tokens that count.
        together: the number of rollouts of one prompt, which stand next to each other.
        batch_tokens: tokens of one optimiser step; by default the median of the run's own steps.
        progress: called with the bytes done and all bytes.
        **options: further options of `opdtheory.estimator`, such as `clip_log_ratio`.

    Raises:
        InvalidArgumentError: there is no such file, fields are missing, no token can be used, or as for `diagnose`.
    """
    monitor = Monitor(estimator, divergence, together=together, **options)
    with (
        _one_thread(),
        warnings.catch_warnings(),
        read_run(path, student=student, teacher=teacher, behavior=behavior, mask=mask, progress=progress) as reader,
    ):
        # The diagnosis itself says it.
        warnings.simplefilter("ignore", CollapseWarning)
        now: int | None = None
        trainers = set()
        for chunk in reader:
            if chunk.step != now:
                monitor.step(now)
                now = chunk.step
            monitor.add_tokens(chunk.tokens)
            trainers.add(chunk.trainer)
        monitor.step(now)
        names = sorted(name for name in trainers if name is not None)
        called = reader.sources[0].name if len(reader.sources) == 1 else f"{len(reader.sources):,} files"
        source = called + (f" of {' and '.join(names)}" if names else "")
        return monitor.diagnosis(source, batch_tokens=batch_tokens, left_out=reader.left_out.words)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch: the sums are too small to gain from more, and the processes that parse need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
