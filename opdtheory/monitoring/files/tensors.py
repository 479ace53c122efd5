"""Files of `torch.save`: tensors, padded or ragged, in a dictionary, a list of them, or dictionaries within."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.files.blocks import Findings, Gatherer
from opdtheory.monitoring.files.fields import Mapped, chosen, flattened

__all__ = ["read_tensors"]

# Tokens of a padded tensor that are taken at a time.
_SLICE = 1 << 18


def read_tensors(path: Path, step: int | None, mapped: Mapped) -> Iterator[tuple[float, Findings]]:
    """The records of a file, part by part, with the share of the file that has been read.

    Raises:
        InvalidArgumentError: the file is damaged, or needs Python classes.
    """
    whole = _loaded(path)
    records = whole if isinstance(whole, list | tuple) else [whole]
    gatherer = Gatherer(mapped, step)
    tokens = 0
    for number, record in enumerate(records):
        gatherer.findings.lines += 1
        if not hasattr(record, "items"):
            gatherer.findings.fault("unrecognised")
            continue
        for part, of in _parts(record, mapped):
            gatherer.add(part, more=of > 0)
            tokens += sum(len(block.columns["student"]) for block in gatherer.findings.blocks)
            if of or tokens >= _SLICE:
                yield (number + min(1.0, of)) / len(records), gatherer.done()
                tokens = 0
    yield 1.0, gatherer.done()


def _parts(record: Mapping[Any, Any], mapped: Mapped) -> Iterator[tuple[Mapping[Any, Any], float]]:
    """Large padded tensors by some of their rows, and the share that was given before."""
    flat = flattened(record)
    needed = {name: flat[name] for name in chosen(flat, mapped).needed}
    plain = all(isinstance(value, Tensor) and value.ndim and not value.is_nested for value in needed.values())
    rows = {len(value) for value in needed.values()} if plain else set()
    size = max((value.numel() for value in needed.values()), default=0) if plain else 0
    if size <= _SLICE or len(rows) > 1 or min(value.ndim for value in needed.values()) < 1:
        yield record, 0.0
        return
    count = rows.pop()
    if all(value.ndim == 1 for value in needed.values()):
        yield record, 0.0
        return
    together = max(1, _SLICE * count // size)
    rest = {name: value for name, value in flat.items() if name not in needed}
    for start in range(0, count, together):
        yield rest | {name: value[start : start + together] for name, value in needed.items()}, start / count


def _loaded(path: Path) -> Any:
    with torch.serialization.safe_globals(_array_classes()):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise InvalidArgumentError("path", f"{path.name} is damaged: {_sentence(error)}") from None
        except pickle.UnpicklingError as error:
            raise _needs_classes(path, error) from None
        except (EOFError, OSError, ValueError, KeyError) as error:
            raise InvalidArgumentError("path", f"{path.name} is damaged: {_sentence(error)}") from None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _needs_classes(path, error) from None
        except (EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise InvalidArgumentError("path", f"{path.name} is damaged: {_sentence(error)}") from None


def _needs_classes(path: Path, error: Exception) -> InvalidArgumentError:
    text = str(error)
    marker = "Unsupported global: GLOBAL "
    if marker not in text:
        return InvalidArgumentError("path", f"{path.name} was not written by torch.save, or is damaged")
    name = text.partition(marker)[2].split()[0]
    return InvalidArgumentError(
        "path",
        f"{path.name} needs the Python class {name}, which is not loaded, because unpickling one can run any code. "
        "Save a dict of tensors instead, such as torch.save(data.to_dict(), path) of a TensorDict",
    )


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _array_classes() -> list[Any]:
    """What torch needs to load NumPy's arrays of numbers, which run no code."""
    core = np._core if hasattr(np, "_core") else np.core
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}
    return [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, *kinds]
