"""What a project puts to use: the example project, the action and the pre-commit hook, green and red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import opdtheory as opd
from opdtheory.version import __version__
from tests.laws.workflows import action, check_yaml, hooks
from tests.losses import k3
from tests.scripts import loaded

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "examples" / "project"

LOSSES = """
def k2(r):
    return r.token_sum(r.log_u.square() / 2)

def k3(r):
    print("::error::not a command")
    return r.token_sum(r.log_u.expm1() - r.log_u)
"""


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """What pytester imports in this process it would drop again, and C extensions load once only."""
    from opdtheory.auditing.views import render_audit

    render_audit(opd.audit(k3, "reverse_kl"))


def patched(text: str, patch: str) -> str:
    """A text after the hunks of a patch."""
    for hunk in re.split(r"^@@.*@@\n", patch, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
        assert text.count(old) == 1, f"the patch does not fit:\n{old}"
        text = text.replace(old, new)
    return text


def copied(folder: Path, planted: bool) -> None:
    """The example project in a folder, with or without its bug."""
    shutil.copytree(PROJECT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    if planted:
        losses = folder / "src" / "tinydistil" / "losses.py"
        patch = (PROJECT / "planted_bug.patch").read_text(encoding="utf-8")
        losses.write_text(patched(losses.read_text(encoding="utf-8"), patch), encoding="utf-8")


# `examples/project/README.md`, a page of the slow suite, runs the rest of both suites, each in a process of its own.
@pytest.mark.parametrize("planted", [False, True])
def test_the_projects_mark_is_green_and_red_with_the_planted_bug(pytester: Any, planted: bool) -> None:
    from tests.testing.test_plugin import PLUGIN

    copied(pytester.path, planted)
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "opd_audit")
    if planted:
        result.assert_outcomes(failed=1, deselected=2)
        result.stdout.fnmatch_lines(["*distillation_loss: BIASED", "*is not that of jsd*", "*no f-divergence*(T4)*"])
    else:
        result.assert_outcomes(passed=1, deselected=2)


def test_the_projects_files_name_what_exists() -> None:
    workflow = check_yaml((PROJECT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    hook = check_yaml((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]
    (target,) = workflow["jobs"]["audit"]["steps"][1]["with"]["targets"].split()
    assert target == hook["hooks"][0]["args"][0]
    path, _, name = target.partition(":")
    assert f"def {name}(" in (PROJECT / path).read_text(encoding="utf-8")
    assert re.search(hook["hooks"][0]["files"], path)


def test_the_documentation_names_one_version() -> None:
    pages = [*(ROOT / "docs").glob("*.md"), PROJECT / ".github/workflows/test.yml", PROJECT / ".pre-commit-config.yaml"]
    found = {
        v for page in pages for v in re.findall(r"(?:opdtheory@|rev: )v([\d.]+)", page.read_text(encoding="utf-8"))
    }
    assert len(found) == 1


def run_steps(folder: Path, inputs: dict[str, str], skip: tuple[str, ...] = ("Install",)) -> tuple[int, str, str]:
    """Run the scripts of the action's steps as a runner does; returns the status, the output and the summary."""
    found = action()
    values = {name: each.get("default", "") for name, each in found["inputs"].items()} | inputs
    summary, output, status = folder / "summary.md", "", 0
    # `python` is that of this environment.
    programs = folder / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    (programs / "python").chmod(0o755)
    for step in found["runs"]["steps"]:
        if "run" not in step or step["name"] in skip:
            continue
        assert "${{" not in step["run"], "an input in a script is read as part of it"
        env = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: values[m[1]], text)
            for name, text in step["env"].items()
        }
        env = {
            **os.environ,
            **env,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(summary),
        }
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder / values["working-directory"],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, status = output + done.stdout, done.returncode
        if status:
            break
    return status, output, summary.read_text(encoding="utf-8") if summary.exists() else ""


@pytest.mark.slow
def test_the_action_fails_with_a_report_and_an_annotation(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text(LOSSES, encoding="utf-8")
    status, output, summary = run_steps(tmp_path, {"targets": "\n losses.py:k3\n", "objective": "reverse_kl"})
    assert status == 1
    assert "::error file=losses.py,line=5,title=opdtheory audit::losses.py:k3: OTHER OBJECTIVE%0AThe loss" in output
    assert "losses.py:k3: OTHER OBJECTIVE" in summary and "gradient is that of forward_kl" in summary
    assert "not what it claims" in summary
    # What the loss prints is between these two, and so is no command.
    token = re.search(r"^::stop-commands::(\w{32})$", output, re.MULTILINE)
    assert token is not None
    printed = output.index("::error::not a command")
    assert token.end() < printed < output.index(f"\n::{token[1]}::\n") < output.index("::error file=")


@pytest.mark.slow
def test_the_action_passes_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "losses.py").write_text(LOSSES, encoding="utf-8")
    inputs = {"targets": "losses.py:k2", "arguments": "--eos 0", "working-directory": "sub"}
    status, output, summary = run_steps(tmp_path, inputs)
    assert status == 0 and "::error file" not in output
    assert "as claimed" in summary and "losses.py:k2: EXACT" in summary


@pytest.mark.slow
def test_the_action_audits_every_target_and_keeps_the_largest_status(tmp_path: Path) -> None:
    (tmp_path / "losses.py").write_text(LOSSES, encoding="utf-8")
    status, output, summary = run_steps(tmp_path, {"targets": "losses.py:k9\nlosses.py:k3\nlosses.py:k2"})
    assert status == 2
    assert "has no 'k9'" in summary and "k3: OTHER OBJECTIVE" in summary and "k2: EXACT" in summary
    assert output.count("::error file=losses.py") == 2


@pytest.mark.parametrize("target", ["$(touch here).py:f", "`touch here`", "a.py:f; touch here", "--html=here"])
def test_an_input_of_the_action_is_never_a_command(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = loaded(ROOT / ".github" / "audit.py")
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 2, "it is\n```\nnot there: 100%")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPD_TARGETS", target)
    monkeypatch.setenv("OPD_ARGUMENTS", "--call 'f(r, 1)'")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert module.main() == 2
    assert asked == [[sys.executable, "-m", "opdtheory", "audit", "--call", "f(r, 1)", "--", target]]
    assert not (tmp_path / "here").exists()
    assert "\n````" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    monkeypatch.setenv("OPD_ARGUMENTS", "--call 'f(r")
    assert module.main() == 2
    monkeypatch.setenv("OPD_TARGETS", "\n\n")
    assert module.main() == 2


def test_the_action_installs_itself_unless_told_otherwise(tmp_path: Path) -> None:
    marker = tmp_path / "installed"
    status, _, _ = run_steps(tmp_path, {"targets": "a.py:f", "install": f"touch {marker}; exit 3"}, skip=("Audit",))
    assert status == 3 and marker.exists()
    assert action()["inputs"]["install"]["default"] == 'python -m pip install "$GITHUB_ACTION_PATH"'
    assert __version__


def test_the_hook_is_run_as_pre_commit_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from opdtheory.cli import main

    (hook,) = hooks().values()
    assert hook["id"] == "opdtheory-audit" and hook["language"] == "python" and hook["pass_filenames"] is False
    program, *entry = hook["entry"].split()
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\n{program} = "opdtheory.cli:main"\n' in scripts, "the entry is what the package installs"
    (tmp_path / "losses.py").write_text(LOSSES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # Without file names, the entry gets the arguments alone.
    assert main([*entry, "losses.py:k2", "losses.py:k3", "--objective", "reverse_kl"]) == 1
    said = capsys.readouterr().out
    assert said.index("losses.py:k2: EXACT") < said.index("losses.py:k3: OTHER OBJECTIVE")
