"""`opdtheory verify`: what it prints, writes and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from opdtheory import cli
from opdtheory.commands.verify import _theorems
from opdtheory.theorems import IdentityResult
from opdtheory.theorems.proofs import proof
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


def test_a_proof_in_coq_stands_on_the_theorems_own_row(
    verification: Verification, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, (first, other) = proof("T1"), verification.theorems
    assert found is not None
    result = Verification([dataclasses.replace(first, number="T1"), other], [], 1.0)
    monkeypatch.setattr("opdtheory.verification.verify.verify", lambda *_, **__: result)
    assert cli.main(["verify", "--no-report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.endswith(f"  {found.checked} {found.digest[:8]}")]
    assert len(shown) == 1 and shown[0].split()[:2] == ["ok", "T1"]
    assert lines[-1].endswith("; 1 theorem is machine-checked in Coq")
    assert next(line for line in lines if "false twins" in line).split()[-1] == "Coq"
    # A terminal of 80 columns shows one table.
    narrow = _theorems(result).lines(80)
    assert max(map(len, narrow)) <= 80 and "" not in narrow and any(found.checked in line for line in narrow)


def test_unknown_selections_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "T99"]) == 2
    assert "T99" in capsys.readouterr().err
