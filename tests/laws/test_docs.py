"""The documentation keeps up with the library: its code prints what the pages say, and no public name is missing.

`tests/laws/pages.py` says how a page is run. `python -m tests.laws.test_docs --write` puts today's outputs into the
pages, or into those named after it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.laws import shell
from tests.laws.pages import run_page, same, write
from tests.laws.workflows import check_yaml

__all__ = ["same"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LONG = ("adapt.md", "ci.md", "concepts.md", "tutorial.md", "project/README.md")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted(DOCS.rglob("*.md")),
]


def check(path, long):
    for output in run_page(path, long):
        assert output.agrees, (
            f"{path.relative_to(ROOT)}:{output.line} prints\n{output.printed}\nand not\n{output.said}\n"
            "regenerate with: python -m tests.laws.test_docs --write"
        )


# The longest pages are for `make test-slow`, and so are the longest commands.
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] if p.as_posix().endswith(LONG) else []) for p in PAGES],
    ids=[str(path.relative_to(ROOT)) for path in PAGES],
)
def test_pages_print_what_they_say(path):
    check(path, long=False)


def _long(path):
    return any(line.startswith("$ ") and set(shell.LONG) & set(line.split()) for line in path.read_text().splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if _long(path)], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_longest_commands_run(path):
    check(path, long=True)


def test_outputs_are_compared_by_their_digits():
    assert same("bias 1.24e-03,\n  cosine +0.9999", "bias 1.25e-03, cosine +0.9999")
    assert same("to 4e-16.", "to 1e-15.")
    assert not same("bias 1.24e-03", "bias 1.26e-03")
    assert not same("bias 1.24e-03", "bias 1.24e-04")
    assert not same("T4 (k3)", "T5 (k3)")
    assert not same("1 2", "1")
    assert not same("6 of 6 pairs", "5 of 6 pairs") and same("off by 94 %", "off by 95 %")


def test_a_page_that_lies_is_caught_and_rewritten(tmp_path):
    page = tmp_path / "page.md"
    source = "```python\nprint(1 / 4)\n```\n\n```text\n0.5\n```\n\n```python\nprint('new')\n```\n"
    page.write_text(source, encoding="utf-8")
    assert [output.agrees for output in run_page(page)] == [False, False]
    assert write(page) == 2
    assert page.read_text(encoding="utf-8") == source.replace("0.5", "0.25") + "\n```text\nnew\n```\n"
    assert all(output.agrees for output in run_page(page))


def page_of(tmp_path, *blocks):
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"```{head}\n{body}\n```\n" for head, body in blocks), encoding="utf-8")
    return page


def test_a_file_must_have_its_imports(tmp_path):
    losses = ('python title="parts.py"', "def half(x):\n    return x / 2")
    tests = "def test_half():\n    assert half(2) == 1"
    imports = "from parts import half\n\n\n"
    run_page(page_of(tmp_path, losses, ('python title="test_parts.py"', imports + tests)))
    with pytest.raises(NameError, match="half"):
        run_page(page_of(tmp_path, losses, ('python title="test_parts.py"', tests)))
    with pytest.raises(NameError, match="half"):
        run_page(page_of(tmp_path, losses, ("python", "half(2)")))
    with pytest.raises(NameError, match="math"):
        run_page(page_of(tmp_path, ("python", "import math"), ('python title="parts.py"', "tau = math.tau")))
    more = ('python title="parts.py"', "print(half(3))")
    assert run_page(page_of(tmp_path, losses, more))[1].printed == "1.5\n"


def test_no_command_is_skipped(tmp_path):
    for command in (
        "sparkle --all",
        "opdtheory polish",
        "opdtheory audit --polish a.py:f",
        "opdtheory audit examples/published_losses/trl_losses.py:missing",
        "opdtheory train --divergence nonesuch",
        "make polish",
        "pip install opdtheory[polish]",
        "python examples/missing.py",
        "python examples/published_losses/gallery.py --polish",
        "git add missing.json",
        "cat missing.json",
        "pytest --opd-polish",
        "opdtheory table | head",
    ):
        for language, prompt in (("console", "$ "), ("sh", "")):
            with pytest.raises(AssertionError, match="page.md:1"):
                run_page(page_of(tmp_path, (language, prompt + command)))
    with pytest.raises(AssertionError, match="ends with status 2"):
        run_page(page_of(tmp_path, ("console", "$ opdtheory audit missing.py:f")))
    with pytest.raises(AssertionError, match="block of fish"):
        run_page(page_of(tmp_path, ("fish", "set x 1")))
    indented = tmp_path / "page.md"
    indented.write_text("- a list\n\n    ```console\n    $ sparkle\n    ```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="indented"):
        run_page(indented)


def test_a_wrong_digit_of_a_command_is_caught(tmp_path):
    losses = ('python title="k.py"', "def k2(r):\n    return r.token_sum(r.log_u.square() / 2)")
    shown = "$ opdtheory audit k.py:k2 --lengths fixed\nk.py:k2: EXACT\n...\n{}\n...\n$ echo $?\n0"
    row = "sharpness 0.3, distance 1         8.27e-16  +1.000000  {}            2.872e-01"
    for number, agrees in (("1.288e+00", True), ("1.289e+00", True), ("1.290e+00", False)):
        page = page_of(tmp_path, losses, ("console", shown.format(row.format(number))))
        assert run_page(page)[1].agrees is agrees
    wrong_status = page_of(tmp_path, losses, ("console", shown.format(row.format("1.288e+00"))[:-1] + "1"))
    assert not run_page(wrong_status)[1].agrees
    assert write(wrong_status) == 1
    assert run_page(wrong_status)[1].agrees


def test_dots_stand_for_lines_that_are_left_out():
    assert same("a 1.00\n...\nz 2.0", "a 1.01\nb 7\nc\nz 2.1")
    assert same("...\nz", "a\nz") and same("a\n...", "a\nz") and same("a\n...\nz", "a\nz")
    assert not same("a 1.00\n...\nz 2", "a 1.10\nb\nz 2") and not same("...\nz 2", "a\nz 3")
    assert not same("a\n...\nz", "a\nz\nb")
    assert not same("a ... z", "a b z")
    assert same("1 passed in 1.02s", "1 passed in 61.31s (0:01:01)") and not same(
        "1 passed in 1.02s", "2 passed in 1.02s"
    )


def test_yaml_names_what_exists():
    step = "steps:\n  - run: {}\n"
    action = "steps:\n  - uses: OWNER/opdtheory@v0.2.0\n    with: {{{}}}\n"
    hook = "repos:\n  - repo: https://github.com/OWNER/opdtheory\n    hooks: [{{id: {}}}]\n"
    for text in (
        step.format("make test"),
        action.format("targets: 'a.py:f'"),
        hook.format("opdtheory-audit, args: [a.py:f]"),
    ):
        check_yaml(text)
    for text in (
        step.format("make polish"),
        action.format("target: 'a.py:f'"),
        action.format("targets: 'a.py:f', arguments: --polish"),
        action.format("targets: 'a.py:f', objective: nonesuch"),
        hook.format("polish, args: [a.py:f]"),
        hook.format("opdtheory-audit, args: [a.py:f, --polish]"),
        hook.format("opdtheory-audit"),
    ):
        with pytest.raises((AssertionError, ValueError)):
            check_yaml(text)


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


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit("usage: python -m tests.laws.test_docs --write [PAGE ...]")
    for each in [Path(name).resolve() for name in sys.argv[2:]] or PAGES:
        print(f"{each}: {write(each)} outputs changed")
