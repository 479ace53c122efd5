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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('out = "a\\u0000b"', "out: must be a string without NUL"),
        ('out = "{file}"', "out: must be a folder, got"),
        ('cache = "{file}/below"', "cache: must be a folder, got"),
        ("steps = 1" + "0" * 400, "steps: must be at most"),
        ("steps = 1" + "0" * 5000, "is not valid TOML"),
        ("learning_rate = 1" + "0" * 400, "learning_rate: must be a finite number"),
        ("seed = true", "seed: must be an integer, got True"),
        ("clip_weight = [true, 1]", "clip_weight: must be a finite number, got True"),
        ("clip_weight = [1]", "clip_weight: must be a pair"),
        ("dtype = 32", "dtype: must be one of"),
        ("[divergence]\nname = 'jsd'", "divergence: must be"),
        ("\0", "is not valid TOML"),
        ("a = " + "[" * 20_000, "is not valid TOML: it is nested too deeply"),
        ("'' = 1", '"": is not a field of TrainConfig'),
    ],
)
def test_a_configuration_file_is_refused_without_a_traceback(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, path = tmp_path / "file", tmp_path / "run.toml"
    file.write_text("kept")
    path.write_text(text.replace("{file}", str(file)), encoding="utf-8")
    fixed = [] if "divergence" in text else ["--divergence", "jsd"]
    assert cli.main(["train", "--config", str(path), *fixed]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("opdtheory train: ") and words in captured.err
    assert len(captured.err.splitlines()) <= 2 and "Traceback" not in captured.err


@pytest.mark.parametrize("path", [".", "a\0b", "a" * 300])
def test_what_is_no_configuration_file_is_refused(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", path, "--divergence", "jsd"]) == 2
    assert capsys.readouterr().err.startswith("opdtheory train: config: ")
