"""`python3 proofs/check.py`: what it prints, writes and refuses, on a tiny theory and on the proofs themselves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import pytest
from coq import AXIOMS, Coq
from record import differences, made, write

from tests.proofs.theory import BASE, T1, repository, theory

ROOT = Path(__file__).resolve().parents[2]


def test_without_coq_it_says_what_to_install(tmp_path: Path) -> None:
    root = repository(tmp_path)
    for path in (ROOT / "proofs").glob("*.py"):
        shutil.copy(path, root / "proofs")
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-I", str(root / "proofs" / "check.py")]
    env = {**os.environ, "PATH": str(tmp_path / "empty")}
    done = subprocess.run([sys.executable, *command[2:]], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "'coqc' is not on the PATH" in done.stderr and "apt-get install coq libcoq-coquelicot" in done.stderr
    assert "opam install" in done.stderr and list((root / "proofs").glob("*.vo")) == []


@pytest.mark.skipif(os.name == "nt", reason="the programs are scripts of a shell")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('[ "$1" = --version ] && echo "version 8.99" || exit 1', "8.99 is there, but its library Coquelicot is not"),
        ("echo nothing", "does not say which version"),
    ],
)
def test_what_is_no_coq_with_coquelicot_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, said: str
) -> None:
    program = tmp_path / "coqc"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    assert check.main(["--coqc", str(program)], repository(tmp_path / "root")) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"T1": T1.replace("Proof. unfold twice. lra. Qed.", "Admitted.")}, "proofs/T1.v:19: 'Admitted' may not"),
        ({"Base": BASE + "Axiom wrong : False.\n"}, "proofs/Base.v:8: 'Axiom' may not"),
        ({"Base": BASE + "(*"}, "proofs/Base.v:8: a comment does not end"),
    ],
)
def test_what_proves_nothing_is_refused_before_coq_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], said: str
) -> None:
    assert check.main(["--coqc", "no-such-program"], repository(tmp_path, **files)) == 1
    assert capsys.readouterr().err.startswith(said)


def test_wrong_options_are_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path)
    for arguments, said in (
        (["--signs", "T9"], "there is no proofs/T9.v; there are Base, T1"),
        (["--workers", "0"], "must be at least 1, got 0"),
        (["--write", "--signs"], "not allowed with"),
    ):
        with pytest.raises(SystemExit, match="2"):
            check.main(arguments, root)
        assert said in capsys.readouterr().err
    (root / "proofs" / "T1.v").unlink()
    assert check.main([], root) == 1
    assert "no file of a theorem" in capsys.readouterr().err


def test_the_changes_are_listed_without_coq(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path)
    assert check.main(["--coqc", "no-such-program", "--list-signs"], root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("proofs/Base.v:7: twice: + becomes -") and lines[-1] == "3 changes"
    assert check.main(["--list-signs", "proofs/T1.v"], root) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 changes"


@pytest.mark.slow
def test_a_tiny_theory_is_checked_and_recorded(coq: Coq, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path / "root")
    path = root / check.RECORD
    assert check.main(["--write"], root) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["coq"] == coq.version and record["theorems"]["T1"]["title"] == "the tiny theorem"
    (stated,) = record["theorems"]["T1"]["statements"]
    assert stated["name"] == "T1_larger" and set(stated["axioms"]) <= set(AXIOMS)
    capsys.readouterr()
    assert check.main([], root) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +\d+\.\d s  proofs/Base\.v$", out, re.MULTILINE)
    assert re.search(r"^  T1_twin_smaller is false; axioms: \w+", out, re.MULTILINE)
    assert re.search(r"^1 theorem file, 1 statement, 1 false twin, axioms: [\w, ]+; \d+ s$", out, re.MULTILINE)
    # Nothing is written beside the sources.
    assert sorted(each.name for each in (root / "proofs").iterdir()) == ["Base.v", "T1.v"]


def test_a_record_of_other_sources_is_refused(coq: Coq, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path / "root", Base=BASE.replace("x + x", "x + x + 0"))
    path = root / check.RECORD
    write(path, made(theory(), {"T1": {"T1_larger": AXIOMS, "T1_twin_smaller": AXIOMS}}, "8.16.1", {}))
    before = path.read_bytes()
    assert check.main([], root) == 1
    assert "T1: the record is of other sources: run `python3 proofs/check.py --write`" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_every_changed_sign_is_refused(coq: Coq, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = repository(tmp_path / "root")
    assert check.main(["--signs", "T1"], root) == 0
    out = capsys.readouterr().out
    assert "2 changes: 2 refused, 0 of them as no statement, 0 not refused" in out
    assert "T1_larger: < becomes > in `Definition T1_larger : Prop := forall x, 0 < x -> x < twice x.`: refused" in out


def test_a_sign_that_nothing_rests_on_survives(coq: Coq, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blunt = BASE + "\nDefinition unused (x : R) : R := - x.\n"
    assert check.main(["--signs", "Base"], repository(tmp_path / "blunt", Base=blunt)) == 1
    assert "`Definition unused (x : R) : R := - x.`: SURVIVES" in capsys.readouterr().out


def test_a_record_that_says_anything_else_differs() -> None:
    sources = theory()
    axioms = {"T1": {"T1_larger": AXIOMS, "T1_twin_smaller": ()}}
    new = made(sources, axioms, "8.16.1", {})
    assert differences(new, made(sources, axioms, "8.20.0", {})) == []
    fewer = {"T1": {"T1_larger": AXIOMS[:1], "T1_twin_smaller": ()}}
    assert differences(new, made(sources, fewer, "8.16.1", {})) == ["T1"]
    other = theory(T1=T1.replace("Twice a positive", "Two times a positive"))
    assert differences(new, made(other, axioms, "8.16.1", {})) == ["T1"]
    assert differences(new, {}) == ["T1"] and differences({"theorems": {}}, new) == ["T1"]


def test_the_day_stays_where_nothing_has_changed() -> None:
    axioms = {"T1": {"T1_larger": AXIOMS, "T1_twin_smaller": ()}}
    old = made(theory(), axioms, "8.16.1", {})
    old["theorems"]["T1"]["checked"] = "2001-01-01"
    days = [
        made(sources, axioms, version, old)["theorems"]["T1"]["checked"]
        for sources in (theory(), theory(Base=BASE + " "))
        for version in ("8.16.1", "8.20.0")
    ]
    assert [day == "2001-01-01" for day in days] == [True, False, False, False]


@pytest.mark.slow
def test_the_proofs_hold(coq: Coq, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--recheck"]) == 0, capsys.readouterr()


@pytest.mark.slow
def test_every_sign_of_the_proofs_matters(coq: Coq, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--signs"]) == 0, capsys.readouterr()
