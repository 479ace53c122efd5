"""`[tool.opdtheory]`: what it may set, where it is looked for, and how it is refused."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.testing.project import project_settings

EVERY = """
[project]
name = "mine"

[tool.opdtheory]
objective = "jsd"
granularity = "token_return"
batch_size = 2
eos = 0
off_policy = 1
gamma = 0.5
seed = 3
prompts = 2
environment = [0, 2]
shared_prompt = true
method = "exact"
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pyproject.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_argument_of_the_audit_can_be_set(tmp_path: Path) -> None:
    write(tmp_path, EVERY)
    found = project_settings(tmp_path)
    assert found == {
        **{"objective": "jsd", "granularity": "token_return", "batch_size": 2, "eos": 0, "off_policy": 1, "gamma": 0.5},
        **{"seed": 3, "prompts": 2, "environment": [0, 2], "shared_prompt": True, "method": "exact"},
    }
    assert set(found) <= set(inspect.signature(opd.audit).parameters) - {"loss", "name", "details"}


def test_the_nearest_file_upward_counts(tmp_path: Path) -> None:
    write(tmp_path, "[tool.opdtheory]\nseed = 1\n")
    deep = tmp_path / "a" / "b" / "c"
    deep.mkdir(parents=True)
    assert project_settings(deep) == {"seed": 1}
    write(tmp_path / "a", "[tool.opdtheory]\neos = 0\n")
    assert project_settings(deep) == {"eos": 0}
    # A nearer file without the table is the project's file all the same.
    write(tmp_path / "a" / "b", "[project]\nname = 'mine'\n")
    assert project_settings(deep) == {}


@pytest.mark.parametrize(
    "text",
    ["", "[tool.ruff]\nline-length = 120\n", "[project]\ndependencies = ['opdtheory']\n", "is not = = TOML", "\0\xff"],
)
def test_a_file_without_the_table_sets_nothing(text: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    assert project_settings(tmp_path) == {}


def test_the_table_may_be_written_in_every_form_of_toml(tmp_path: Path) -> None:
    for text in (
        "tool.opdtheory.eos = 0",
        "[tool]\nopdtheory = {eos = 0}",
        "[ tool . 'opdtheory' ]\neos = 0",
        '[tool."opdtheory"]\neos = 0',
    ):
        write(tmp_path, text)
        assert project_settings(tmp_path) == {"eos": 0}


@pytest.mark.parametrize(
    ("line", "argument", "words"),
    [
        ("objetive = 'jsd'", "objetive", "is not a setting of [tool.opdtheory] in {path}; did you mean 'objective'?"),
        ("batch-size = 2", "batch-size", "did you mean 'batch_size'?"),
        ("name = 'mine'", "name", "is not a setting"),
        ("details = false", "details", "is not a setting"),
        ("loss = 'mine'", "loss", "is not a setting"),
        ("zzz = 1", "zzz", "the settings are objective, granularity, batch_size"),
        ("objective = 3", "objective", "must be a string in [tool.opdtheory] of {path}, got 3"),
        ("objective = ['jsd']", "objective", "must be a string"),
        ("batch_size = true", "batch_size", "must be an integer below 2**31 in [tool.opdtheory] of {path}, got True"),
        ("batch_size = 2.0", "batch_size", "must be an integer"),
        ("eos = '0'", "eos", "must be an integer"),
        ("eos = false", "eos", "must be an integer"),
        ("seed = 1" + "0" * 30, "seed", "must be an integer below 2**31"),
        ("off_policy = true", "off_policy", "must be a number"),
        ("off_policy = '0.3'", "off_policy", "must be a number"),
        ("gamma = 1979-05-27", "gamma", "must be a number"),
        ("environment = 1", "environment", "must be a list of which each is an integer"),
        ("environment = [0, true]", "environment", "must be a list of which each is an integer"),
        ("environment = [0, [1]]", "environment", "must be a list of which each is an integer"),
        ("shared_prompt = 1", "shared_prompt", "must be true or false"),
        ("method = {a = 1}", "method", "must be a string"),
        ("[tool.opdtheory.deep]\neos = 0", "deep", "is not a setting"),
    ],
)
def test_wrong_keys_and_values_are_refused_by_name(line: str, argument: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"[tool.opdtheory]\n{line}\n")
    with pytest.raises(InvalidArgumentError) as caught:
        project_settings(tmp_path)
    assert caught.value.argument == argument and words.format(path=path) in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.opdtheory\neos = 0", "is not valid TOML"),
        ("[tool.opdtheory]\neos = 0\0", "is not valid TOML"),
        ("tool = 'opdtheory'", "tool must be a table, got 'opdtheory'"),
        ("[tool]\nopdtheory = 0", "opdtheory must be a table, got 0"),
        ("[[tool.opdtheory]]\neos = 0", "opdtheory must be a table"),
    ],
)
def test_a_broken_file_is_refused_by_its_path(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InvalidArgumentError) as caught:
        project_settings(tmp_path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_without_a_parser_of_toml_only_a_file_with_the_table_is_refused(tmp_path, monkeypatch) -> None:
    """As on Python 3.10 without tomli."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "toml" in name else real(name, *rest))
    monkeypatch.setattr("opdtheory.toml.importlib.import_module", _missing)
    write(tmp_path, "[project]\ndependencies = ['opdtheory']\n")
    assert project_settings(tmp_path) == {}
    write(tmp_path, "[tool.opdtheory]\neos = 0\n")
    with pytest.raises(InvalidArgumentError, match="TOML needs Python 3.11 or pip install"):
        project_settings(tmp_path)


def _missing(name: str) -> None:
    raise ImportError(name)
