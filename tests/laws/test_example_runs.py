"""The runs on which a diagnosis is tested: their settings, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from examples.runs import check, make
from opdtheory.errors import TrainingError
from opdtheory.training import loading
from opdtheory.training.tasks import task
from tests.scripts import loaded
from tests.training.runs import untrained


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that need no training."""

    def load_pair(*_: object, **__: object):
        return untrained(task("arithmetic"), 0), untrained(task("arithmetic"), 1).requires_grad_(False)

    monkeypatch.setattr(loading, "load_pair", load_pair)
    monkeypatch.setattr(make, "load_pair", load_pair)
    monkeypatch.setitem(make.SETTINGS, "prompts_per_step", 4)
    monkeypatch.setitem(make.SETTINGS, "eval_examples", 8)
    monkeypatch.setitem(make.SETTINGS, "max_new_tokens", 8)


def test_runs_differ_in_the_estimator_the_sampler_and_the_clip(tmp_path: Path) -> None:
    made = {name: make.config_of(name, tmp_path) for name in make.RUNS}
    assert len(made) == 12
    whole = {"steps": 120, "warmup_steps": 20, "learning_rate": 2e-3, "prompts_per_step": 128, "eval_examples": 256}
    for name, config in made.items():
        assert {key: config.to_dict()[key] for key in whole} == whole
        assert config.clip_log_ratio == (0.5 if name == "over_clipped" else 6.0)
        assert config.rollout_temperature == (0.7 if name == "mismatch" else 1.0)
    assert len({json.dumps(config.identity()) for config in made.values()}) == 12


def test_a_run_leaves_its_rollouts_and_its_outcome(
    pair: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["opd_jsd", "mismatch"]
    command = ["--out", str(tmp_path), "--steps", "2", "--workers", "1", "--logits", "--seed", "3", "--only", *names]
    assert make.main(command) == 0
    for line, name in zip(capsys.readouterr().out.splitlines(), names, strict=True):
        found = json.loads((tmp_path / name / "outcome.json").read_text())
        assert line.startswith(f"{name}: {found['word']}; sampled accuracy 0.000 to ")
        assert found["word"] == "stays" and (found["start"]["step"], found["end"]["step"]) == (0, 2)
        assert found["config"]["seed"] == 3
        records = sorted((tmp_path / name / "rollouts").iterdir())
        assert [path.name for path in records] == ["step_00000001.pt", "step_00000002.pt"]
        assert "teacher_logits" in torch.load(records[0], weights_only=True)
    # Another seed is another run.
    with pytest.raises(SystemExit):
        make.main([*command[:7], "--seed", "4", "--only", "mismatch"])
    assert "seed: must be 3, as in the run in" in capsys.readouterr().err


def test_a_run_that_breaks_off_fails(pair: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise TrainingError("step 2: the loss is nan")

    monkeypatch.setattr(make, "train", broken)
    (found,) = make.make_all(["opd_chi2"], tmp_path)
    assert found == json.loads((tmp_path / "opd_chi2" / "outcome.json").read_text())
    assert make.line_of(found) == "opd_chi2: fails, step 2: the loss is nan"


RECORD = json.loads(check.RECORD.read_text(encoding="utf-8"))


def test_every_run_of_two_students_was_read_right() -> None:
    assert {(row["pair_seed"], row["seed"]) for row in RECORD} == {(0, 0), (1, 11)}
    for pair in {(row["pair_seed"], row["seed"]) for row in RECORD}:
        assert sorted(row["name"] for row in RECORD if (row["pair_seed"], row["seed"]) == pair) == sorted(make.RUNS)
    for row in RECORD:
        assert set(row["said"]) >= set(check.FORMATS)
        judged = [check.is_right(row["name"], row["word"], said, row["steps"]) for said in row["said"].values()]
        assert row["right"] and all(judged), row["name"]
    assert any("arrays with logits" in row["said"] for row in RECORD)


def test_a_wrong_reading_is_not_right() -> None:
    late = {"verdict": "collapse", "first_warning": 12, "tokens": 1}
    assert not check.is_right("opd_jsd", "collapses", late, 120)
    assert check.is_right("opd_jsd", "collapses", late | {"first_warning": 11}, 120)
    missed = {"verdict": "nothing_found", "first_warning": None, "tokens": 1}
    assert not check.is_right("opd_jsd", "collapses", missed, 120) and check.is_right("x", "trains", missed, 120)
    assert not check.is_right("x", "trains", late, 120) and not check.is_right("mismatch", "stays", missed, 120)


def test_the_page_shows_the_names_that_are_recognised() -> None:
    generate = loaded(check.PAGE.parent / "generate_runs.py")
    text = check.PAGE.read_text(encoding="utf-8")
    assert generate.page_with(text) == text, "python docs/generate_runs.py"


def test_the_page_shows_the_record() -> None:
    text = check.PAGE.read_text(encoding="utf-8")
    assert check.page_with(text, check.table(RECORD)) == text, "python examples/runs/check.py FOLDER ... --write"


@pytest.mark.parametrize(
    ("name", "estimator", "divergence", "verdict"),
    [
        ("healthy", "opd_plus", "jsd", "nothing_found"),
        ("stop_gradient_forward_kl", "opd", "forward_kl", "collapse"),
        ("engine_at_0.7", "opd", "reverse_kl", "other_samples"),
    ],
)
def test_runs_that_ship_are_read_as_the_guide_says(name: str, estimator: str, divergence: str, verdict: str) -> None:
    path = check.HERE / f"{name}.jsonl.gz"
    found = opd.diagnose_file(path, estimator, divergence)
    assert found.verdict == verdict and found.first_warning == (1 if verdict == "collapse" else None)
    assert path.stat().st_size < 200_000
    # The twins: the healthy run read as stop-gradient, the collapsed one as what would have been right.
    twin = opd.diagnose_file(path, "opd" if name == "healthy" else "opd_plus", divergence)
    assert (twin.verdict == "collapse") == (name == "healthy")
