"""Parquet: columns of lists, one rollout or several in each row, read row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opdtheory.errors import IntegrationError, InvalidArgumentError
from opdtheory.monitoring.files.blocks import Block, Findings, NotRowsError, Rows, assembled
from opdtheory.monitoring.files.fields import ROLLOUT_MASKS, Fields, Mapped, chosen, step_entries

__all__ = ["read_table"]

# Numbers of a column that are taken at a time.
_NUMBERS = 1 << 19


def read_table(path: Path, step: int | None, mapped: Mapped) -> Iterator[tuple[float, Findings]]:
    """The rows of a file, part by part, with the share of the file that has been read.

    Raises:
        IntegrationError: pyarrow is not installed.
        InvalidArgumentError: the file is damaged or still being written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise IntegrationError("reading Parquet needs pyarrow: pip install 'opdtheory[parquet]'") from None
    try:
        # Buffering ahead would hold the columns of every row group at once.
        file = pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        text = str(error).splitlines()[0][:200]
        raise InvalidArgumentError("path", f"{path.name} is damaged or still being written: {text}") from None
    with file:
        entries = _leaves(file.schema_arrow)
        lists = [name for name, kind in entries.items() if _is_list(kind) or name in ROLLOUT_MASKS]
        fields = chosen(lists, mapped)
        steps = [name for name in step_entries(entries) if pa.types.is_integer(entries[name])]
        total, done = file.metadata.num_rows, 0
        needed = list(dict.fromkeys([*fields.needed, *steps[:1]]))
        for batch in file.iter_batches(_rows_at_a_time(file), columns=needed) if fields.usable else ():
            done += batch.num_rows
            found = _found(lists, fields)
            found.lines = found.records = batch.num_rows
            found.usable = True
            _gather(found, {name: _column(batch, name) for name in needed}, fields, steps[:1], step)
            yield done / max(1, total), found
        if not fields.usable:
            found = _found(lists, fields)
            found.lines = found.records = total
            found.fault("unrecognised" if fields.student is None and fields.teacher is None else "missing", total)
            yield 1.0, found


def _found(lists: list[str], fields: Fields) -> Findings:
    return Findings(names=set(lists), trainers={fields.trainer} if fields.trainer else set())


def _gather(found: Findings, columns: dict[str, Any], fields: Fields, steps: list[str], default: int | None) -> None:
    """The blocks of a batch, one for each stretch of rows of one step."""
    import pyarrow.compute as pc

    present = np.ones(found.lines, dtype=bool)
    for name in (fields.student, fields.teacher, fields.behavior, fields.entropy, *fields.masks):
        if name is not None:
            present &= ~np.asarray(pc.is_null(columns[name]))
    found.fault("missing", int((~present).sum())) if not present.all() else None
    columns = {name: column.filter(present) for name, column in columns.items()} if not present.all() else columns
    count = int(present.sum())
    of_row: NDArray[Any] = np.full(count, default if default is not None else -1, dtype=np.int64)
    if steps:
        own = columns[steps[0]]
        known = ~np.asarray(pc.is_null(own))
        of_row[known] = np.asarray(pc.fill_null(own, -1))[known]
    edges = [0, *(np.flatnonzero(np.diff(of_row)) + 1).tolist(), count] if count else [0]
    for start, stop in zip(edges, edges[1:], strict=False):
        part = {name: column.slice(start, stop - start) for name, column in columns.items()}
        number = int(of_row[start])
        try:
            block, ragged = _block(part, fields, None if number < 0 else number)
        except NotRowsError:
            found.fault("not_numbers", stop - start)
            continue
        found.stand_ins += (stop - start) * fields.stands_in
        if ragged:
            found.fault("ragged", ragged)
        empty = stop - start - len(block.lengths) if not ragged else 0
        if empty > 0:
            found.fault("empty", empty)
        if len(block.lengths):
            found.blocks.append(block)


def _block(columns: dict[str, Any], fields: Fields, step: int | None) -> tuple[Block, int]:
    single = {"student": fields.student, "teacher": fields.teacher, "behavior": fields.behavior}
    single["entropy"] = fields.entropy
    rows = {role: _rows(columns[name]) for role, name in single.items() if name is not None}
    masks = [_rows(columns[name]) for name in fields.masks]
    rollout_masks = [_numbers(columns[name]) for name in fields.rollout_masks]
    return assembled(rows, masks, rollout_masks, step, fields.trainer)


def _rows(column: Any) -> Rows:
    """The rows of a list column; where a list holds lists, those of all of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    inner = column.type.value_type
    if _is_list(inner):
        return _rows(pc.list_flatten(column))
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
        raise NotRowsError(f"a column of {column.type}")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0), dtype=np.int64)
    return Rows(_floats(pc.list_flatten(column)), lengths)


def _numbers(column: Any) -> NDArray[np.float64]:
    import pyarrow.compute as pc

    return _floats(pc.list_flatten(column) if _is_list(column.type) else column)


def _floats(values: Any) -> NDArray[np.float64]:
    import pyarrow as pa

    found = np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    return found


def _column(batch: Any, name: str) -> Any:
    """A column by its dotted name, through the structs that hold it."""
    import pyarrow.compute as pc

    first, *rest = name.split(".")
    column = batch.column(first) if first in batch.schema.names else batch.column(name)
    return pc.struct_field(column, rest) if rest and first in batch.schema.names else column


def _leaves(schema: Any) -> dict[str, Any]:
    """The types of the columns, those within structs by dotted names."""
    import pyarrow as pa

    found: dict[str, Any] = {}

    def add(prefix: str, field: Any) -> None:
        if pa.types.is_struct(field.type):
            for number in range(field.type.num_fields):
                add(f"{prefix}{field.name}.", field.type.field(number))
        else:
            found[prefix + field.name] = field.type

    for field in schema:
        add("", field)
    return found


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _rows_at_a_time(file: Any) -> int:
    """Rows that hold about as many numbers as are to be taken at a time."""
    data = file.metadata
    numbers = max(
        (data.row_group(0).column(each).num_values for each in range(data.num_columns))
        if data.num_row_groups
        else (1,),
        default=1,
    )
    rows = data.row_group(0).num_rows if data.num_row_groups else 1
    return int(max(1, min(1 << 16, _NUMBERS * rows // max(1, numbers))))
