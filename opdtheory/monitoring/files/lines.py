"""JSON lines: a file is read in pieces of bytes, each by itself, so that several processes can share the work."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdtheory.monitoring.files.blocks import Findings, Gatherer
from opdtheory.monitoring.files.fields import Mapped

_quick: Callable[[bytes], Any]
try:  # Faster where it is installed; both read a number to the last bit.
    from orjson import loads as _quick
except ImportError:  # pragma: no cover
    _quick = json.loads

__all__ = ["PIECE", "Piece", "compressed", "document", "pieces", "read_piece"]

# Bytes of text that are read at a time.
PIECE = 1 << 23


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin within some bytes.

    Attributes:
        path: the file.
        start: the first byte.
        stop: the first byte that is no longer in the piece.
        step: the step of records that have none.
        mapped: the user's names.
    """

    path: Path
    start: int
    stop: int
    step: int | None
    mapped: Mapped


def pieces(path: Path, step: int | None, mapped: Mapped, size: int = PIECE) -> Iterator[Piece]:
    """The pieces of a file, as long as it is now."""
    total = path.stat().st_size
    for start in range(0, total, size):
        yield Piece(path, start, min(start + size, total), step, mapped)


def read_piece(piece: Piece) -> Findings:
    """The records of a piece."""
    gatherer = Gatherer(piece.mapped, piece.step)
    with piece.path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()
        _gather(gatherer, _until(file, piece.stop))
    return gatherer.done()


def compressed(path: Path, step: int | None, mapped: Mapped) -> Iterator[tuple[int, Findings]]:
    """The records of a gzip file, part by part, with the compressed bytes read so far."""
    gatherer = Gatherer(mapped, step)
    with path.open("rb") as raw, gzip.open(raw) as file:
        for lines in _batches(file, gatherer):
            _gather(gatherer, lines)
            yield raw.tell(), gatherer.done()
    yield path.stat().st_size, gatherer.done()


def _batches(file: Any, gatherer: Gatherer) -> Iterator[list[bytes]]:
    """Lines, some at a time; the end of a file that is cut off is a fault."""
    lines: list[bytes] = []
    size = 0
    while True:
        try:
            line = file.readline()
        except (EOFError, zlib.error):
            gatherer.findings.fault("truncated")
            line = b""
        if not line:
            yield lines
            return
        lines.append(line)
        size += len(line)
        if size >= PIECE:
            yield lines
            lines, size = [], 0


def document(path: Path, step: int | None, mapped: Mapped) -> Findings:
    """The records of a JSON document: one object, or a list of them.

    Raises:
        ValueError: it is not JSON.
    """
    gatherer = Gatherer(mapped, step)
    whole = _parsed(path.read_bytes())
    for record in whole if isinstance(whole, list) else [whole]:
        gatherer.findings.lines += 1
        if isinstance(record, dict):
            gatherer.add(record)
        else:
            gatherer.findings.fault("damaged")
    return gatherer.done()


def _until(file: Any, stop: int) -> Iterator[bytes]:
    place = file.tell()
    while place < stop:
        line = file.readline()
        if not line:
            return
        place += len(line)
        yield line


def _gather(gatherer: Gatherer, lines: Iterable[bytes]) -> None:
    for line in lines:
        gatherer.findings.lines += 1
        if line.isspace():
            continue
        try:
            record = _parsed(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            gatherer.add(record)
        else:
            gatherer.findings.fault("damaged" if line.endswith(b"\n") else "truncated")


def _parsed(text: bytes) -> Any:
    try:
        return _quick(text)
    except ValueError:
        # NaN and Infinity are no JSON, but Python writes them.
        return json.loads(text)
