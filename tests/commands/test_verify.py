"""`opdtheory verify`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opdtheory import cli
from opdtheory.theorems import IdentityResult
from opdtheory.verification.verify import Verification
from tests.verification.runs import of


@pytest.mark.slow
def test_verify_prints_and_writes(
    verification: Verification, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opdtheory.verification.verify.verify", lambda *_, **__: verification)
    page = tmp_path / "deep" / "verify.html"
    assert cli.main(["verify", "--report", str(page)]) == 0
    out = capsys.readouterr().out
    assert "variational reading" in out and "2 of 2 theorems hold" in out
    assert page.read_text().startswith("<!doctype html>")
    assert cli.main(["verify", "--json", "--no-report"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    monkeypatch.setattr("opdtheory.commands.verify.console_of", lambda: None)
    assert cli.main(["verify", "--no-report"]) == 0
    assert "theorems hold" in capsys.readouterr().out
    failing = of(IdentityResult("T0", "n", "x", 1.0, 1e-12, 1, {"twin": 1.0}, 0.1))
    monkeypatch.setattr("opdtheory.verification.verify.verify", lambda *_, **__: failing)
    assert cli.main(["verify", "--no-report"]) == 1


def test_unknown_selections_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "T99"]) == 2
    assert "T99" in capsys.readouterr().err
