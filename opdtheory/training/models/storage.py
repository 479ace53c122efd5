"""Tensors on disk: safetensors with a record beside them, written whole, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = ["cache_folder", "checked_record", "load_tensors", "save_tensors", "stored"]

_CHUNK = 2**20


def cache_folder(cache: Path | str | None = None) -> Path:
    """Where models are kept: the argument, else `$OPDTHEORY_CACHE`, else `~/.cache/opdtheory`."""
    return Path(cache or os.environ.get("OPDTHEORY_CACHE") or Path.home() / ".cache" / "opdtheory").expanduser()


def stored(path: Path) -> bool:
    """Whether `save_tensors` finished there."""
    return path.is_file() and _record_of(path).is_file()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """Store tensors and, beside them, a record of JSON values to which their SHA-256 is added.

    The record is written last, so an interrupted call leaves nothing that `stored` accepts.
    """
    data = _safetensors().save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, {"format": "pt"})
    complete = {**record, "sha256": hashlib.sha256(data).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, data)
    _write(_record_of(path), json.dumps(complete, indent=1).encode())
    return complete


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and their record.

    Raises:
        InvalidArgumentError: the file does not have the recorded checksum.
    """
    record = checked_record(path)
    return _safetensors().load_file(path), record


def checked_record(path: Path) -> dict[str, Any]:
    """The record of stored tensors, after a comparison of their checksum.

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
            f"{path} has the SHA-256 {digest.hexdigest()}, not {record.get('sha256')} as recorded when it was written; "
            "delete it and it will be made anew",
        )
    return record


def _record_of(path: Path) -> Path:
    return path.with_suffix(".record.json")


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('models are stored with safetensors: pip install "opdtheory[lm]"') from error
    return safetensors.torch
