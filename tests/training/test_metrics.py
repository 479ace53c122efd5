"""The files of a run's metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.metrics import Metrics


def test_tensorboard_is_asked_for_by_its_extra(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidArgumentError, match=r"opdtheory\[tensorboard\]"):
            Metrics(tmp_path, 0, tensorboard=True)
    else:
        metrics = Metrics(tmp_path, 0, tensorboard=True)
        metrics.add({"step": 1, "loss": 0.5})
        metrics.close()
        assert list((tmp_path / "tensorboard").glob("events*"))


def test_metrics_are_cut_to_the_finished_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "x": 1.5}\n{"step": 2}\n{"step": 3')
    metrics = Metrics(tmp_path, 1)
    assert metrics.rows == [{"step": 0}, {"step": 1, "x": 1.5}]
    metrics.add({"step": 2, "x": float("inf")})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [
        {"step": 1, "x": 1.5},
        {"step": 2, "x": None},
    ]
