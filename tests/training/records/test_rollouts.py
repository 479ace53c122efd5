"""Records of rollouts, and what a monitor gets: the log-probabilities before any update, whoever computes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring import Monitor
from opdtheory.training import trainer
from opdtheory.training.models.language_model import response_logits
from opdtheory.training.records.rollouts import joined, record_path
from opdtheory.training.run import RolloutMonitor
from tests.tolerances import ALGEBRA
from tests.training.runs import GROUPED, TASK, Watcher, config, first_batch, model, trained

PAIRS = {"rollouts_per_prompt": 2}


def _record(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(record_path(folder, step), weights_only=True)
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()}


def test_a_record_holds_the_log_probabilities_before_the_first_update(tmp_path: Path) -> None:
    fields = {"temperature": 1.3, "sampling_temperature": 0.7, "updates_per_batch": 2, "learning_rate": 0.05, **PAIRS}
    settings = config(**fields, steps=1, warmup_steps=0)
    trained(tmp_path, record_every=1, record_logits=True, **fields, steps=1, warmup_steps=0)
    found = _record(tmp_path, 1)
    student, teacher, _ = first_batch(settings)
    _, _, samples = first_batch(settings.replace(temperature=0.7, sampling_temperature=None))
    live = samples.mask > 0

    def law(who, temperature: float) -> torch.Tensor:
        with torch.no_grad():
            return (response_logits(who, samples) / temperature).log_softmax(-1)

    def of_tokens(rows: torch.Tensor) -> torch.Tensor:
        return torch.where(live, rows.gather(-1, samples.tokens.unsqueeze(-1)).squeeze(-1), 0.0)

    assert int(found["step"]) == 1
    assert torch.equal(found["tokens"], samples.tokens) and torch.equal(found["mask"], samples.mask)
    expected = {
        "student_logprobs": of_tokens(law(student, 1.3)),
        "teacher_logprobs": of_tokens(law(teacher, 1.3)),
        "behavior_logprobs": of_tokens(law(student, 0.7)),
        "entropy": torch.where(live, -(law(student, 1.3).exp() * law(student, 1.3)).sum(-1), 0.0),
    }
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < ALGEBRA, name
    # The twin: the scores' temperature is not the sampler's.
    assert float((found["behavior_logprobs"] - found["student_logprobs"]).abs().max()) > 0.1
    for name, who in (("student_logits", student), ("teacher_logits", teacher)):
        assert found[name].dtype == torch.float32 and found[name].shape == (*live.shape, TASK.vocabulary.size)
        assert float((found[name].log_softmax(-1) - law(who, 1.3))[live].abs().max()) < 1e-5
        assert not bool(found[name][~live].any())
    assert found.keys() == {"step", "tokens", "mask", *expected, "student_logits", "teacher_logits"}


def test_records_are_due_at_their_steps_and_the_last_one(tmp_path: Path) -> None:
    trained(tmp_path, record_every=4)
    assert sorted(_files(tmp_path)) == ["step_00000004.pt", "step_00000006.pt"]
    assert "student_logits" not in _record(tmp_path, 4)
    assert record_path(tmp_path, 12).name == "step_00000012.pt"


def test_a_record_is_the_same_however_the_batch_is_split(tmp_path: Path) -> None:
    for name, size in (("whole", None), ("split", 4)):
        trained(tmp_path / name, record_every=1, record_logits=True, steps=2, microbatch=size, **PAIRS)
    for step in (1, 2):
        whole, split = (_record(tmp_path / name, step) for name in ("whole", "split"))
        for name, value in whole.items():
            tolerance = 1e-5 if name.endswith("logits") else 1e-10
            assert float((value - split[name]).abs().max()) < tolerance, name


class _StoppedError(Exception):
    pass


def _stop(run, finished):
    if finished == 4:
        raise _StoppedError
    return {}


def _run(settings, observers=()):
    return opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK, observers=observers)


def test_a_resumed_run_writes_the_same_files_again(tmp_path: Path) -> None:
    fields = {"record_every": 1, "record_logits": True, "checkpoint_every": 3}
    trained(tmp_path / "straight", **fields)
    settings = config(out=str(tmp_path / "stopped"), **fields)
    with pytest.raises(_StoppedError):
        _run(settings, [_stop])
    assert len(_files(tmp_path / "stopped")) == 4
    # What step 4 left is written anew, from the checkpoint of step 3.
    record_path(tmp_path / "stopped", 4).write_bytes(b"")
    _run(settings)
    assert _files(tmp_path / "stopped") == _files(tmp_path / "straight")


def test_rows_of_different_lengths_are_padded() -> None:
    parts = [{"tokens": torch.ones(1, n, dtype=torch.int64), "logits": torch.ones(1, n, 2)} for n in (1, 3)]
    whole = joined(parts, padding=7)
    assert whole["tokens"].tolist() == [[1, 7, 7], [1, 1, 1]]
    assert whole["logits"][..., 0].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.fixture
def stands(monkeypatch: pytest.MonkeyPatch) -> list[Watcher]:
    made: list[Watcher] = []

    def stand(settings) -> Watcher:
        made.append(Watcher(settings.loss(), together=settings.rollouts_per_prompt))
        return made[-1]

    monkeypatch.setattr(trainer, "monitor_of", stand)
    return made


def test_a_monitor_gets_each_batch_once_and_joins_the_rows(stands: list[Watcher], tmp_path: Path) -> None:
    settings = config(
        **GROUPED, out=str(tmp_path), steps=3, monitor=True, record_every=1, updates_per_batch=2, microbatch=6
    )
    rows = _run(settings).rows
    (stand,) = stands
    assert isinstance(stand, RolloutMonitor)
    assert (stand.loss.label, stand.together, stand.steps) == (settings.loss().label, 3, [1, 2, 3])
    for step, added in enumerate(stand.added, start=1):
        kept = _record(tmp_path, step)
        assert all(torch.equal(value, kept[name]) for name, value in added.items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["opd/tokens"] for row in lines] == [row["tokens"] for row in rows]


def test_a_monitor_changes_no_bit_and_starts_anew_where_a_run_is_resumed(stands: list[Watcher], tmp_path: Path) -> None:
    fields = {"checkpoint_every": 3, **PAIRS}
    plain = trained(**fields)
    settings = config(out=str(tmp_path), monitor=True, **fields)
    with pytest.raises(_StoppedError):
        _run(settings, [_stop])
    watched = _run(settings).student.state_dict()
    assert all(torch.equal(plain[name], value) for name, value in watched.items())
    assert [stand.steps for stand in stands] == [[1, 2, 3, 4], [4, 5, 6]]
    # Neither asked for nor there: nothing is gathered.
    assert not any(key.startswith("opd/") for key in _run(config(**fields)).rows[0])


def test_the_librarys_own_monitor_watches() -> None:
    settings = config(divergence="jsd", steps=2, monitor=True, clip_log_ratio=6.0, **PAIRS)
    assert isinstance(trainer.monitor_of(settings), Monitor)
    assert isinstance(trainer.monitor_of(settings), RolloutMonitor)
    for row in _run(settings).rows:
        assert any(key.startswith("opd/") for key in row)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"record_every": 1}, "record_every: must have a folder: set out"),
        ({"record_logits": True}, "record_logits: applies only with record_every"),
        ({"record_every": 1, "out": "x", "control": "supervised"}, "record_every: does not apply to supervised"),
        ({"monitor": True, "control": "supervised"}, "monitor: does not apply to supervised"),
        ({"monitor": True, "control": "constant_advantage", "advantage": 1.0}, "monitor: does not apply to constant"),
        ({"monitor": True, "control": "exact_opd", "divergence": "jsd"}, "monitor: does not apply to exact_opd"),
        (
            {"monitor": True, "estimator": "return_to_go", "divergence": "jsd", "gamma": 0.9},
            "monitor: does not apply to return_to",
        ),
    ],
)
def test_what_cannot_be_recorded_or_monitored_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{named}"):
        config(**fields)
