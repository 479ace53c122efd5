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
from tests.sparse import some
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
    with pytest.raises(InvalidArgumentError, match="sampling_temperature: must be None, as in the run in .*, got 0.7"):
        trained(tmp_path, steps=2, sampling_temperature=0.7)
    # What is only of the machine may change, and what changes nothing.
    trained(tmp_path, steps=2, keep_checkpoints=5, check_rollouts=False, record_every=1, sampling_temperature=1.0)


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


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    _check_kills(tmp_path, 30, [(4, 0.013)])


@pytest.mark.slow
def test_kills_at_twenty_moments(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Two in the start-up, the others between any two writes.
    moments = [(0, rng.uniform(0, 4)) for _ in range(2)] + [(6 * n, rng.uniform(0, 0.08)) for n in range(1, 19)]
    _check_kills(tmp_path, 130, moments)


# Damage of every kind.


def _stored(tmp_path: Path) -> tuple[Path, bytes]:
    for step in (1, 2):
        checkpoint.save(tmp_path, _state(step))
    newest = tmp_path / "step_00000002.pt"
    return newest, newest.read_bytes()


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    newest, whole = _stored(tmp_path)
    assert checkpoint.load(newest).step == 2
    draws = random.Random(0)
    for place in [*range(0, 160), *(draws.randrange(len(whole)) for _ in range(150)), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draws.randrange(8)
        newest.write_bytes(damaged)
        with pytest.raises(InvalidArgumentError, match="cannot be read"):
            checkpoint.load(newest)


JUNK = {
    "junk": b"junk",
    "three bytes": b"R\xaf\x80",
    "five bytes": bytes(random.Random(0).randrange(256) for _ in range(5)),
    "nothing": b"",
    "a text": b"step 2\n" * 100,
    "zeros": bytes(4096),
    "an empty archive": b"PK\x05\x06" + bytes(18),
    "a pickle": b"\x80\x02}q\x00.",
    "the head alone": checkpoint._HEAD,
    "the head and a digest": checkpoint._HEAD + b"0" * 64 + b"\n",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_junk_is_passed_over_for_the_next_older_one(tmp_path: Path, junk: bytes) -> None:
    newest, _ = _stored(tmp_path)
    newest.write_bytes(junk)
    with pytest.warns(UserWarning, match="skipped a checkpoint: .*step_00000002"):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1


@pytest.mark.parametrize("length", (1, 40, 120, 0.5, 0.99))
def test_a_truncated_one_too(tmp_path: Path, length: float) -> None:
    newest, whole = _stored(tmp_path)
    newest.write_bytes(whole[: length if length >= 1 else int(length * len(whole))])
    with pytest.warns(UserWarning, match="step_00000002"):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1


def test_random_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    newest, whole = _stored(tmp_path)
    draws = random.Random(1)
    for size in (1, 2, 3, 4, 5, 8, 13, 64, 300) * 8:
        newest.write_bytes(draws.randbytes(size))
        with pytest.raises(InvalidArgumentError):
            checkpoint.load(newest)


def test_a_folder_in_its_place_and_one_among_the_old_ones(tmp_path: Path) -> None:
    newest, _ = _stored(tmp_path)
    newest.unlink()
    newest.mkdir()
    with pytest.warns(UserWarning, match="step_00000002"):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    for step in (3, 4, 5):
        checkpoint.save(tmp_path, _state(step))
    assert newest.is_dir()


def test_older_files_without_a_checksum_are_read_and_their_parts_checked(tmp_path: Path) -> None:
    path = tmp_path / "step_00000007.pt"
    torch.save({"format": 1, **vars(_state(7))}, path)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 7
    raw, weights = bytearray(path.read_bytes()), (torch.arange(4.0) + 7).numpy().tobytes()
    raw[raw.find(weights) + 3] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(InvalidArgumentError, match="cannot be read: the checksum of its part"):
        checkpoint.load(path)


@pytest.mark.parametrize("change", ({"step": "2"}, {"student": None}, {"config": [1]}, {"further": 1}))
def test_another_content_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "step_00000007.pt"
    torch.save({"format": 1, **vars(_state(7)), **change}, path)
    with pytest.raises(InvalidArgumentError, match="must hold step, config, student, optimizer"):
        checkpoint.load(path)


def _result(out: Path, observers=(), **fields: object) -> opd.training.TrainResult:
    return opd.train(
        config(out=str(out), **fields), student=model(0), teacher=model(1, 24), task=TASK, observers=observers
    )


def _steps_evaluated(result) -> list[int]:
    return [row["step"] for row in result.evaluations]


LOST = {
    "lost": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"\xff\x00junk\n" * 3),
    "no line end": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b" ")),
    "another text": lambda path: path.write_text('{"step": "0"}\n[1]\nnull\n{"step": true}\n'),
}


@pytest.mark.parametrize("damage", some(LOST.values(), ids=LOST))
@pytest.mark.parametrize("steps", (4, 6))
def test_a_trained_student_is_never_reported_as_step_0(tmp_path: Path, damage, steps: int) -> None:
    fields = {"eval_examples": 8, "eval_every": 2, "steps": 6}
    with pytest.raises(_StoppedError):
        _result(tmp_path, observers=[_stopping(5)], **fields)
    if steps == 6:
        trained(tmp_path, **fields)
    else:
        # The last finished step is 4.
        assert checkpoint.newest(tmp_path / "checkpoints").step == steps
    damage(tmp_path / "metrics.jsonl")
    with pytest.warns(UserWarning, match=f"metrics.jsonl is lost or damaged.*goes on from step {steps}"):
        result = _result(tmp_path, **fields)
    assert _steps_evaluated(result) == ([4, 6] if steps == 4 else [6])
    assert [row["step"] for row in _rows(tmp_path)] == list(range(steps, 7))
    # The next run finds everything in order.
    trained(tmp_path, **fields)


def test_a_damaged_row_costs_no_other_row(tmp_path: Path) -> None:
    fields = {"eval_examples": 8, "eval_every": 2, "steps": 6}
    whole = _result(tmp_path, **fields)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = b"\x00" + lines[2][1:]
    path.write_bytes(b"".join(lines))
    again = _result(tmp_path, **fields)
    assert again.rows == [row for row in whole.rows if row["step"] != 2]
    assert [row["step"] for row in _rows(tmp_path)] == [0, 1, 3, 4, 5, 6]


def test_a_step_whose_number_is_damaged_is_left_out(tmp_path: Path) -> None:
    fields = {"eval_examples": 0, "steps": 5}
    trained(tmp_path, **fields)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 4', '"step": 0'))
    assert [row["step"] for row in _result(tmp_path, **fields).rows] == [1, 2, 3, 5]
