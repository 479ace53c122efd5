"""The documentation keeps up with the library: its code prints what the pages say, and no public name is missing.

Each page is run from top to bottom, in one namespace and in an empty working directory:

- a `python` block is executed, and must print what the `text` block right below it says, or nothing;
- with `title="name.py"` it is saved under that name as well; of a `test_*.py` every test is called;
- in a `console` block that shows output `$ opdtheory audit ...` and `$ echo $?` are run and must print what follows;
  other commands are for the reader.

Numbers may differ in their last printed digit, and below 1e-9 freely. `python tests/laws/test_docs.py --write` puts
today's outputs into the pages, or into those named after it.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LONG = ("ci.md", "concepts.md", "tutorial.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").rglob("*.md")), *sorted(DOCS.rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?!\w)")
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
    """Whether two outputs are equal but for white space and the last digit of numbers."""
    said, printed = " ".join(said.split()), " ".join(printed.split())
    if _NUMBER.sub("#", said) != _NUMBER.sub("#", printed):
        return False
    return all(_close(a, b) for a, b in zip(_NUMBER.findall(said), _NUMBER.findall(printed), strict=True))


def _close(a: str, b: str) -> bool:
    if max(abs(float(a)), abs(float(b))) < _ROUNDING:
        return True
    last_digit = 10.0 ** max(int(Decimal(x).as_tuple().exponent) for x in (a, b))
    return abs(float(a) - float(b)) <= 1.01 * last_digit


def run_page(path: Path) -> list[Output]:
    """Run every block of a page and return all that it says and does print."""
    page = path.read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(page))
    outputs = []
    with _empty_directory():
        # Dataclasses and pickling look the defining module up by name.
        namespace: dict[str, object] = {"__name__": "__main__"}
        for block, following in itertools.pairwise([*blocks, None]):
            assert block is not None
            line = page.count("\n", 0, block.start()) + 1
            if block[1] == "python":
                printed = _run_python(block[3], block[2], namespace, f"{path.name}:{line}")
                shown = following if following and following[1] == "text" else None
                if shown and page[block.end() : shown.start()].strip():
                    shown = None
                start, end = (shown.start(3), shown.end(3)) if shown else (block.end(), block.end())
                outputs.append(Output(line, start, end, shown is not None, page[start:end], printed))
            elif block[1] == "console" and any(not line.startswith("$ ") for line in block[3].splitlines()):
                outputs.append(Output(line, block.start(3), block.end(3), True, block[3], _run_console(block[3])))
    return outputs


@contextlib.contextmanager
def _empty_directory() -> Iterator[None]:
    """An empty working directory that imports find, but for a link to the examples."""
    before, modules = Path.cwd(), set(sys.modules)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "examples").symlink_to(ROOT / "examples")
        os.chdir(directory)
        sys.path.insert(0, directory)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path.remove(directory)
            for name in set(sys.modules) - modules:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(directory):
                    del sys.modules[name]


def _run_python(code: str, options: str, namespace: dict[str, object], where: str) -> str:
    title = _TITLE.search(options)
    known = set(namespace)
    if title:
        Path(title[1]).write_text(code, encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, where, "exec"), namespace)
        if title and title[1].startswith("test_"):
            for name in [name for name in namespace if name.startswith("test_") and name not in known]:
                namespace[name]()  # type: ignore[operator]
    return printed.getvalue()


def _run_console(text: str) -> str:
    from opdtheory.cli import main

    shown, status = [], 0
    for line in text.splitlines():
        if not line.startswith("$ "):
            continue
        shown.append(line + "\n")
        command = shlex.split(line[2:], comments=True)
        if command == ["echo", "$?"]:
            shown.append(f"{status}\n")
        elif command[:2] == ["opdtheory", "audit"]:
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
                try:
                    status = main(command[1:])
                except SystemExit as usage:
                    status = int(usage.code or 0)
            shown.append(printed.getvalue())
    return "".join(shown)


def write(path: Path) -> int:
    """Put today's outputs into a page; returns how many of them had changed."""
    page, changed = path.read_text(encoding="utf-8"), 0
    for output in reversed(run_page(path)):
        if output.said.strip() != output.printed.strip():
            changed += not output.agrees
            printed = output.printed if output.shown else f"\n\n```text\n{output.printed}```"
            page = page[: output.start] + printed + page[output.end :]
    path.write_text(page, encoding="utf-8")
    return changed


# The longest pages are for `make test-slow`.
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.name in LONG else []) for p in PAGES],
    ids=[str(path.relative_to(ROOT)) for path in PAGES],
)
def test_pages_print_what_they_say(path):
    for output in run_page(path):
        assert output.agrees, (
            f"{path.relative_to(ROOT)}:{output.line} prints\n{output.printed}\nand not\n{output.said}\n"
            "regenerate with: python tests/laws/test_docs.py --write"
        )


def test_outputs_are_compared_by_their_digits():
    assert same("bias 1.24e-03,\n  cosine +0.9999", "bias 1.25e-03, cosine +0.9999")
    assert same("to 4e-16.", "to 1e-15.")
    assert not same("bias 1.24e-03", "bias 1.26e-03")
    assert not same("bias 1.24e-03", "bias 1.24e-04")
    assert not same("T4 (k3)", "T5 (k3)")
    assert not same("1 2", "1")


def test_a_page_that_lies_is_caught_and_rewritten(tmp_path):
    page = tmp_path / "page.md"
    source = "```python\nprint(1 / 4)\n```\n\n```text\n0.5\n```\n\n```python\nprint('new')\n```\n"
    page.write_text(source, encoding="utf-8")
    assert [output.agrees for output in run_page(page)] == [False, False]
    assert write(page) == 2
    assert page.read_text(encoding="utf-8") == source.replace("0.5", "0.25") + "\n```text\nnew\n```\n"
    assert all(output.agrees for output in run_page(page))


def test_every_public_name_is_in_the_api_pages():
    import opdtheory
    import opdtheory.testing
    from opdtheory import divergences, errors

    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    # A name is documented by a directive or, where nothing stands in the source to point at, by a heading of its own.
    documented = re.findall(r"^(?:::: |## `|      heading: )(opdtheory[\w.]*)`?$", pages, re.MULTILINE)
    short = {name.rpartition(".")[2] for name in documented}
    assert sorted({*opdtheory.__all__} - short - {"__version__"}) == []
    for module in (divergences, opdtheory.testing, errors):
        assert sorted({*module.__all__} - short) == []


def test_every_option_is_in_the_page_of_the_command_line(capsys):
    from opdtheory.cli import main

    page = (DOCS / "api" / "command_line.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["--help"])
    # The commands are indented by four spaces, the options by two.
    names = re.findall(r"^    ([\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert {"audit", "audit-trainer", "verify"} <= set(names)
    for name in names:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        section = page.split(f"## `opdtheory {name}`")[1].split("\n## ")[0]
        for option in set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}:
            assert f"`{option}" in section, f"docs/api/command_line.md says nothing of {name} {option}"


def test_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "api" / "audit" / "index.html").is_file()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit("usage: python tests/laws/test_docs.py --write [PAGE ...]")
    for each in [Path(name).resolve() for name in sys.argv[2:]] or PAGES:
        print(f"{each}: {write(each)} outputs changed")
