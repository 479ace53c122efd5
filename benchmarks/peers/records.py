"""What a run of the GPU benchmark found, as a file."""

from __future__ import annotations

import datetime
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from opdtheory.machine import machine

__all__ = ["fingerprint", "load", "new", "save"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "liger-kernel", "trl")

Record = dict[str, Any]


def new(command: str, asked: list[dict[str, Any]]) -> Record:
    """An empty record of this machine, these packages and today, with the tables that are asked for."""
    return {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": command,
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "kernels": fingerprint(),
        "asked": asked,
        "tables": [],
        "errors": [],
        "profile": [],
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def fingerprint() -> str:
    """A hash of the sources of the losses: another one says that a record is of other programs."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "opdtheory" / "kernels").rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def save(record: Record, path: Path) -> None:
    """Write a record, a line for each row; a run that is cut off leaves the last one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def load(path: Path) -> Record:
    """Read a record."""
    found: Record = json.loads(path.read_text(encoding="utf-8"))
    return found
