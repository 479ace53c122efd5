"""Checkpoints: written atomically, so that a kill at any moment leaves the last one intact."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.storage import whole_file

__all__ = ["Checkpoint", "load", "locked", "newest", "save"]

_FORMAT = 1

# The first line of a file, before its SHA-256 and the state by `torch.save`. Older files are that state alone.
_HEAD = b"opdtheory checkpoint, sha256 of what follows:\n"
_DIGEST = 64
_NAME = re.compile(r"step_(\d+)\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to resume. No generator's state is in it: every draw is seeded by its step.

    Attributes:
        step: number of finished steps.
        config: `TrainConfig.identity()` of the run that wrote it.
        student: state dict of the student.
        optimizer: state dict of the optimiser.
    """

    step: int
    config: dict[str, Any]
    student: dict[str, Any]
    optimizer: dict[str, Any]

    def check_config(self, config: dict[str, Any], where: str | Path) -> None:
        """Raise unless the configuration is that of the run.

        Raises:
            InvalidArgumentError: a field differs; the error names the first one, with both values.
        """
        for name in sorted({*self.config, *config}):
            before, now = self.config.get(name), config.get(name)
            if before != now:
                raise InvalidArgumentError(
                    name, f"must be {before!r}, as in the run in {where}, got {now!r}; or choose another folder as out"
                )


def save(folder: str | Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write a checkpoint atomically with its SHA-256, then remove all but the newest `keep` ones."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{checkpoint.step:08d}.pt"
    state = io.BytesIO()
    torch.save({"format": _FORMAT, **vars(checkpoint)}, state)
    with whole_file(path) as file:
        file.write(_HEAD + hashlib.sha256(state.getbuffer()).hexdigest().encode() + b"\n")
        file.write(state.getbuffer())
    for old in _paths(folder)[keep:]:
        if not old.is_dir():
            old.unlink()
    return path


def newest(folder: str | Path) -> Checkpoint | None:
    """The newest intact checkpoint of a folder, or None; damaged ones are skipped with a warning.

    Raises:
        InvalidArgumentError: there are checkpoints, but none can be read.
    """
    folder = Path(folder)
    for left_over in folder.glob("step_*.pt.*.tmp"):  # from a kill between writing and renaming
        if not left_over.is_dir():
            left_over.unlink()
    paths = _paths(folder)
    for path in paths:
        try:
            return load(path)
        except InvalidArgumentError as error:
            warnings.warn(f"skipped a checkpoint: {error}", stacklevel=2)
    if paths:
        raise InvalidArgumentError(
            "out", f"must hold a readable checkpoint, but none of the {len(paths)} in {folder} can be read"
        )
    return None


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Lock the folder of a run against other processes; the system also releases the lock of a killed process.

    Raises:
        InvalidArgumentError: another process is training there.
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
            raise InvalidArgumentError(
                "out", f"must not be in use, but another process is training in {folder}; choose another folder"
            ) from None
        yield


def load(path: str | Path) -> Checkpoint:
    """Load a checkpoint; only tensors and plain values are unpickled.

    Raises:
        InvalidArgumentError: the file is missing, damaged, or of another format.
    """
    try:
        state = torch.load(io.BytesIO(_verified(Path(path))), map_location="cpu", weights_only=True)
    # What torch raises for a file that it cannot read depends on the bytes that it meets.
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidArgumentError("checkpoint", f"{path} cannot be read: {first}") from None
    if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
        raise InvalidArgumentError("checkpoint", f"{path} is not a checkpoint of format {_FORMAT}")
    kinds = {"step": int, "config": dict, "student": dict, "optimizer": dict}
    if state.keys() != kinds.keys() or not all(isinstance(state[name], kind) for name, kind in kinds.items()):
        raise InvalidArgumentError(
            "checkpoint", f"{path} must hold {', '.join(kinds)}, got {', '.join(map(str, state))}"
        )
    return Checkpoint(**state)


def _verified(path: Path) -> bytes:
    """The state in a file as bytes, once a checksum agrees: the file's own or, in an older file, those of its parts."""
    data = path.read_bytes()
    if data.startswith(_HEAD):
        start = len(_HEAD) + _DIGEST + 1
        digest, state = data[len(_HEAD) : start], data[start:]
        if digest != hashlib.sha256(state).hexdigest().encode() + b"\n":
            raise ValueError("its SHA-256 is not the one that it was written with")
        return state
    damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong")
    return data


def _paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step_*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]
