"""`opdtheory audit`: targets, claims, files, exit statuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdtheory import cli

SOURCE = """
import opdtheory as opd

def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)

def k2(r):
    return r.token_sum(r.log_u.square() / 2)

def estimate(teacher, student):
    return (teacher - student).expm1() - (teacher - student)

class Losses:
    @staticmethod
    def right(r):
        return k2(r)

claimed = opd.estimator("return_to_go", "jsd", gamma=1.0)
number = 3
"""


@pytest.fixture
def losses(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "my_losses.py"
    path.write_text(SOURCE)
    yield str(path)
    # The tutorial, which other tests run in this process, has a module of this name too.
    sys.modules.pop(path.stem, None)


def test_audit_of_a_file(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3"]) == 1
    assert "forward_kl" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:k3", "--objective", "forward_kl"]) == 0
    assert cli.main(["audit", f"{losses}:Losses.right"]) == 0


def test_audit_of_a_module(losses: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(losses).parent))
    assert cli.main(["audit", "my_losses:k2"]) == 0
    capsys.readouterr()


def test_audit_of_another_kind_of_function(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:estimate"]) == 2
    assert "--call" in capsys.readouterr().err
    call = "r.token_sum(f(r.teacher_logprobs, r.student_logprobs))"
    assert cli.main(["audit", f"{losses}:estimate", "--call", call]) == 1
    assert "forward_kl" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:estimate", "--call", "r.token_sum("]) == 2
    assert "is not an expression" in capsys.readouterr().err


def test_audit_as_json(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--json", "--seed", "1"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["descends"] == "forward_kl"
    assert record["settings"]["seed"] == 1


def test_audit_takes_the_claim_of_an_estimator(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:claimed"]) == 0
    assert "jsd (token_return)" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:claimed", "--granularity", "token_local"]) == 1


def test_audit_of_a_parameterised_divergence(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--objective", "alpha(alpha=1)"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "PATH.py:FUNCTION"),
        ("nowhere.py:loss", "no file"),
        ("no_such_module_at_all:loss", "cannot be imported"),
        ("{losses}:k4", "it has k2, k3"),
        ("{losses}:number", "must be a function of rollouts, got int"),
    ],
)
def test_wrong_targets_are_usage_errors(
    losses: str, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = target.replace("{losses}", losses)
    assert cli.main(["audit", target]) == 2
    if "k4" in target:
        message = "has no 'k4'"
    assert message in capsys.readouterr().err


def test_wrong_names_are_usage_errors(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--objective", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["audit", f"{losses}:k3", "--granularity", "nonsense"])
    assert exit_.value.code == 2


def test_audit_writes_a_page(losses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "deep" / "audit.html"
    assert cli.main(["audit", f"{losses}:k3", "--html", str(page)]) == 1
    assert f"wrote {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["audit", f"{losses}:k3", "--html", str(page), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "other_objective" and "wrote" in captured.err


def test_a_recorded_bias_holds_and_a_new_one_fails(
    losses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = str(tmp_path / "known.json")
    assert cli.main(["audit", f"{losses}:k3", "--write-baseline", known]) == 0
    out = capsys.readouterr().out
    assert f"wrote {known}" in out and "known: other objective" in out
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known, "--json"]) == 0
    assert "known:" in capsys.readouterr().err
    # Another claim of the same loss, another seed and another loss are not on record.
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known, "--objective", "jsd"]) == 1
    assert "new:" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known, "--seed", "1"]) == 1
    assert cli.main(["audit", f"{losses}:k2", "--baseline", known, "--objective", "jsd"]) == 1
    assert cli.main(["audit", f"{losses}:k2", "--baseline", known]) == 0
    Path(losses).write_text(SOURCE.replace("r.log_u.expm1() - r.log_u)\n\ndef k2", "r.log_u.square() / 2)\n\ndef k2"))
    capsys.readouterr()
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known]) == 0
    assert "vanished:" in capsys.readouterr().out


def test_files_of_the_audit_that_are_wrong_are_usage_errors(
    losses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", f"{losses}:k2", "--baseline", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert cli.main(["audit", f"{losses}:k2", "--write-baseline", str(wrong)]) == 2
    assert "baseline_version" in capsys.readouterr().err
    assert cli.main(["audit", f"{losses}:k2", "--html", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    assert "exit status: 0" in capsys.readouterr().out
