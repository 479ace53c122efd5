"""The command line: targets, exit statuses, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opdtheory import cli
from opdtheory.theorems import IdentityResult, StepResult, TheoremResult
from opdtheory.verification.page import render_page
from opdtheory.verification.verify import Verification, shipped_estimators, verify

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
def losses(tmp_path: Path) -> str:
    path = tmp_path / "my_losses.py"
    path.write_text(SOURCE)
    return str(path)


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
    assert "no expression" in capsys.readouterr().err


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
        ("{losses}:number", "int"),
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
    with pytest.raises(SystemExit) as exit_:
        cli.main(["nonsense"])
    assert exit_.value.code == 2
    assert cli.main([]) == 2


@pytest.fixture(scope="module")
def verification() -> Verification:
    """Two quick theorems and a few estimators; tests/laws runs all of them."""
    return verify(["T1b", "T8c", "k1_loss", "k3_loss", "opd_plus"])


def test_what_is_selected_is_verified(verification: Verification) -> None:
    failed = [f"{r.number} {r.name}" for r in verification.theorems if not r.passed]
    failed += [f"{r.name}: {r.claim.verdict}, audit {r.audit.verdict}" for r in verification.estimators if not r.passed]
    assert verification.passed, failed
    assert [r.number for r in verification.theorems] == ["T1b", "T8c"]
    assert {r.audit.name.split("'")[1] for r in verification.estimators} == {"k1_loss", "k3_loss", "opd_plus"}
    assert verification.twins_refuted >= len(verification.identities) + len(verification.estimators)


def test_every_named_estimator_is_verified() -> None:
    import opdtheory as opd

    assert {loss.name for loss in shipped_estimators()} == set(opd.estimator_names())


def test_two_processes_find_what_one_finds(verification: Verification) -> None:
    again = verify(["T1b", "k1_loss"], workers=2)
    assert again.passed
    first, second = verification.theorems[0], again.theorems[0]
    assert [r.error for r in first.identities] == [r.error for r in second.identities]


def test_unknown_selections_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="select"):
        verify(["T99"])
    with pytest.raises(ValueError, match="workers"):
        verify(["T1b"], workers=0)
    assert cli.main(["verify", "T99"]) == 2
    assert "T99" in capsys.readouterr().err


def test_verification_as_json(verification: Verification) -> None:
    record = json.loads(json.dumps(verification.to_dict(), allow_nan=False))
    assert record["passed"] is True
    assert [theorem["number"] for theorem in record["theorems"]] == ["T1b", "T8c"]
    assert all(step["holds"] for theorem in record["theorems"] for step in theorem["derivation"])


def of(*identities: IdentityResult, steps: bool = True) -> Verification:
    """A run of one theorem that found these."""
    step = StepResult("1 = 1", "arithmetic", steps, False)
    return Verification([TheoremResult("T0", "name", [step], list(identities), 0.1)], [], 1.0)


def test_a_surviving_twin_or_a_large_error_fails() -> None:
    right = IdentityResult("T0", "name", "x", 1e-16, 1e-12, 3, {"twin": 1.0}, 0.1)
    survivor = IdentityResult("T0", "name", "x", 1e-16, 1e-12, 3, {"twin": 1e-13}, 0.1)
    wrong = IdentityResult("T0", "name", "x", 1e-3, 1e-12, 3, {"twin": 1.0}, 0.1)
    empty = IdentityResult("T0", "name", "x", 0.0, 1e-12, 0, {"twin": 1.0}, 0.1)
    untested = IdentityResult("T0", "name", "x", 0.0, 1e-12, 3, {}, 0.1)
    assert of(right).passed
    assert not of(right, steps=False).passed
    for result in (survivor, wrong, empty, untested):
        assert not of(right, result).passed
    assert survivor.survivors == ["twin"]


def test_page_is_self_contained_and_escapes(verification: Verification) -> None:
    page = render_page(verification)
    assert page.count("<svg") == 2
    assert "src=" not in page and "@import" not in page and "<script" not in page
    hostile = IdentityResult("T<b>", "<script>alert(1)</script>", "x", 0.0, 1e-12, 1, {"<i>": 1.0}, 0.1)
    page = render_page(Verification(of(hostile).theorems, verification.estimators[:1], 1.0))
    assert "<script" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page


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
