"""The package as installed: metadata, what an import costs, public names, the oldest Python's syntax."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import opdtheory

ROOT = Path(opdtheory.__file__).parent
HEAVY = ("sympy", "scipy", "matplotlib", "rich", "hypothesis", "transformers")
PUBLIC = tuple(getattr(opdtheory, "__all__", ()))


def _in_a_fresh_interpreter(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_installed_version_is_the_packages_own() -> None:
    installed = metadata.version("opdtheory")
    assert installed == opdtheory.__version__, "stale installation; delete .venv/.installed-* and run make again"


def test_the_version_stands_in_the_changelog_and_in_the_citation() -> None:
    assert released((ROOT.parent / "CHANGELOG.md").read_text(encoding="utf-8"))[0] == opdtheory.__version__
    cited = (ROOT.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", cited, re.MULTILINE) == [opdtheory.__version__]
    assert released("## [Unreleased]\n## [0.3.0]\n## [0.2.0] - 2026-11-28\n## [0.1.9] - soon\n") == ["0.2.0"]


def released(changelog: str) -> list[str]:
    """The versions with a date, the newest first."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)


def test_metadata_names_every_supported_python() -> None:
    info = metadata.metadata("opdtheory")
    assert info["Requires-Python"] == ">=3.10"
    classifiers = info.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= set(classifiers)
    assert "Typing :: Typed" in classifiers
    assert (ROOT / "py.typed").is_file()


def test_import_leaves_heavy_libraries_unloaded() -> None:
    # torch itself loads some of them (sympy, in some versions), so only what opdtheory adds counts.
    added = _in_a_fresh_interpreter(
        "import sys, torch; before = set(sys.modules); import opdtheory, json;"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules and name not in before]))"
    )
    assert json.loads(added) == []


def test_no_help_loads_torch() -> None:
    loaded = _in_a_fresh_interpreter(
        "import contextlib, io, json, sys\n"
        "from opdtheory.cli import main\n"
        "for command in ([], ['verify'], ['table'], ['audit'], ['train'], ['reproduce'], ['bench']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([*command, '--help'])\n"
        f"print(json.dumps([name for name in ('torch', 'numpy', *{HEAVY!r}) if name in sys.modules]))"
    )
    assert json.loads(loaded) == []


@pytest.mark.slow
def test_import_adds_under_a_quarter_second_to_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import opdtheory; print(time.perf_counter() - t)"
    seconds = sorted(float(_in_a_fresh_interpreter(code)) for _ in range(3))
    assert seconds[1] < 0.25


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(opdtheory, name)
    if callable(value) or isinstance(value, type(ast)):
        assert (value.__doc__ or "").strip(), f"opdtheory.{name} has no docstring"


def test_public_names_are_listed_once_and_seen_by_dir() -> None:
    assert len(PUBLIC) == len(set(PUBLIC))
    assert set(PUBLIC) <= set(dir(opdtheory))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_syntax_is_that_of_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))
