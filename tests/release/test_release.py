"""The release's own checks: each finds what it looks for."""

from __future__ import annotations

import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.cold_start import Stages, WrongError
from tests.release import trial as trials
from tests.release.__main__ import main, summary
from tests.release.artefacts import ROOT, metadata, names, wrong_in_sdist, wrong_in_wheel
from tests.release.ranges import interpreter, lowest, requirements
from tests.release.trial import EXTRAS, TESTS, FailedError, Trial, call

KNOWN = {"opdtheory/a.py", "opdtheory/py.typed", "tests/b.py", "README.md"}


def packed(folder: Path, files: dict[str, str]) -> tuple[Path, Path]:
    """A wheel and an sdist with the same files."""
    wheel, sdist = folder / "opdtheory-0-py3-none-any.whl", folder / "opdtheory-0.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    with tarfile.open(sdist, "w:gz") as archive_:
        for name, text in files.items():
            path = folder / name.replace("/", "_")
            path.write_text(text, encoding="utf-8")
            archive_.add(path, f"opdtheory-0/{name}")
    return wheel, sdist


def test_files_that_are_missing_or_too_many_are_named() -> None:
    assert wrong_in_sdist(KNOWN | {"PKG-INFO"}, KNOWN) == []
    assert wrong_in_sdist(KNOWN - {"tests/b.py"} | {"reports/verify.html"}, KNOWN) == [
        "the sdist lacks tests/b.py",
        "the sdist holds reports/verify.html, which git does not track",
    ]
    package = {"opdtheory/a.py", "opdtheory/py.typed", "opdtheory-0.dist-info/METADATA"}
    assert wrong_in_wheel(package, KNOWN) == []
    assert wrong_in_wheel(package - {"opdtheory/py.typed"} | {"tests/b.py"}, KNOWN) == [
        "the wheel lacks opdtheory/py.typed",
        "the wheel holds tests/b.py, which is no part of the package",
    ]


def test_files_and_metadata_are_read_from_either_artefact(tmp_path: Path) -> None:
    text = {"opdtheory/a.py": "", "opdtheory-0.dist-info/METADATA": "Version: 0\nName: a\n", "PKG-INFO": "Name: a\n"}
    wheel, sdist = packed(tmp_path, text)
    assert names(wheel) == names(sdist) == set(text)
    assert metadata(wheel) == ["Name: a", "Version: 0"] and metadata(sdist) == ["Name: a"]


def test_every_requirement_has_a_lower_bound() -> None:
    bounds = lowest(requirements(ROOT / "pyproject.toml", EXTRAS))
    assert "torch==2.6" in bounds and "rich==13" in bounds and "tomli==2; python_version < '3.11'" in bounds
    assert lowest(["opdtheory[train]>=1", "a-b==1.2,<2"]) == ["opdtheory==1", "a-b==1.2"]
    with pytest.raises(ValueError, match="torch<3: must have a lower bound"):
        lowest(["torch<3"])


def test_interpreters_are_found_by_version_or_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "{}.{}".format(*sys.version_info[:2])
    assert interpreter(sys.executable) == sys.executable
    # A command of a version manager without the version, and one that is another version than its name says.
    scripts = {
        "python9.8": "exit 127",
        "python9.7": f'exec "{sys.executable}" "$@"',
        f"python{own}": f'exec "{sys.executable}" "$@"',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    assert interpreter(own) == sys.executable
    assert [interpreter(name) for name in ("9.7", "9.8", "9.9")] == [None] * 3


def test_a_missing_interpreter_is_named_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, sdist = packed(tmp_path, {"opdtheory/a.py": ""})
    monkeypatch.setattr("tests.release.__main__.wrong", lambda *_: [])
    arguments = ["--dist", str(tmp_path), "--folder", str(tmp_path / "work"), "--pythons", "9.9"]
    assert main(arguments) == 1
    assert "Python 9.9: no such interpreter" in capsys.readouterr().out
    ran: list[Trial] = []
    monkeypatch.setattr(Trial, "run", lambda self, *_: ran.append(self))
    arguments[-1] = sys.executable
    assert main([*arguments, "--lowest", sys.executable, "--with", "torch==2.13.0"]) == 0
    assert [(one.artefact, one.ends) for one in ran] == [(wheel, None), (sdist, None), (wheel, "lowest")]
    assert ran[0].constraints and ran[0].constraints.read_text(encoding="utf-8") == "torch==2.13.0\n"


def test_a_failed_command_ends_the_trial_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FailedError, match="pip: exit status 3\nno such package"):
        call([sys.executable, "-c", "print('no such package'); raise SystemExit(3)"], tmp_path, "pip")
    one = Trial(sys.executable, "3", tmp_path / "opdtheory-0.tar.gz")
    said = {"environment": "", "install": "", "check": "", "import": "2.6 0 /elsewhere/opdtheory/__init__.py"}
    monkeypatch.setattr(trials, "call", lambda command, folder, stage: said[stage])
    one.run(tmp_path / "trial", one.artefact)
    assert one.problem == "import: got 0 of another place" and not (tmp_path / "trial").exists()
    assert summary([one])[1].endswith(one.problem)


def test_the_tests_of_a_trial_are_there() -> None:
    assert [name for name in TESTS if not (ROOT / name).exists()] == []


def test_a_stage_of_a_cold_start_does_what_it_says(tmp_path: Path) -> None:
    stages, command = (
        Stages(tmp_path),
        [sys.executable, "-S", "-c", "print('that of  forward_kl'); raise SystemExit(1)"],
    )
    stages.run("audit", command, status=1, says=["that of forward_kl"])
    assert stages.until("audit", "audit") == stages.rows[0][1] > 0
    for status, says in ((0, ["forward_kl"]), (1, ["reverse_kl"])):
        with pytest.raises(WrongError, match="audit: must exit with"):
            stages.run("audit", command, status=status, says=says)
