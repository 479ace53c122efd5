"""Checkpoints: whole or absent, and a run that is killed ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.training import checkpoint
from opdtheory.training.checkpoint import Checkpoint
from tests.training.runs import TASK, config, model, trained

RUNS = Path(__file__).parent / "runs.py"


def _state(step: int = 1) -> Checkpoint:
    return Checkpoint(step, {"seed": 0}, {"w": torch.arange(4.0) + step}, {"state": {}, "param_groups": []})


def _same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int64), b[name].view(torch.int64)) for name in a)


def _rows(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        checkpoint.save(tmp_path, _state(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000009.pt", "step_00000010.pt"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 10 and torch.equal(found.student["w"], torch.arange(4.0) + 10)
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_write_that_breaks_off_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, _state(1))

    def half(value, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, _state(1))
    monkeypatch.undo()
    # A kill leaves the temporary file as well.
    (tmp_path / "step_00000002.pt.77.tmp").write_bytes(b"half of it")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, _state(step))
    newest = tmp_path / "step_00000002.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="skipped a checkpoint: .*step_00000002"):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    (tmp_path / "step_00000001.pt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(InvalidArgumentError, match="none of the 2 in"):
        checkpoint.newest(tmp_path)
    torch.save({"weights": 1}, newest)
    with pytest.raises(InvalidArgumentError, match="format"):
        checkpoint.load(newest)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, steps=2)
    for change in ({"seed": 1}, {"learning_rate": 0.1}, {"steps": 3}):
        with pytest.raises(InvalidArgumentError, match=next(iter(change))):
            trained(tmp_path, **{"steps": 2, **change})
    # What is only of the machine may change.
    trained(tmp_path, steps=2, keep_checkpoints=5, check_rollouts=False)


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with checkpoint.locked(tmp_path), pytest.raises(InvalidArgumentError, match="another process"):
        trained(tmp_path, steps=2)
    trained(tmp_path, steps=2)


class _StoppedError(Exception):
    pass


def _stopping(at: int):
    def observer(run, finished):
        if finished == at:
            raise _StoppedError
        return {}

    return observer


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"checkpoint_every": 2, "microbatch": 2},
        {"updates_per_batch": 2, "importance": "ppo"},
        {"divergence": "jsd", "zscore": True, "rollouts_per_prompt": 2, "weight_decay": 0.1},
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, fields: dict[str, object]) -> None:
    straight = trained(tmp_path / "straight", **fields)
    settings = config(out=str(tmp_path / "stopped"), **fields)
    for at in (2, 4):
        with pytest.raises(_StoppedError):
            opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK, observers=[_stopping(at)])
    # The student that is handed over counts for nothing once there is a checkpoint.
    result = opd.train(settings, student=model(5), teacher=model(1, 24), task=TASK)
    assert _same_bits(result.student.state_dict(), straight)
    assert _rows(tmp_path / "stopped") == _rows(tmp_path / "straight")
    assert [row["step"] for row in _rows(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]


def test_state_left_out_of_a_checkpoint_would_be_missed(tmp_path: Path) -> None:
    # The twin forgets the optimiser's averages, or the step.
    straight = trained(tmp_path / "straight")
    with pytest.raises(_StoppedError):
        settings = config(out=str(tmp_path / "stopped"))
        opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK, observers=[_stopping(4)])
    path = tmp_path / "stopped" / "checkpoints"
    whole = checkpoint.newest(path)
    assert whole is not None and whole.step == 3
    for twin in ({"optimizer": {**whole.optimizer, "state": {}}}, {"step": 2}):
        for old in path.iterdir():
            old.unlink()
        checkpoint.save(path, Checkpoint(**{**vars(whole), **twin}))
        assert not _same_bits(trained(tmp_path / "stopped"), straight)


def _start(folder: Path, steps: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(RUNS.parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(RUNS), str(steps), str(folder)], env=environment)


def _finished(folder: Path) -> int:
    """The step of the newest checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("step_*.pt")]
    return max((int(name[5:13]) for name in names), default=0)


def _killed_and_resumed(folder: Path, steps: int, moments: list[tuple[int, float]]) -> None:
    """Kill at each moment, so long after so many finished steps, and start again; then run to the end."""
    for after, delay in moments:
        process = _start(folder, steps)
        while _finished(folder) < after and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        before = _finished(folder)
        process.send_signal(signal.SIGKILL)
        process.wait()
        # No finished step is lost: the newest checkpoint is whole.
        found = checkpoint.newest(folder / "checkpoints")
        assert (found.step if found else 0) >= before
    assert _start(folder, steps).wait() == 0


def _check_kills(tmp_path: Path, steps: int, moments: list[tuple[int, float]]) -> None:
    straight = trained(tmp_path / "straight", steps=steps, eval_every=4, eval_examples=5)
    _killed_and_resumed(tmp_path / "killed", steps, moments)
    found = checkpoint.newest(tmp_path / "killed" / "checkpoints")
    assert found is not None and found.step == steps
    assert _same_bits(found.student, straight)
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "straight")


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    _check_kills(tmp_path, 30, [(4, 0.013)])


@pytest.mark.slow
def test_kills_at_twenty_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Two in the start-up, the others between any two writes.
    moments = [(0, rng.uniform(0, 4)) for _ in range(2)] + [(6 * n, rng.uniform(0, 0.08)) for n in range(1, 19)]
    _check_kills(tmp_path, 130, moments)
