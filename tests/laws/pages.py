"""Runs a page of the documentation from top to bottom, as its reader would, in a working directory of its own.

- A `python` block is executed in the one namespace of the page, and must print what the `text` block right below it
  says, or nothing.
- With `title="name.py"` it is a file: it is saved under that name, below what the page put there before, and imported
  by itself, so it must have all its imports; of a `test_*.py` every test is called. Other blocks import it.
- `toml`, `yaml` and `json` blocks are read; with a title they are saved, and the commands in them are checked.
- In a `console` block every command is run (`tests/laws/shell.py`) and must print what follows it. A line of dots
  stands for lines that are left out; a block that shows commands alone says nothing of what they print.
- `coq` blocks must stand in `proofs/`.
- The commands of `sh` and `bash` blocks are checked, not run; `py` blocks, which need other packages, are parsed.

Numbers may differ in their last printed digit, and below 1e-9 freely; counts may not.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from tests.laws import shell
from tests.laws.workflows import check_toml, check_yaml

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "py", "text", "console", "sh", "bash", "toml", "yaml", "json", "coq")

_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})", re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?!\w)")
_DOTS = re.compile(r"^\s*\.\.\.\s*$", re.MULTILINE)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Output:
    """What a page says that its code prints, and what it prints."""

    line: int
    start: int
    end: int
    shown: bool
    said: str
    printed: str

    @property
    def agrees(self) -> bool:
        return same(self.said, self.printed)


def same(said: str, printed: str) -> bool:
    """Whether two outputs are equal but for white space and the last digit of numbers; dots stand for any lines."""
    first, *others = [_plain(chunk).split() for chunk in _DOTS.split(said)]
    found, start = _plain(printed).split(), len(first)
    if not others:
        return _agree(first, found)
    *middle, last = others
    if not _agree(first, found[:start]):
        return False
    # The first place for each is the best: it leaves the most to those after it.
    for chunk in middle:
        places = range(start, len(found) - len(chunk) + 1)
        place = next((i for i in places if _agree(chunk, found[i : i + len(chunk)])), None)
        if place is None:
            return False
        start = place + len(chunk)
    return len(found) - len(last) >= start and _agree(last, found[len(found) - len(last) :])


def _agree(said: list[str], printed: list[str]) -> bool:
    a, b = " ".join(said), " ".join(printed)
    if len(said) != len(printed) or _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    numbers = [(number[0], a[number.end() :]) for number in _NUMBER.finditer(a)]
    return all(_close(x, y, end) for (x, end), y in zip(numbers, _NUMBER.findall(b), strict=True))


def _plain(text: str) -> str:
    """One line; how long pytest took, and the rules that it draws, are no part of it."""
    text = re.sub(r"\bin \d+\.\d\ds\b( \(\d+:\d\d:\d\d\))?", "in 0s", text)
    return " ".join(re.sub(r"([=_-])\1{3,}", r"\1\1\1", text).split())


def _close(a: str, b: str, end: str) -> bool:
    if a.isdigit() and b.isdigit() and not end.lstrip().startswith("%"):
        return a == b  # a count or a status, which nothing rounds
    if max(abs(float(a)), abs(float(b))) < _ROUNDING:
        return True
    last_digit = 10.0 ** max(int(Decimal(x).as_tuple().exponent) for x in (a, b))
    return abs(float(a) - float(b)) <= 1.01 * last_digit


def run_page(path: Path, long: bool = True) -> list[Output]:
    """Run every block of a page and return all that it says and does print; without `long`, what takes seconds."""
    page = path.read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(page))
    _check_fences(page, path.name)
    outputs: list[Output] = []
    with _directory_of(path):
        # Dataclasses and pickling look the defining module up by name.
        namespace: dict[str, object] = {"__name__": "__main__"}
        session = shell.Session(long)
        for block, following in itertools.pairwise([*blocks, None]):
            assert block is not None
            language, title, line = block[1], _TITLE.search(block[2]), page.count("\n", 0, block.start()) + 1
            try:
                if language == "python":
                    printed = _python(block[3], title and title[1], namespace, f"{path.name}:{line}")
                    shown = following if following and following[1] == "text" else None
                    if shown and page[block.end() : shown.start()].strip():
                        shown = None
                    start, end = (shown.start(3), shown.end(3)) if shown else (block.end(), block.end())
                    outputs.append(Output(line, start, end, shown is not None, page[start:end], printed))
                elif language == "console":
                    if (printed := _console(block[3], session)) is not None:
                        outputs.append(Output(line, block.start(3), block.end(3), True, block[3], printed))
                else:
                    _read(language, block[3], title and title[1])
            except AssertionError as problem:
                raise AssertionError(f"{path.name}:{line}: {problem}") from problem
    return outputs


def _check_fences(page: str, name: str) -> None:
    """Every block of code must be one that is run or read here."""
    opened = re.findall(r"^```(\w+)[^\n]*\n.*?^```$", page, re.MULTILINE | re.DOTALL)
    unknown = set(opened) - set(LANGUAGES)
    assert not unknown, f"{name}: nothing here runs or reads a block of {', '.join(sorted(unknown))}"
    fences = [fence[0] for fence in _FENCE.finditer(page)]
    assert fences == ["```"] * (2 * len(opened)), f"{name}: a block without a language, indented or not closed"


@contextlib.contextmanager
def _directory_of(page: Path) -> Iterator[None]:
    """A new working directory that imports find, with the examples and the README; or a copy of the page's project."""
    before, modules = Path.cwd(), dict(sys.modules)
    with tempfile.TemporaryDirectory() as directory:
        if (page.parent / "pyproject.toml").is_file() and page.parent != ROOT:
            shutil.copytree(page.parent, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (Path(directory) / "examples").symlink_to(ROOT / "examples")
            shutil.copy(ROOT / "README.md", directory)
        os.chdir(directory)
        sys.path.insert(0, directory)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path.remove(directory)
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", "")).startswith(directory):
                    del sys.modules[name]
                    if name in modules:
                        sys.modules[name] = modules[name]


def _python(code: str, title: str | None, namespace: dict[str, object], where: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if title is None:
            exec(compile(code, where, "exec"), namespace)
        else:
            _file(code, Path(title))
    return printed.getvalue()


def _file(code: str, path: Path) -> None:
    """Add a block to its file and import this by itself; of a file of tests, call the tests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(code)
    importlib.invalidate_caches()
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    # Not by an import, which could find what is compiled of an earlier block of the same second and size.
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    if path.stem.startswith("test_"):
        for name, value in list(vars(module).items()):
            if name.startswith("test_"):
                value()


def _console(text: str, session: shell.Session) -> str | None:
    """What a block would show: all that its commands print, or the commands alone if it shows nothing else."""
    shows = any(not line.startswith("$ ") for line in re.sub(r"\\\n\s*", " ", text).splitlines())
    lines = iter([line for line in text.splitlines(keepends=True) if line.startswith("$ ")])
    found = []
    for command, said in shell.commands(text):
        printed = session.run(command)
        if printed is None:
            printed = said
        elif not shows and session.fails():
            raise AssertionError(f"{' '.join(command)} ends with status {session.status}:\n{printed}")
        found.append(next(lines) + printed)
    return "".join(found) if shows else None


def _read(language: str, text: str, title: str | None) -> None:
    if title is not None and language != "py":
        Path(title).parent.mkdir(parents=True, exist_ok=True)
        Path(title).write_text(text, encoding="utf-8")
    if language == "py":
        ast.parse(text)
    elif language in ("sh", "bash"):
        for command, _ in shell.commands(text):
            shell.check(command)
    elif language == "toml":
        check_toml(text)
    elif language == "yaml":
        check_yaml(text)
    elif language == "json":
        json.loads(text)
    elif language == "coq":
        _check_coq(text)


def _check_coq(text: str) -> None:
    """What a page shows of the proofs must stand there word for word, apart from what it leaves out between."""
    known = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "proofs").glob("*.v"))]
    for part in text.strip().split("\n\n"):
        assert any(part in source for source in known), f"no file of proofs has {part!r}"


def write(path: Path) -> int:
    """Put today's outputs into a page; returns how many of them had changed."""
    page, changed = path.read_text(encoding="utf-8"), 0
    for output in reversed(run_page(path)):
        # What is left out of an output that is right stays left out.
        if output.said.strip() != output.printed.strip() and not (output.agrees and _DOTS.search(output.said)):
            changed += not output.agrees
            printed = output.printed if output.shown else f"\n\n```text\n{output.printed}```"
            page = page[: output.start] + printed + page[output.end :]
    path.write_text(page, encoding="utf-8")
    return changed
