"""`opdtheory train`: what it trains, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opdtheory import cli
from opdtheory.training import loading
from tests.training.runs import untrained


@pytest.fixture
def small_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loading, "load_pair", lambda task, seed, cache: (untrained(task, seed), untrained(task, seed + 1))
    )


OPTIONS = "--steps 2 --warmup-steps 1 --prompts-per-step 4 --eval-examples 4 --device cpu --max-new-tokens 6".split()


def test_command_trains_and_reports(small_pair: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--task", "arithmetic", "--divergence", "jsd", "--estimator", "opd_plus", *OPTIONS]
    out = tmp_path / "run"
    assert cli.main([*command, "--json", "--out", str(out), "--clip-gradient", "none"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["last"]["step"] == 2 and [row["step"] for row in record["evaluations"]] == [0, 2]
    assert record["config"]["divergence"] == "jsd" and record["config"]["clip_gradient"] is None
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    # The same from the file that the run left; it is finished, so nothing is trained again.
    assert cli.main(["train", "--config", str(out / "config.toml")]) == 0
    assert "estimator('opd_plus', 'jsd'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--divergence", "jds"], ["--estimator", "sign", "--k", "3"], [], ["--config", "missing.toml"]]
)
def test_command_refuses_wrong_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options]) == 2
    assert "opdtheory train:" in capsys.readouterr().err


def test_command_fails_where_a_step_cannot_be_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(task, seed, cache):
        student, teacher = untrained(task, 0), untrained(task, 1)
        next(teacher.parameters()).data.fill_(float("nan"))
        return student, teacher

    monkeypatch.setattr(loading, "load_pair", broken)
    command = ["train", "--divergence", "jsd", *OPTIONS, "--eval-examples", "0", "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert str(tmp_path / "failure_step_00000001_rank_0.json") in capsys.readouterr().err
