"""Where things stand: a module's tests under its own name, no module too long to read, no folder too full."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Tests that cut across the package mirror nothing.
ACROSS = ("benchmarks", "browser", "fuzz", "laws", "mutation", "proofs", "release")
LONGEST, LONG = 500, ("divergences/catalogue.py",)
FULLEST, FULL = 15, ("theorems", "training")


def misplaced(root: Path) -> list[str]:
    """Test files that mirror neither a module nor a package."""
    tests, package = root / "tests", root / "opdtheory"
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        folder = path.relative_to(tests).parent
        if folder.parts[:1] and folder.parts[0] in ACROSS:
            continue
        twin = package / folder / path.stem.removeprefix("test_")
        if not twin.with_suffix(".py").is_file() and not (twin / "__init__.py").is_file():
            found.append(f"{path.relative_to(root)}: there is no {twin.relative_to(root)}")
    return found


def too_long(root: Path) -> list[str]:
    """Modules of more lines than one reads."""
    package, found = root / "opdtheory", []
    for path in sorted(package.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST and path.relative_to(package).as_posix() not in LONG:
            found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


def too_full(root: Path) -> list[str]:
    """Folders of more modules than one keeps in mind."""
    found = []
    for top in FULL:
        for folder in sorted({path.parent for path in (root / "opdtheory" / top).rglob("*.py")}):
            count = len(list(folder.glob("*.py")))
            if count > FULLEST:
                found.append(f"{folder.relative_to(root)}: {count} files")
    return found


@pytest.mark.parametrize("problems", [misplaced, too_long, too_full], ids=lambda rule: rule.__name__)
def test_the_layout_is_kept(problems: Callable[[Path], list[str]]) -> None:
    assert problems(ROOT) == []


def tree(root: Path, *files: str, lines: int = 1) -> Path:
    """A tree of files, each of so many lines."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n" * lines, encoding="utf-8")
    return root


def test_a_test_of_no_module_is_found(tmp_path: Path) -> None:
    modules = ("opdtheory/cli.py", "opdtheory/a/b/c.py", "opdtheory/a/b/d/__init__.py")
    right = ("tests/test_cli.py", "tests/a/b/test_c.py", "tests/a/b/test_d.py", "tests/laws/test_x.py", "tests/a/x.py")
    assert misplaced(tree(tmp_path, *modules, *right)) == []
    wrong = ("tests/a/test_c.py", "tests/b/test_c.py", "tests/test_b.py", "tests/a/laws/test_x.py")
    assert [text.partition(":")[0] for text in misplaced(tree(tmp_path, *wrong))] == sorted(wrong)


def test_a_long_module_is_found(tmp_path: Path) -> None:
    tree(tmp_path, "opdtheory/a.py", lines=LONGEST)
    assert too_long(tree(tmp_path, "opdtheory/divergences/catalogue.py", lines=LONGEST + 1)) == []
    assert too_long(tree(tmp_path, "opdtheory/a/catalogue.py", lines=LONGEST + 1)) == [
        f"opdtheory/a/catalogue.py: {LONGEST + 1} lines"
    ]


def test_a_full_folder_is_found(tmp_path: Path) -> None:
    tree(tmp_path, *(f"opdtheory/{top}/{n}.py" for top in ("auditing", "training") for n in range(FULLEST)))
    assert too_full(tree(tmp_path, "opdtheory/auditing/more.py", "opdtheory/training/models/more.py")) == []
    assert too_full(tree(tmp_path, "opdtheory/training/more.py")) == [f"opdtheory/training: {FULLEST + 1} files"]


# What prints a table itself: rich's tables and columns, and fields that are padded by hand.
OWN_TABLES = (
    re.compile(r"rich(\.table|\s+import\s+.*\bbox\b|\.columns)"),
    re.compile(r"\.[lr]just\("),
    re.compile(r"\{[^{}\n]*:([<>^](\{|\d)|[1-9]\d*,?[ds]?\})"),
)
RENDERER = "opdtheory/rendering/table.py"


def own_tables(root: Path) -> list[str]:
    """Places, apart from the renderer, where a table is printed in a way of their own."""
    found = []
    for top in ("opdtheory", "examples", "benchmarks", "docs", "tests/fuzz", "tests/mutation"):
        for path in sorted((root / top).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if name != RENDERER and any(pattern.search(line) for pattern in OWN_TABLES):
                    found.append(f"{name}:{number}: {line.strip()}")
    return found


def test_every_table_goes_through_one_renderer() -> None:
    assert own_tables(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "from rich.table import Table",
        "import rich.table",
        "from rich import box",
        "print(name.ljust(20), value)",
        'print(f"{name:<{width}}  {value}")',
        'print(f"{name:28}{calls:8,}")',
        "print(f'{name:>12}')",
    ],
)
def test_a_second_renderer_is_found(line: str, tmp_path: Path) -> None:
    tree(tmp_path, RENDERER, "opdtheory/commands/table.py", "examples/a/b.py")
    for path in (RENDERER, "examples/a/b.py"):
        (tmp_path / path).write_text(line + "\n", encoding="utf-8")
    assert own_tables(tmp_path) == [f"examples/a/b.py:1: {line}"]
