"""The files of a run, in the order of their numbers, and the steps that their names tell."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opdtheory.errors import InvalidArgumentError

__all__ = ["KINDS", "Source", "in_order", "sources"]

# How a file is read, by the end of its name.
KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonl.gz": "gzip",
    ".json": "json",
    ".parquet": "parquet",
    ".pt": "torch",
    ".pth": "torch",
}

_STEP = re.compile(
    r"(?<![a-z])(?:global[ ._-]?)?(?:steps?|iter(?:ation)?s?|rollout|checkpoint)[ ._=-]?(\d+)", re.IGNORECASE
)
_DIGITS = re.compile(r"(\d+)")
# A number after one of these tells who wrote the file, not when.
_WRITER = re.compile(r"(?:rank|shard|part|worker|dp|tp|gpu|of|v)[ ._=-]?$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A file.

    Attributes:
        path: where it is.
        kind: how it is read.
        name: as it is called in messages, from the folder that was given.
        step: from its name or its folder's; None if they tell none.
        found: whether it was found in a folder, rather than named.
    """

    path: Path
    kind: str
    name: str
    step: int | None = None
    found: bool = False

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.path.stat().st_size


def sources(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files of a run.

    Args:
        paths: files, or folders, whose files are taken in the order of the numbers in their names.

    Raises:
        InvalidArgumentError: there is no such file, its kind is not known, or a folder has none of a known kind.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[Source] = []
    for each in given:
        path = Path(each)
        if path.is_dir():
            found += _within(path)
        elif not path.exists():
            raise InvalidArgumentError("path", f"there is no file or folder {str(path)!r}")
        elif (kind := _kind(path)) is None:
            raise InvalidArgumentError("path", f"must end in {', '.join(KINDS)}, got {path.name!r}")
        else:
            found.append(Source(path, kind, path.name))
    if not found:
        raise InvalidArgumentError("path", "no file was given")
    return _with_steps(found)


def in_order(names: Iterable[str]) -> list[str]:
    """Names sorted with numbers as numbers.

    Examples:
        >>> in_order(["step_10.pt", "step_2.pt"])
        ['step_2.pt', 'step_10.pt']
    """
    return sorted(names, key=_order)


def _order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in _DIGITS.split(name) if part]


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for end, kind in KINDS.items() if name.endswith(end)), None)


def _within(folder: Path) -> list[Source]:
    found = {}
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        kind = _kind(path)
        if kind is not None and path.is_file() and not any(part.startswith(".") for part in inner.parts):
            found[inner.as_posix()] = Source(path, kind, inner.as_posix(), found=True)
    if not found:
        raise InvalidArgumentError("path", f"{str(folder)!r} holds no file that ends in {', '.join(KINDS)}")
    return [found[name] for name in in_order(found)]


def _with_steps(found: list[Source]) -> list[Source]:
    """The sources with the steps that their names tell.

    A number after a word such as `step`, in the file's name or a folder's, is the step. So is a name that is a number,
    and the first number that differs between files whose names are otherwise the same.
    """
    alike: defaultdict[str, list[list[str]]] = defaultdict(list)
    for source in found:
        parts = _DIGITS.split(_stem(source))
        alike["#".join(parts[::2])].append(parts)
    result = []
    for source in found:
        parts = _DIGITS.split(_stem(source))
        others = alike["#".join(parts[::2])]
        step = _told(source.name)
        if step is None and _stem(source).rpartition("/")[2].isdigit():
            step = int(parts[-2])
        if step is None:
            differs = (
                place
                for place in range(1, len(parts), 2)
                if not _WRITER.search(parts[place - 1]) and len({other[place] for other in others}) > 1
            )
            place = next(differs, None)
            step = None if place is None else int(parts[place])
        result.append(replace(source, step=step))
    return result


def _stem(source: Source) -> str:
    end = next(end for end in KINDS if source.name.lower().endswith(end))
    return source.name[: -len(end)]


def _told(name: str) -> int | None:
    for part in reversed(name.split("/")):
        if hits := _STEP.findall(part):
            return int(hits[-1])
    return None
