"""Files that are complete or absent, and models among them: safetensors with a record and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = ["cache_folder", "checked_record", "load_tensors", "save_tensors", "stored", "whole_file"]

_CHUNK = 2**20


def cache_folder(cache: Path | str | None = None) -> Path:
    """The folder of models: the argument, else `$OPDTHEORY_CACHE`, else `~/.cache/opdtheory`."""
    return Path(cache or os.environ.get("OPDTHEORY_CACHE") or Path.home() / ".cache" / "opdtheory").expanduser()


def stored(path: Path) -> bool:
    """Whether `save_tensors` has finished a file there."""
    return path.is_file() and _record_of(path).is_file()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """Store tensors and, next to them, a record of JSON values with their SHA-256; return the record.

    The record is written last, so an interrupted call leaves nothing that `stored` accepts.
    """
    data = _safetensors().save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, {"format": "pt"})
    complete = {**record, "sha256": hashlib.sha256(data).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((path, data), (_record_of(path), json.dumps(complete, indent=1).encode())):
        with whole_file(target) as file:
            file.write(content)
    return complete


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and their record.

    Raises:
        InvalidArgumentError: the file does not have the recorded checksum.
    """
    record = checked_record(path)
    return _safetensors().load_file(path), record


def checked_record(path: Path) -> dict[str, Any]:
    """The record of stored tensors, once their checksum is verified.

    Raises:
        InvalidArgumentError: the file does not have the recorded checksum.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    record: dict[str, Any] = json.loads(_record_of(path).read_text(encoding="utf-8"))
    if digest.hexdigest() != record.get("sha256"):
        raise InvalidArgumentError(
            "cache",
            f"{path} must have the recorded SHA-256 {record.get('sha256')}, got {digest.hexdigest()}; delete the file "
            "and it will be made again",
        )
    return record


def _record_of(path: Path) -> Path:
    return path.with_suffix(".record.json")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which replaces `path` only when it is complete and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":
        # The new name itself is on the disk only once its folder is.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('models are stored with safetensors: pip install "opdtheory[lm]"') from error
    return safetensors.torch
