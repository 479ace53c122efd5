"""Parquet: list columns of every kind, batches of rows, and rows that lack a field."""

from __future__ import annotations

import builtins

import pytest

from opdtheory.errors import IntegrationError, InvalidArgumentError
from opdtheory.monitoring.files import tables
from opdtheory.monitoring.files.fields import Mapped
from opdtheory.monitoring.files.tables import read_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = {"student_logprobs": [[-1.0, -2.0], [-3.0, -4.0]], "teacher_logprobs": [[-1.5, -2.5], [-3.5, -4.5]]}


def read(path, step=None):
    parts = [found for _, found in read_table(path, step, Mapped())]
    return [block for found in parts for block in found.blocks], parts


def written(tmp_path, columns, **options):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", **options)
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)])
def test_every_kind_of_list(kind, tmp_path):
    path = written(tmp_path, {name: pa.array(value, kind) for name, value in ROWS.items()} | {"step": [1, 2]})
    blocks, _ = read(path)
    assert [block.key.step for block in blocks] == [1, 2]
    assert [block.columns["student"].tolist() for block in blocks] == ROWS["student_logprobs"]
    assert [block.columns["teacher"].tolist() for block in blocks] == ROWS["teacher_logprobs"]


def test_rows_that_lack_a_list_and_numbers_that_are_null(tmp_path):
    columns = {"student_logprobs": [[-1.0, None], None, [-3.0, -4.0]], "teacher_logprobs": [[-1.0, -1.0]] * 3}
    blocks, (found,) = read(written(tmp_path, columns), step=7)
    assert found.faults == {"missing": 1}
    assert found.records == 3
    assert blocks[0].lengths.tolist() == [2, 2]
    assert blocks[0].columns["student"].tolist()[2:] == [-3.0, -4.0]
    assert blocks[0].key.step == 7


def test_rows_are_read_some_at_a_time_and_other_columns_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_NUMBERS", 4)
    many = {name: value * 10 for name, value in ROWS.items()} | {"text": ["x" * 1000] * 20}
    blocks, parts = read(written(tmp_path, many, row_group_size=7))
    assert len(parts) > 5
    assert sum(len(block.columns["student"]) for block in blocks) == 40


def test_a_table_without_the_fields_is_counted(tmp_path):
    _, (found,) = read(written(tmp_path, {"text": ["a", "b"]}))
    assert found.faults == {"unrecognised": 2}
    _, (found,) = read(written(tmp_path, {"student_logprobs": [[-1.0]]}))
    assert found.faults == {"missing": 1}
    assert found.names == {"student_logprobs"}


def test_a_column_of_text_is_no_rows(tmp_path):
    _, (found,) = read(written(tmp_path, ROWS | {"teacher_logprobs": [["a", "b"], ["c", "d"]]}))
    assert found.faults == {"not_numbers": 2}


def test_ragged_and_masked_rows(tmp_path):
    columns = ROWS | {"teacher_logprobs": [[-1.0], [-3.5, -4.5]], "mask": [[1, 1], [0, 1]]}
    (block,), (found,) = read(written(tmp_path, columns))
    assert found.faults == {"ragged": 2}
    assert block.columns["student"].tolist() == [-4.0]
    _, (found,) = read(written(tmp_path, ROWS | {"mask": [[1, 1], [0, 0]]}))
    assert found.faults == {"empty": 1}


def test_a_file_that_is_being_written_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no footer")
    with pytest.raises(InvalidArgumentError, match="damaged or still being written"):
        read(tmp_path / "a.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = written(tmp_path, ROWS)
    plain = builtins.__import__

    def absent(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return plain(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(IntegrationError, match=r"opdtheory\[parquet\]"):
        read(path)
