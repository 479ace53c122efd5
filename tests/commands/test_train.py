"""`opdtheory train`: what it trains, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opdtheory import cli
from opdtheory.commands.train import config_of
from opdtheory.training import loading, trainer
from opdtheory.training.progress import plan
from tests.training.records.test_outcome import row
from tests.training.runs import untrained


@pytest.fixture
def small_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loading, "load_pair", lambda task, seed, **_: (untrained(task, seed), untrained(task, seed + 1))
    )


OPTIONS = "--steps 2 --prompts-per-step 4 --eval-examples 4 --device cpu --max-new-tokens 6".split()


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


def test_json_is_alone_on_standard_output_and_progress_on_standard_error(
    small_pair: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *OPTIONS, "--json"]) == 0
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)["outcome"]
    assert outcome["greedy"] == outcome["test_sampled"] == "unresolved" and len(outcome["sentences"]) > 3
    assert captured.err.startswith("Training with opd_plus(reverse_kl, reduction=token_mean) on arithmetic: 2 steps")
    assert "step 2 of 2" in captured.err and "a warm-up of 2," in captured.err
    assert cli.main(["train", *OPTIONS, "--json", "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


def test_the_end_says_what_happened(
    small_pair: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = iter([0.48, 0.48, 0.0, 0.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *_: row(0, next(shares), next(shares)))
    assert cli.main(["train", *OPTIONS, "--estimator", "opd", "--divergence", "forward_kl"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[3].split() == ["step", "greedy", "95", "%", "sampled", "95", "%", "KL(p|q)", "KL(q|p)", "entropy"]
    assert "Greedy accuracy fell from 0.480 to 0.000" in out and "this is a collapse" in out
    assert "repels the student: w'(1) = -1 (T5). The collapse agrees with that." in out
    assert lines[-1].endswith("opdtheory diagnose FOLDER")


def test_a_monitored_run_tells_of_its_monitor(
    small_pair: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", *OPTIONS, "--monitor", "--record-every", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "The monitor foresaw no collapse." in printed and f"opdtheory diagnose {out}" in printed


@pytest.mark.parametrize(
    ("given", "divergence", "steps", "warmup"),
    [
        ([], "reverse_kl", 200, 20),
        (["--steps", "5"], "reverse_kl", 5, 5),
        (["--steps", "5", "--warmup-steps", "1"], "reverse_kl", 5, 1),
        (["--estimator", "opd"], "reverse_kl", 200, 20),
        (["--control", "exact_opd"], "reverse_kl", 200, 20),
        (["--divergence", "jsd"], "jsd", 200, 20),
        # What takes no divergence is given none.
        (["--estimator", "k2_loss"], None, 200, 20),
        (["--control", "supervised"], None, 200, 20),
    ],
)
def test_what_is_not_given_is_filled_in(given: list[str], divergence: str | None, steps: int, warmup: int) -> None:
    config = config_of(cli._parser().parse_args(["train", *given]))
    assert (config.divergence, config.steps, config.warmup_steps) == (divergence, steps, warmup)
    assert config.threads == 1 and plan(config).startswith(f"Training with {config.loss().label}")


def test_a_file_is_filled_in_like_the_options(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\nthreads = 2\n")
    config = config_of(cli._parser().parse_args(["train", "--config", str(path)]))
    assert (config.divergence, config.warmup_steps, config.threads) == ("reverse_kl", 7, 2)
    path.write_text('estimator = "k3_loss"\nstudent = "models/student"\n')
    config = config_of(cli._parser().parse_args(["train", "--config", str(path)]))
    assert config.divergence is None and config.threads is None and "student models/student" in plan(config)


@pytest.mark.parametrize(
    "options",
    [
        ["--divergence", "jds"],
        ["--divergence", "none"],
        ["--estimator", "sign", "--k", "3"],
        ["--steps", "5", "--warmup-steps", "20"],
        ["--config", "missing.toml"],
    ],
)
def test_command_refuses_wrong_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options]) == 2
    assert "opdtheory train:" in capsys.readouterr().err


def test_command_fails_where_a_step_cannot_be_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(task, seed, **_):
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
