"""Checkpoints: written atomically, so that a kill at any moment leaves the last one whole."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdtheory.errors import InvalidArgumentError

__all__ = ["Checkpoint", "load", "locked", "newest", "save", "write_atomically"]

_FORMAT = 1
_NAME = re.compile(r"step_(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on: nothing random is in it, for every draw is seeded by its step.

    Attributes:
        step: steps finished.
        config: `TrainConfig.identity()` of the run that wrote it.
        student: state dict.
        optimizer: state dict.
    """

    step: int
    config: dict[str, Any]
    student: dict[str, Any]
    optimizer: dict[str, Any]

    def check_config(self, config: dict[str, Any], where: str | Path) -> None:
        """Refuse to continue a run of another configuration.

        Raises:
            InvalidArgumentError: names the first field that differs, with both values.
        """
        for name in sorted({*self.config, *config}):
            before, now = self.config.get(name), config.get(name)
            if before != now:
                raise InvalidArgumentError(
                    name, f"is {now!r}, but the run in {where} had {before!r}; resume it as it was, or name another out"
                )


def save(folder: str | Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write a checkpoint atomically, then remove all but the newest `keep`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{checkpoint.step:08d}.pt"
    write_atomically(path, {"format": _FORMAT, **vars(checkpoint)})
    for old in _paths(folder)[keep:]:
        old.unlink()
    return path


def newest(folder: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, or None; a damaged one is passed over with a warning.

    Raises:
        InvalidArgumentError: there are checkpoints, but none can be read.
    """
    folder = Path(folder)
    for left_over in folder.glob("step_*.pt.*.tmp"):  # a kill came between writing and renaming
        left_over.unlink()
    paths = _paths(folder)
    for path in paths:
        try:
            return load(path)
        except InvalidArgumentError as error:
            warnings.warn(f"passed over a checkpoint: {error}", stacklevel=2)
    if paths:
        raise InvalidArgumentError("out", f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep other processes from the folder of a run; the system lifts the lock also from one that was killed.

    Raises:
        InvalidArgumentError: another process trains there.
    """
    if folder is None or os.name != "posix":
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidArgumentError("out", f"another process trains in {folder}; name another folder") from None
        yield


def load(path: str | Path) -> Checkpoint:
    """A checkpoint from its file; only tensors and plain values are unpickled.

    Raises:
        InvalidArgumentError: the file is missing, damaged, or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidArgumentError("checkpoint", f"{path} cannot be read: {first}") from None
    if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
        raise InvalidArgumentError("checkpoint", f"{path} is no checkpoint of format {_FORMAT}")
    return Checkpoint(**state)


def write_atomically(path: Path, value: Any) -> None:
    """Save tensors and plain values so that `path` holds the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name itself is on the disk only once its folder is.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step_*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
