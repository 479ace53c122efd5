"""Functions that the command line names: whatever their module does, it is found or refused in two lines."""

from __future__ import annotations

import copy
import fractions
import pickle
import sys
from pathlib import Path

import pytest

from opdtheory.commands.console import UsageError
from opdtheory.commands.targets import failure, find, importable

LOSS = "def loss(r):\n    return 1\n"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write files into the working directory."""
    monkeypatch.chdir(tmp_path)
    # Modules that other tests left, and that these leave.
    before = set(sys.modules)

    def write(**files: str) -> Path:
        for name, source in files.items():
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        return tmp_path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


# What a file does when it is imported, and what the two lines say.
IMPORTS = {
    "def f(:": ("SyntaxError: ", "at mine.py:1: def f(:"),
    "x = 1\n  y = 2": ("IndentationError: ", "at mine.py:2: y = 2"),
    "x = '\0'": ("null bytes", "--traceback"),
    "import sys\nsys.exit(0)": ("SystemExit: it exits with status 0", "at mine.py:2: sys.exit(0)"),
    "exit()": ("SystemExit: it exits with status None", "at mine.py:1: exit()"),
    "raise SystemExit('done')": ("SystemExit: it exits with status done", "at mine.py:1"),
    "import no_such_module_at_all": ("ModuleNotFoundError: No module named 'no_such_module_at_all'", "at mine.py:1"),
    "import torch\ntorch.no_such_name": ("AttributeError: ", "at mine.py:2: torch.no_such_name"),
    "def g():\n    return 1 / 0\ng()": ("ZeroDivisionError: division by zero", "at mine.py:2: return 1 / 0"),
    "import pytest\npytest.skip('x', allow_module_level=True)": ("Skipped: ", "at mine.py:2"),
    "class Stop(BaseException): pass\nraise Stop('a\\nb')": ("Stop: a b", "at mine.py:2"),
    "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E": (": E\n", "at mine.py:3: raise E"),
    "import sys\nsys.path.clear()\nraise KeyError(1)": ("KeyError: 1", "at mine.py:3"),
    "raise ValueError('x' * 10_000)": ("ValueError: xxx", "at mine.py:1"),
}


@pytest.mark.parametrize("source", IMPORTS, ids=lambda source: source.split("\n")[-1][:20])
def test_a_file_that_cannot_be_imported_is_refused_in_two_lines(source: str, written, monkeypatch) -> None:
    written(mine=source)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("builtins.exit", sys.exit, raising=False)
    with pytest.raises(UsageError) as caught:
        find("mine.py:f")
    first, second = str(caught.value).splitlines()
    what, where = IMPORTS[source]
    assert first.startswith("mine.py cannot be imported: ") and what.strip() in f"{first}\n"
    assert where in second and "--traceback" in second and len(first) < 400
    assert caught.value.__cause__ is not None


def test_an_interrupt_passes_through(written) -> None:
    written(mine="raise KeyboardInterrupt", lazy="def __getattr__(name):\n    raise KeyboardInterrupt")
    for target in ("mine.py:f", "mine:f", "lazy.py:f"):
        with pytest.raises(KeyboardInterrupt):
            find(target)


def test_a_name_that_cannot_be_read_is_refused(written) -> None:
    written(lazy="def __getattr__(name):\n    raise OSError('gone')")
    with pytest.raises(UsageError, match=r"^lazy.py has a 'f' that cannot be read: OSError: gone\nat lazy.py:2"):
        find("lazy.py:f")


@pytest.mark.parametrize("module", [copy, fractions, pickle], ids=lambda module: module.__name__)
def test_a_file_named_after_a_module_leaves_it_alone(module, written) -> None:
    name = module.__name__
    written(**{name: f"import {name} as real\nimport dataclasses\n{LOSS}\nhere = real.__file__"})
    found = find(f"{name}.py:loss")
    assert sys.modules[name] is module
    assert found.function.__globals__["here"] == module.__file__
    assert found.function.__module__ != name


def test_a_file_named_after_a_module_that_is_not_loaded_yet_does_not_hide_it(written) -> None:
    """`wave` of the standard library is imported by the file of that name, and again by its function."""
    sys.modules.pop("wave", None)
    written(
        wave="import wave as real\nimport sys\n"
        "def loss(r):\n    del sys.modules['wave']\n    import wave\n    return wave"
    )
    found = find("wave.py:loss")
    assert found.function.__globals__["real"].Wave_read
    with importable(found.folder, found.stem):
        assert found.function(None).Wave_read


def test_dataclasses_and_pickles_find_the_module_of_a_file(written) -> None:
    written(
        mine="from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass\nclass Kept:\n    x: int = 1\n    y: ClassVar[int] = 2\n" + LOSS
    )
    kept = find("mine.py:loss").function.__globals__["Kept"]()
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert "mine" not in sys.modules


def test_the_modules_beside_a_file_are_found(written) -> None:
    folder = written(
        beside_one="import beside_two\nx = beside_two.x", beside_two="x = 2", beside_three="x = 3", json="broken ("
    )
    written(
        mine="import beside_one\nimport json\nx = beside_one.x\n"
        "def loss(r):\n    from beside_three import x\n    return x"
    )
    found = find("mine.py:loss")
    assert found.function.__globals__["x"] == 2 and str(folder) not in sys.path
    with importable(found.folder, found.stem):
        assert found.function(None) == 3
    assert str(folder) not in sys.path


def test_two_files_of_one_name_are_two_modules(written) -> None:
    folder = written(mine=LOSS)
    (folder / "other").mkdir()
    (folder / "other" / "mine.py").write_text("def loss(r):\n    return 2\n")
    first, second = find("mine.py:loss"), find("other/mine.py:loss")
    assert (first.function(None), second.function(None)) == (1, 2)
    assert first.function.__module__ != second.function.__module__


def test_a_module_is_found_in_the_working_directory_or_refused(written) -> None:
    folder = written(a_module_here=LOSS, exits_here="import sys; sys.exit(3)", needs_here="import a_missing_one")
    found = find("a_module_here:loss")
    assert found.function(None) == 1 and found.file == Path("a_module_here.py") and found.folder == folder
    for target, words in {
        "no_such_one:f": "module 'no_such_one' cannot be imported: No module named 'no_such_one'",
        "a_module_here.deep:f": "module 'a_module_here.deep' cannot be imported",
        "exits_here:f": "exits_here cannot be imported: SystemExit: it exits with status 3\nat exits_here.py:1",
        "needs_here:f": "needs_here cannot be imported: ModuleNotFoundError: No module named 'a_missing_one'\nat needs",
        ".:f": "cannot be imported",
        "..x:f": "cannot be imported",
        "a_module_here:nope": "a_module_here has no 'nope'; it has loss",
    }.items():
        with pytest.raises(UsageError) as caught:
            find(target)
        assert words in str(caught.value)


def test_a_module_that_puts_another_object_in_its_place_is_read_there(written) -> None:
    written(mine="import sys\nclass M:\n    def loss(self, r): return 7\nsys.modules[__name__] = M()")
    assert find("mine.py:loss").function(None) == 7
    with pytest.raises(UsageError, match="has no 'nope'"):
        find("mine.py:nope")


def test_a_failure_without_a_line_of_the_users_says_how_to_see_it() -> None:
    assert str(failure("it fails", ValueError("no"), None)) == "it fails: ValueError: no\n--traceback shows where"
