"""The runs on which a diagnosis is tested: their settings, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.runs import make
from opdtheory.errors import TrainingError
from opdtheory.training import loading
from opdtheory.training.tasks import task
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
