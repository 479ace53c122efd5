"""Blocks put together into chunks of one step, checked for what no log-probability can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.files.blocks import Block, Key, joined
from opdtheory.monitoring.files.faults import LeftOut
from opdtheory.monitoring.tokens import SampledTokens

__all__ = ["Chunk", "Grouper", "Scales", "chunk_of"]

# Tokens of a chunk, and how many may wait for more of their step.
_TOGETHER, _WAITING = 1 << 18, 1 << 20

# Tokens after which a column without a single log-probability below zero is refused before the end of the run.
_ENOUGH = 100_000

# Tokens of a rollout that are not all certain by chance.
_CERTAIN = 8

_SCORES = ("student", "teacher", "behavior")


@dataclass(frozen=True)
class Chunk:
    """Tokens of one step.

    Attributes:
        step: the optimiser step; None if neither the records nor the file's name tell it.
        tokens: the usable tokens; their rollouts are numbered from 0 in each chunk.
        trainer: the trainer whose names the records have; None if they have none's.
    """

    step: int | None
    tokens: SampledTokens
    trainer: str | None


@dataclass
class Grouper:
    """Collects the blocks of a step; chunks come in the order in which their first tokens came."""

    _waiting: dict[Key, list[Block]] = field(default_factory=dict)
    _tokens: dict[Key, int] = field(default_factory=dict)

    def add(self, block: Block) -> Iterator[tuple[Key, Block]]:
        """Add a block; what is full leaves."""
        for part in _cut(block):
            key = part.key
            self._waiting.setdefault(key, []).append(part)
            self._tokens[key] = self._tokens.get(key, 0) + len(part.columns["student"])
            while key in self._tokens and (self._tokens[key] >= _TOGETHER or sum(self._tokens.values()) >= _WAITING):
                yield self._first()

    def rest(self) -> Iterator[tuple[Key, Block]]:
        """What is left."""
        while self._waiting:
            yield self._first()

    def _first(self) -> tuple[Key, Block]:
        key = next(iter(self._waiting))
        del self._tokens[key]
        return key, joined(self._waiting.pop(key))


def _cut(block: Block) -> Iterator[Block]:
    """Blocks of at most about twice the tokens of a chunk; a rollout is never cut."""
    if len(block.columns["student"]) <= 2 * _TOGETHER:
        yield block
        return
    ends = np.cumsum(block.lengths)
    marks = np.searchsorted(ends, np.arange(_TOGETHER, ends[-1], _TOGETHER)) + 1
    rows = np.unique([0, *marks, len(ends)])
    for first, last in zip(rows, rows[1:], strict=False):
        start, stop = (0 if first == 0 else ends[first - 1]), ends[last - 1]
        columns = {name: column[start:stop] for name, column in block.columns.items()}
        yield Block(block.key, columns, block.lengths[first:last])


@dataclass
class Scales:
    """Whether columns hold natural logarithms of probabilities, as far as their values tell.

    Base-2 logarithms cannot be told from natural ones.
    """

    _seen: dict[str, int] = field(default_factory=dict)
    _below: dict[str, int] = field(default_factory=dict)
    _highest: dict[str, float] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        """Look at a block.

        Raises:
            InvalidArgumentError: by now no value of a column can be a log-probability.
        """
        for name in _SCORES:
            if name not in block.columns:
                continue
            column = block.columns[name]
            known = int(np.count_nonzero(~np.isnan(column)))
            if not known:
                continue
            self._seen[name] = self._seen.get(name, 0) + known
            self._below[name] = self._below.get(name, 0) + int(np.count_nonzero(column < 0))
            self._highest[name] = max(self._highest.get(name, 0.0), float(np.nanmax(column)))
        self.check(_ENOUGH)

    def check(self, enough: int = 1) -> None:
        """Raise if a column of at least so many numbers has none below zero.

        Raises:
            InvalidArgumentError: a column is all zero, holds probabilities, or is above zero throughout.
        """
        for name, seen in self._seen.items():
            if seen < enough or self._below[name]:
                continue
            highest = self._highest[name]
            if highest == 0:
                problem = "are zero throughout: a placeholder, not log-probabilities; name another field"
            elif highest <= 1:
                problem = f"lie in [0, {highest:.3g}], as probabilities do; their natural logarithms are needed"
            else:
                problem = f"are never below zero and reach {highest:.3g}; log-probabilities are at most 0 (negated?)"
            raise InvalidArgumentError(name, f"the {seen:,} values {problem}")


def chunk_of(key: Key, block: Block, left_out: LeftOut) -> Chunk | None:
    """The usable tokens of a block; None if there are none. What is not usable is counted."""
    columns, lengths = _without_placeholders(block, left_out)
    rollout = torch.repeat_interleave(torch.arange(len(lengths)), torch.from_numpy(lengths.astype(np.int64)))
    tensors = {name: _tensor(column) for name, column in columns.items()}
    tokens = SampledTokens.flat(
        tensors["student"],
        tensors["teacher"],
        rollout,
        tensors.get("behavior"),
        entropy=tensors.get("entropy"),
    )
    left_out.update(tokens.left_out)
    left_out.tokens += len(tokens)
    if not key.masked:
        left_out.unmasked_zeros += int(((tokens.student == 0) & (tokens.teacher == 0)).sum())
    return Chunk(key.step, tokens, key.trainer) if len(tokens) else None


def _tensor(column: np.ndarray) -> torch.Tensor:
    # Arrow's arrays are read-only, of which torch warns.
    return torch.from_numpy(column if column.flags.writeable else column.copy())


def _without_placeholders(block: Block, left_out: LeftOut) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The block without rollouts where one column is zero throughout and another is not."""
    zeros = {name: block.columns[name] == 0 for name in _SCORES if name in block.columns}
    if all(int(found.sum()) < _CERTAIN for found in zeros.values()):
        return block.columns, block.lengths
    number = np.repeat(np.arange(len(block.lengths)), block.lengths)
    blank = np.stack(
        [np.bincount(number[found], minlength=len(block.lengths)) == block.lengths for found in zeros.values()]
    )
    bad = blank.any(0) & ~blank.all(0) & (block.lengths >= _CERTAIN)
    if not bad.any():
        return block.columns, block.lengths
    left_out.add("all_zero", int(block.lengths[bad].sum()))
    keep = ~bad[number]
    return {name: column[keep] for name, column in block.columns.items()}, block.lengths[~bad]
