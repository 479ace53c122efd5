"""A process that reads parts of a run; it is started by `Workers` and speaks pickle on its standard streams."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

from opdtheory.errors import OpdTheoryError
from opdtheory.monitoring.files.blocks import Findings
from opdtheory.monitoring.files.fields import Mapped
from opdtheory.monitoring.files.lines import Piece, read_piece

__all__ = ["Task", "TensorFile", "Workers", "main"]

# Tasks that a process is given before the first of them is fetched.
_AHEAD = 2

_Tag = TypeVar("_Tag")


@dataclass(frozen=True)
class TensorFile:
    """A file of torch, read whole.

    Attributes:
        path: the file.
        step: the step of records that have none.
        mapped: the user's names.
    """

    path: Path
    step: int | None
    mapped: Mapped


Task: TypeAlias = Piece | TensorFile


def _parts(task: Task) -> list[Findings]:
    if isinstance(task, Piece):
        return [read_piece(task)]
    # Loads torch, which lines do not need.
    from opdtheory.monitoring.files.tensors import read_tensors

    return [found for _, found in read_tensors(task.path, task.step, task.mapped)]


def main() -> None:
    """Read tasks until the parent closes the stream."""
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            found: list[Findings] | Exception = _parts(task)
        except Exception as error:  # for the parent to raise
            found = error
        try:
            pickle.dump(found, sys.stdout.buffer, protocol=5)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            return


class Workers:
    """Processes that share the tasks.

    They are plain subprocesses, which do not import the caller's main module, so any script may use them.
    """

    def __init__(self, count: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        environment |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from opdtheory.monitoring.files.worker import main; main()"]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # an interrupt is the parent's to handle
            )
            for _ in range(count)
        ]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        pass
            process.wait()

    def read(self, tasks: Iterable[tuple[_Tag, Task]]) -> Iterator[tuple[_Tag, list[Findings] | Exception]]:
        """What each task found, or the error that it raised, in their order; a bounded number is in flight.

        Raises:
            OpdTheoryError: a process ended early.
        """
        waiting: deque[tuple[_Tag, subprocess.Popen[bytes]]] = deque()
        turn = 0
        for tag, task in tasks:
            process = self._processes[turn % len(self._processes)]
            turn += 1
            self._send(process, task)
            waiting.append((tag, process))
            if len(waiting) >= _AHEAD * len(self._processes):
                yield self._fetch(*waiting.popleft())
        while waiting:
            yield self._fetch(*waiting.popleft())

    def _send(self, process: subprocess.Popen[bytes], task: Task) -> None:
        try:
            stream = _opened(process.stdin)
            pickle.dump(task, stream)
            stream.flush()
        except BrokenPipeError:
            raise _ended(process) from None

    def _fetch(self, tag: _Tag, process: subprocess.Popen[bytes]) -> tuple[_Tag, list[Findings] | Exception]:
        try:
            found = pickle.load(_opened(process.stdout))
        except EOFError:
            raise _ended(process) from None
        return tag, found


def _opened(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _ended(process: subprocess.Popen[bytes]) -> OpdTheoryError:
    return OpdTheoryError(f"a process that reads the run ended with status {process.wait()}")
