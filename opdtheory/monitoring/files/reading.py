"""A run's files as chunks of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import groupby
from types import TracebackType
from typing import TypeAlias

from opdtheory.errors import InvalidArgumentError
from opdtheory.machine import cores
from opdtheory.monitoring.files.blocks import Findings
from opdtheory.monitoring.files.chunks import Chunk, Grouper, Scales, chunk_of
from opdtheory.monitoring.files.faults import LeftOut
from opdtheory.monitoring.files.fields import Mapped, no_field
from opdtheory.monitoring.files.lines import compressed, document, pieces, read_piece
from opdtheory.monitoring.files.paths import Source, sources
from opdtheory.monitoring.files.tables import read_table
from opdtheory.monitoring.files.tensors import read_tensors
from opdtheory.monitoring.files.worker import Task, TensorFile, Workers

__all__ = ["Chunk", "Progress", "RunReader", "read_run"]

Progress: TypeAlias = Callable[[int, int], object]
Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Bytes from which further processes pay, the most of them, and the largest file of torch that one is given whole.
_SHARED, _MOST, _WHOLE = 1 << 26, 8, 1 << 26

# Records among which a field that the user named must appear, and which must not all be unusable.
_RECORDS = 1000


def read_run(
    paths: Paths,
    *,
    student: str | None = None,
    teacher: str | None = None,
    behavior: str | None = None,
    mask: str | None = None,
    progress: Progress | None = None,
) -> RunReader:
    """The chunks of a run, and what was left out of them.

    Args:
        paths: files that end in `.jsonl`, `.jsonl.gz`, `.json`, `.parquet`, `.pt` or `.pth`, or folders of them.
        student: the field of the student's log-probabilities, in nats; recognised by default, as are the others.
        teacher: the teacher's.
        behavior: those of the engine or policy that sampled.
        mask: 1 on tokens that count; the only mask, if it is given.
        progress: called with the bytes done and all bytes.

    Large runs are read by further processes, as many as there are cores. Where other programs keep the cores busy, one
    thread for torch (`OMP_NUM_THREADS=1`) is much faster than several.

    Raises:
        InvalidArgumentError: there is no such file. While reading: a field is missing from every record, holds no
            log-probabilities, or no token at all can be used.
        IntegrationError: Parquet is read without pyarrow.
    """
    return RunReader(paths, Mapped(student, teacher, behavior, mask), progress)


class RunReader(Iterator[Chunk]):
    """An iterator of chunks.

    Attributes:
        left_out: what was not used; complete after the last chunk.
        sources: the files, in the order in which they are read.
    """

    def __init__(self, paths: Paths, mapped: Mapped, progress: Progress | None = None) -> None:
        self.left_out = LeftOut()
        self.sources = sources(paths)
        self._mapped = mapped
        self._progress = progress
        self._done, self._total = 0, sum(source.size for source in self.sources)
        self._lines: dict[str, int] = {}
        self._names: set[str] = set()
        self._trainers: set[str] = set()
        self._usable = False
        self._scales = Scales()
        self._chunks = self._read()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> RunReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading, and end the processes that help."""
        self._chunks.close()

    def _read(self) -> Generator[Chunk, None, None]:
        grouper = Grouper()
        for source, found, done in self._findings():
            self._count(source, found)
            for block in found.blocks:
                self._scales.add(block)
                for key, whole in grouper.add(block):
                    if (chunk := chunk_of(key, whole, self.left_out)) is not None:
                        yield chunk
            self._done += done
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)
        for key, whole in grouper.rest():
            if (chunk := chunk_of(key, whole, self.left_out)) is not None:
                yield chunk
        self._check()

    def _count(self, source: Source, found: Findings) -> None:
        before = self._lines.get(source.name, 0)
        unit = "line" if source.kind in ("lines", "gzip") else "record"
        for fault, count in found.faults.items():
            self.left_out.add(fault, count, f"{source.name}, {unit} {before + found.first[fault]}")
        self._lines[source.name] = before + found.lines
        self.left_out.records += found.records
        self.left_out.stand_ins += found.stand_ins
        self._names |= found.names
        self._trainers |= found.trainers
        self._usable |= found.usable
        if self.left_out.records >= _RECORDS and not self._usable and (error := self._no_field()):
            raise error

    def _check(self) -> None:
        """Raise unless the run could be used."""
        self._scales.check()
        if not self._usable and self._names and (error := self._no_field()):
            raise error
        if not self.left_out.tokens:
            words = " ".join(self.left_out.words) or "there is no record."
            raise InvalidArgumentError("path", f"{self._called} holds no token that can be used. {words}")

    def _no_field(self) -> InvalidArgumentError | None:
        return no_field(self._mapped, self._names, self._trainers)

    @property
    def _called(self) -> str:
        return self.sources[0].name if len(self.sources) == 1 else f"the run of {len(self.sources):,} files"

    def _findings(self) -> Iterator[tuple[Source, Findings, int]]:
        """What each part of each file holds, and its bytes."""
        count = min(cores(), _MOST)
        much = sum(source.size for source in self.sources if _shared(source)) >= _SHARED
        workers = Workers(count) if much and count > 1 else None
        try:
            for shared, some in groupby(self.sources, _shared):
                if shared and workers is not None:
                    yield from self._by_workers(some, workers)
                else:
                    for source in some:
                        yield from self._of_file(source)
        finally:
            if workers is not None:
                workers.close()

    def _by_workers(self, some: Iterator[Source], workers: Workers) -> Iterator[tuple[Source, Findings, int]]:
        def tasks() -> Iterator[tuple[tuple[Source, int], Task]]:
            for source in some:
                if source.kind == "lines":
                    for piece in pieces(source.path, source.step, self._mapped):
                        yield (source, piece.stop - piece.start), piece
                else:
                    yield (source, source.size), TensorFile(source.path, source.step, self._mapped)

        for (source, size), parts in workers.read(tasks()):
            if isinstance(parts, Exception):
                self._unreadable(source, parts)
                parts = []
            for found in parts:
                yield source, found, 0
            yield source, Findings(), size

    def _of_file(self, source: Source) -> Iterator[tuple[Source, Findings, int]]:
        done, size = 0, source.size
        try:
            for place, found in self._places(source):
                yield source, found, place - done
                done = place
        except (ValueError, OSError) as error:
            self._unreadable(source, error)
            yield source, Findings(), size - done

    def _unreadable(self, source: Source, error: Exception) -> None:
        """Count a file of a folder that cannot be read; raise if the file was named."""
        if source.found and isinstance(error, ValueError | OSError):
            self.left_out.add("unreadable", 1, f"{source.name}: {str(error)[:200]}")
        elif isinstance(error, ValueError) and not isinstance(error, InvalidArgumentError):
            raise InvalidArgumentError("path", f"{source.name} is damaged: {str(error)[:200]}") from None
        else:
            raise error

    def _places(self, source: Source) -> Iterator[tuple[int, Findings]]:
        if source.kind == "lines":
            for piece in pieces(source.path, source.step, self._mapped):
                yield piece.stop, read_piece(piece)
        elif source.kind == "gzip":
            yield from compressed(source.path, source.step, self._mapped)
        elif source.kind == "json":
            yield source.size, document(source.path, source.step, self._mapped)
        else:
            read = read_table if source.kind == "parquet" else read_tensors
            for share, found in read(source.path, source.step, self._mapped):
                yield int(share * source.size), found


def _shared(source: Source) -> bool:
    """Whether further processes may read a file: parsing text, and unpickling many small tensors, is slow."""
    return source.kind == "lines" or (source.kind == "torch" and source.size <= _WHOLE)
