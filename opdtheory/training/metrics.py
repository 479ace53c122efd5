"""The metrics of a run: JSON lines that survive a kill, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.storage import whole_file

__all__ = ["Metrics"]


class Metrics:
    """The rows of a run, one mapping for each finished step, in a list and in files.

    Args:
        folder: folder of `metrics.jsonl`, from which rows after `step` are removed; None writes no file.
        step: number of steps that are already finished.
        tensorboard: write event files into `folder/tensorboard`.
        show: called with each row.

    Raises:
        InvalidArgumentError: TensorBoard is requested but not installed, or there is no folder for it.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int,
        *,
        tensorboard: bool = False,
        show: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        self._board = _tensorboard(folder, step) if tensorboard else None
        self.rows: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.rows, self._file = _reopen(folder / "metrics.jsonl", step)
        self._show = show

    def add(self, row: Mapping[str, Any]) -> None:
        """Record a step and write its line to the file. Infinite values become null."""
        clean = {key: _finite(value) for key, value in row.items()}
        self.rows.append(clean)
        if self._file is not None:
            self._file.write(json.dumps(clean, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in clean.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, clean["step"])
        if self._show is not None:
            self._show(clean)

    def sync(self) -> None:
        """Wait until the rows are on the disk, which must come before the checkpoint of their step."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reopen(path: Path, step: int) -> tuple[list[dict[str, Any]], IO[str]]:
    """The intact rows up to a step, and the file without anything else: later steps, damaged lines, half a line."""
    rows: list[dict[str, Any]] = []
    before = path.read_bytes() if path.exists() else b""
    kept = []
    for line in before.split(b"\n")[:-1]:
        row = _row(line)
        # Steps only rise, unless a number is damaged.
        if row is not None and (rows[-1]["step"] if rows else -1) < row["step"] <= step:
            rows.append(row)
            kept.append(line + b"\n")
    whole = b"".join(kept)
    if whole == before[: len(whole)]:
        file = open(path, "a", encoding="utf-8")
        file.truncate(len(whole))
        return rows, file
    with whole_file(path) as rewritten:
        rewritten.write(whole)
    return rows, open(path, "a", encoding="utf-8")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if found else None


def _tensorboard(folder: Path | None, step: int) -> Any:
    if folder is None:
        raise InvalidArgumentError("tensorboard", "must have a folder: set out, the folder of the run")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InvalidArgumentError("tensorboard", 'must be installed: pip install "opdtheory[tensorboard]"') from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
