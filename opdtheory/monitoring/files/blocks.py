"""From records to blocks of tokens: rows of numbers, their masks and lengths; no torch, so that workers start fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from opdtheory.monitoring.files.fields import (
    ROLLOUT_MASKS,
    WHOLE,
    Fields,
    Mapped,
    chosen,
    flattened,
    step_entries,
    whole,
)

__all__ = ["Block", "Findings", "Gatherer", "Key", "NotRowsError", "Rows", "assembled", "joined", "rows_of"]

Floats: TypeAlias = NDArray[np.float64]
Counts: TypeAlias = NDArray[np.int64]


class NotRowsError(ValueError):
    """A field does not hold rows of numbers; the message says what it holds."""


class Key(NamedTuple):
    """What the blocks of one chunk share.

    Attributes:
        step: the optimiser step; None if unknown.
        trainer: the trainer; None if not recognised.
        columns: the names of the columns.
        masked: whether there was a mask.
    """

    step: int | None
    trainer: str | None
    columns: tuple[str, ...]
    masked: bool


class Rows(NamedTuple):
    """Rows of numbers, one after the other, and the length of each."""

    values: Floats
    lengths: Counts


class Block(NamedTuple):
    """The unmasked tokens of some rollouts.

    Attributes:
        key: step, trainer and columns.
        columns: `student`, `teacher` and, if logged, `behavior` and `entropy`, `(N,)` each.
        lengths: the number of tokens of each rollout, `(B,)`.
    """

    key: Key
    columns: dict[str, Floats]
    lengths: Counts


@dataclass
class Findings:
    """What was found in a part of a run.

    Attributes:
        blocks: the tokens.
        faults: counts by the names of `FAULTS`.
        first: where the first of a fault was met: a line or record from 1, within the part.
        lines: lines or records read, usable or not.
        records: records read.
        stand_ins: records whose student is the sampling engine's log-probabilities.
        names: the entries of numbers that were met.
        trainers: the trainers that were recognised.
        usable: whether any record had a student and a teacher.
    """

    blocks: list[Block] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    lines: int = 0
    records: int = 0
    stand_ins: int = 0
    names: set[str] = field(default_factory=set)
    trainers: set[str] = field(default_factory=set)
    usable: bool = False

    def fault(self, name: str, count: int = 1) -> None:
        """Count a fault at the current line."""
        self.faults[name] = self.faults.get(name, 0) + count
        self.first.setdefault(name, self.lines)


@dataclass(frozen=True)
class _Plan:
    fields: Fields
    steps: tuple[str, ...]


class Gatherer:
    """Adds up records; small ones of the same kind that follow each other become one block."""

    def __init__(self, mapped: Mapped, step: int | None = None) -> None:
        self.mapped = mapped
        self.step = step
        self.findings = Findings()
        self._plans: dict[tuple[tuple[str, ...], tuple[str, ...]], _Plan] = {}
        self._key: Key | None = None
        self._open: list[Block] = []

    def add(self, record: Mapping[Any, Any], *, more: bool = False) -> None:
        """Read a record, or `more` rows of the one before."""
        flat = flattened(record)
        inner = _records_within(flat, self.mapped)
        for each in [flat] if inner is None else inner:
            self.findings.records += not more
            self._add(each)

    def done(self) -> Findings:
        """What was found since the last call."""
        self._close()
        found, self.findings = self.findings, Findings()
        return found

    def _add(self, flat: dict[str, Any]) -> None:
        found = self.findings
        names = tuple(name for name, value in flat.items() if _holds_rows(name, value))
        kind = (tuple(flat), names)
        plan = self._plans.get(kind)
        if plan is None:
            if len(self._plans) > 1000:
                self._plans.clear()
            plan = self._plans[kind] = _Plan(chosen(names, self.mapped), step_entries(flat))
            if len(found.names) < 200:
                found.names.update(name for name in names if _numeric(flat[name]))
        fields = plan.fields
        if fields.trainer is not None:
            found.trainers.add(fields.trainer)
        if not fields.usable:
            known = fields.student is not None or fields.teacher is not None
            found.fault("missing" if known else "unrecognised")
            return
        found.usable = True
        try:
            step = next((step for name in plan.steps if (step := whole(flat[name])) is not None), self.step)
            block, ragged = _block(flat, fields, step)
        except NotRowsError:
            found.fault("not_numbers")
            return
        found.stand_ins += fields.stands_in
        if ragged:
            found.fault("ragged", ragged)
        if not len(block.lengths):
            if not ragged:
                found.fault("empty")
            return
        if block.key != self._key:
            self._close()
            self._key = block.key
        self._open.append(block)

    def _close(self) -> None:
        if self._open:
            self.findings.blocks.append(joined(self._open))
        self._key, self._open = None, []


def joined(blocks: list[Block]) -> Block:
    """Blocks of one key as one."""
    if len(blocks) == 1:
        return blocks[0]
    key = blocks[0].key
    columns = {name: np.concatenate([block.columns[name] for block in blocks]) for name in key.columns}
    return Block(key, columns, np.concatenate([block.lengths for block in blocks]))


def _block(flat: Mapping[str, Any], fields: Fields, step: int | None) -> tuple[Block, int]:
    single = {"student": fields.student, "teacher": fields.teacher, "behavior": fields.behavior}
    single["entropy"] = fields.entropy
    columns = {role: rows_of(flat[name]) for role, name in single.items() if name is not None}
    over_prompt = WHOLE.get(fields.trainer or "", frozenset())
    for role, name in single.items():
        if name is not None and name.rpartition(".")[2] in over_prompt:
            columns[role] = of_responses(columns[role], columns["student"].lengths)
    masks = [rows_of(flat[name]) for name in fields.masks]
    rollout_masks = [_numbers(flat[name]) for name in fields.rollout_masks]
    return assembled(columns, masks, rollout_masks, step, fields.trainer)


def of_responses(rows: Rows, lengths: NDArray[np.int64]) -> Rows:
    """The responses' part of rows over prompt and response, whose numbers stand one place before their tokens.

    Rows as long as the responses are these already.
    """
    if len(rows.lengths) != len(lengths) or not (rows.lengths > lengths).all():
        return rows
    ends = rows.lengths.cumsum() - 1
    first = np.repeat(ends - lengths, lengths)
    within = np.arange(int(lengths.sum())) - np.repeat(lengths.cumsum() - lengths, lengths)
    return Rows(rows.values[first + within], lengths)


def assembled(
    columns: dict[str, Rows], masks: list[Rows], rollout_masks: list[Floats], step: int | None, trainer: str | None
) -> tuple[Block, int]:
    """The unmasked tokens of columns, and the number of tokens lost because rows differ in length."""
    key = Key(step, trainer, tuple(columns), bool(masks))
    every = [*columns.values(), *masks]
    lengths = every[0].lengths
    counts = {len(rows.lengths) for rows in every} | {len(mask) for mask in rollout_masks}
    if len(counts) > 1:
        return _nothing(key), max(int(rows.lengths.sum()) for rows in every)
    ragged = 0
    if not all(np.array_equal(rows.lengths, lengths) for rows in every[1:]):
        table = np.stack([rows.lengths for rows in every])
        longest = table.max(0)
        good = table.min(0) == longest
        ragged, lengths = int(longest[~good].sum()), lengths[good]
        every = [Rows(rows.values[np.repeat(good, rows.lengths)], lengths) for rows in every]
        rollout_masks = [mask[good] for mask in rollout_masks]
    values = dict(zip(columns, (rows.values for rows in every), strict=False))
    keep: NDArray[np.bool_] | None = None
    for rows in every[len(columns) :]:
        found = rows.values > 0
        keep = found if keep is None else keep & found
    for mask in rollout_masks:
        found = np.repeat(mask > 0, lengths)
        keep = found if keep is None else keep & found
    if keep is not None and not keep.all():
        number = np.repeat(np.arange(len(lengths)), lengths)[keep]
        lengths = np.bincount(number, minlength=len(lengths))
        values = {name: column[keep] for name, column in values.items()}
    return Block(key, values, lengths[lengths > 0]), ragged


def _nothing(key: Key) -> Block:
    return Block(key, {name: np.empty(0) for name in key.columns}, np.empty(0, dtype=np.int64))


def rows_of(value: Any) -> Rows:
    """Rows of numbers from a list, nested lists, an array or a tensor; None becomes NaN.

    Raises:
        NotRowsError: it holds something else, such as several numbers for a token.
    """
    if getattr(value, "is_nested", False):
        value = list(value.unbind())
    if hasattr(value, "detach"):
        return _of_array(_numpy(value))
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _of_array(value)
    value = list(value)
    lead = next((each for each in value if each is not None), None)
    if not isinstance(lead, list | tuple | np.ndarray) and not getattr(lead, "ndim", 0):
        row = _row(value)
        return Rows(row, np.array([len(row)], dtype=np.int64))
    found = [_row([] if each is None else each) for each in value]
    return Rows(np.concatenate(found), np.array([len(row) for row in found], dtype=np.int64))


def _numpy(tensor: Any) -> NDArray[Any]:
    found: NDArray[Any] = tensor.detach().cpu().double().numpy()
    return found


def _of_array(value: NDArray[Any]) -> Rows:
    if value.ndim == 3 and value.shape[-1] == 1:
        value = value[..., 0]
    if value.ndim not in (1, 2):
        raise NotRowsError(f"an array of shape {value.shape}")
    lengths = [value.shape[-1]] * (1 if value.ndim == 1 else len(value))
    return Rows(_floats(value).reshape(-1), np.array(lengths, dtype=np.int64))


def _row(value: Any) -> Floats:
    row = _floats(value)
    if row.ndim == 2 and row.shape[-1] == 1:
        row = row[:, 0]
    if row.ndim != 1:
        raise NotRowsError(f"a row of shape {row.shape}")
    return row


def _floats(value: Any) -> Floats:
    if hasattr(value, "detach"):
        value = _numpy(value)
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiub":
        raise NotRowsError(f"an array of {value.dtype}")
    try:
        # A list that starts with text would be parsed as numbers.
        if isinstance(value, list) and value and isinstance(value[0], str | dict):
            raise NotRowsError(f"a list of {type(value[0]).__name__}")
        return np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise NotRowsError(str(value)[:60]) from None


def _numbers(value: Any) -> Floats:
    """One number for each rollout."""
    return np.array([float(value)]) if isinstance(value, int | float) else _floats(value).reshape(-1)


def _holds_rows(name: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return True
    if getattr(value, "ndim", 0):
        return True
    return isinstance(value, int | float) and name.rpartition(".")[2] in ROLLOUT_MASKS


def _numeric(value: Any) -> bool:
    """Whether the first number within lists, if there is any, is one."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return not isinstance(value, str | bytes | dict)


def _records_within(flat: dict[str, Any], mapped: Mapped) -> Iterator[dict[str, Any]] | None:
    """The records of a list that a record holds, if it holds no fields itself."""
    for name, value in flat.items():
        if isinstance(value, list) and value and hasattr(value[0], "items"):
            outer, inner = chosen(flat, mapped), chosen(flattened(value[0]), mapped)
            if outer.student is None and outer.teacher is None and (inner.student or inner.teacher):
                shared = {other: flat[other] for other in step_entries(flat) if other != name}
                return (shared | flattened(each) for each in value if hasattr(each, "items"))
    return None
