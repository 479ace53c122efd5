"""Pieces of bytes hold each line once, wherever they are cut; compressed files may end early."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest

from opdtheory.errors import OpdTheoryError
from opdtheory.monitoring.files import lines
from opdtheory.monitoring.files.fields import Mapped
from opdtheory.monitoring.files.lines import Piece, compressed, pieces, read_piece
from opdtheory.monitoring.files.worker import Workers


def text(count=9):
    return "".join(
        json.dumps(
            {"step": 0, "student_logprobs": [-0.1 * n - 0.1] * (n % 4 + 1), "teacher_logprobs": [-1.0] * (n % 4 + 1)}
        )
        + "\n"
        for n in range(count)
    )


def test_a_piece_may_be_cut_at_any_byte(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text())
    (whole,) = (read_piece(piece) for piece in pieces(path, None, Mapped()))
    size = path.stat().st_size
    for cut in range(1, size):
        both = [read_piece(Piece(path, *span, None, Mapped())) for span in ((0, cut), (cut, size))]
        assert sum(found.lines for found in both) == 9
        columns = np.concatenate([block.columns["student"] for found in both for block in found.blocks])
        assert np.array_equal(columns, whole.blocks[0].columns["student"])


def test_lines_ends_and_numbers_that_json_does_not_know(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b'{"student_logprobs": [NaN, -1.0], "teacher_logprobs": [-Infinity, -2]}\r\n\r\n')
    (found,) = (read_piece(piece) for piece in pieces(path, None, Mapped()))
    assert found.faults == {}
    assert np.isnan(found.blocks[0].columns["student"][0])
    assert found.blocks[0].columns["teacher"].tolist() == [-np.inf, -2.0]


def test_python_alone_reads_the_same_numbers(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    numbers = (-np.random.default_rng(0).exponential(1, 500)).tolist()
    path.write_text(json.dumps({"student_logprobs": numbers, "teacher_logprobs": numbers}) + "\n")
    for loads in (lines._quick, json.loads):
        monkeypatch.setattr(lines, "_quick", loads)
        (found,) = (read_piece(piece) for piece in pieces(path, None, Mapped()))
        assert found.blocks[0].columns["student"].tolist() == numbers


def test_a_compressed_file_that_is_cut_off_keeps_its_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl.gz"
    generator = np.random.default_rng(0)
    records = [{"student_logprobs": (-generator.exponential(1, 50)).tolist()} for _ in range(200)]
    data = gzip.compress(
        "".join(json.dumps(r | {"teacher_logprobs": r["student_logprobs"]}) + "\n" for r in records).encode()
    )
    path.write_bytes(data)
    monkeypatch.setattr(lines, "PIECE", 5000)
    assert sum(found.records for _, found in compressed(path, None, Mapped())) == 200
    path.write_bytes(data[: len(data) // 2])
    parts = [found for _, found in compressed(path, None, Mapped())]
    assert 50 < sum(found.records for found in parts) < 150
    assert sum(found.faults.get("truncated", 0) for found in parts) >= 1


def test_processes_hand_on_errors_and_their_own_end(tmp_path):
    with Workers(1) as workers:
        absent = Piece(tmp_path / "absent.jsonl", 0, 10, None, Mapped())
        ((_, error),) = workers.read([("", absent)])
        assert isinstance(error, FileNotFoundError)
        workers._processes[0].kill()
        workers._processes[0].wait()
        with pytest.raises(OpdTheoryError, match="ended with status"):
            list(workers.read([("", absent)]))


def test_a_process_loads_no_torch():
    import subprocess

    code = "import opdtheory.monitoring.files.worker, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
