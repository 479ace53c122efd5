"""`opdtheory diagnose`: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.runs import formats
from opdtheory.cli import main
from opdtheory.training.config import TrainConfig
from tests.monitoring.test_from_files import steps


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(formats.own_jsonl(tmp_path, steps()))


def test_a_collapse_is_told_first_and_fails(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", path, "--divergence", "forward_kl"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("opd(forward_kl) heads for a collapse.") and "A collapse is foreseen from step" in printed


def test_a_sound_run_holds(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", path, "--estimator", "opd_plus", "--divergence", "jsd"]) == 0
    assert "nothing in these tokens speaks against it" in capsys.readouterr().out


def test_json_is_alone_and_a_page_is_written(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["diagnose", path, "--divergence", "jsd", "--json", "--html", str(page), "--have", "sampled"]) == 1
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["verdict"] == "collapse" and record["advice"]["choices"] and "wrote" in err
    assert "heads for a collapse" in page.read_text(encoding="utf-8")


def test_what_the_teacher_can_send_is_ranked(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["diagnose", path, "--divergence", "forward_kl", "--have", "top_k"])
    printed = capsys.readouterr().out
    assert "topk_tail_sampled(forward_kl" in printed and "* the estimator of the run" in printed


def test_options_are_those_of_the_estimator(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--estimator", "opd_plus", "--divergence", "forward_kl", "--clip-log-ratio", "0.01"]
    assert main(["diagnose", path, *options]) == 1
    assert "descends another divergence" in capsys.readouterr().out


def test_an_own_run_names_its_estimator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(estimator="opd", divergence="jsd", reduction="token_mean", clip_log_ratio=5.0)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "--record-every" in capsys.readouterr().err
    (tmp_path / "rollouts").mkdir()
    formats.own_jsonl(tmp_path / "rollouts", steps())
    assert main(["diagnose", str(tmp_path)]) == 1
    assert "opd(jsd, reduction=token_mean, clip_log_ratio=5.0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no such.jsonl"], "no such.jsonl"),
        (["{path}", "--estimator", "opd_pluss"], "opd_plus"),
        (["{path}", "--estimator", "power", "--alpha", "0.5"], "must weigh a token by its own ratio"),
        (["{path}", "--teacher", "teacher"], "teacher_logprobs"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(
    arguments: list[str], named: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *(each.format(path=path) for each in arguments)]) == 2
    assert named in capsys.readouterr().err
