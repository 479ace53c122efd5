"""The commands that the documentation shows: what a suite can run is run, and the others are checked without a run.

A command that is neither known to run nor known to be checked is an error: nothing is skipped.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Run to the end and compared; what takes minutes is run by the slow suite alone.
RUN = ("audit", "audit-trainer", "bench", "diagnose", "table", "verify")
LONG = ("bench", "examples/published_losses/gallery.py")
# Teachers and students are trained first, for minutes or hours.
TRAINS = ("train", "reproduce")

# An audit or a test may fail, which is an answer; 2 and more say that the command itself is wrong.
_ANSWERS = (0, 1)
_OPERATORS = {"|", "||", "&&", ";", ">", ">>", "<", "&"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*")
_VERL = "verl.trainer.main_ppo"


class WrongCommand(AssertionError):
    """A command of the documentation that does not exist, or whose arguments are wrong."""


def commands(text: str) -> Iterator[tuple[list[str], str]]:
    """The commands of a `console` block and what follows each; those of a block without `$` have no output."""
    session = any(line.startswith("$ ") for line in text.splitlines())
    pending: list[str] | None = None
    output: list[str] = []
    joined = re.sub(r"\\\n\s*", " ", text)
    for line in joined.splitlines(keepends=True):
        if session and not line.startswith("$ "):
            if pending is None:
                raise WrongCommand(f"output before the first command: {line!r}")
            output.append(line)
            continue
        if pending:
            yield pending, "".join(output)
        pending, output = split(line.removeprefix("$ ")), []
    if pending:
        yield pending, "".join(output)


def split(line: str) -> list[str]:
    """The words of one command line, without comments."""
    words = shlex.split(line, comments=True)
    if _OPERATORS & set(words):
        raise WrongCommand(f"{line.strip()!r} joins commands; write one a line")
    return words


class Session:
    """A shell in the working directory, which remembers the status of its last command."""

    def __init__(self, long: bool = True) -> None:
        self.long, self.status = long, 0

    def run(self, command: list[str]) -> str | None:
        """What a command prints; None if it was only checked."""
        if command == ["echo", "$?"]:
            return f"{self.status}\n"
        check(command)
        if not runs(command) or (not self.long and any(word in LONG for word in command)):
            self.status = 0
            return None
        if command[0] == "cat":
            return "".join(Path(name).read_text(encoding="utf-8") for name in command[1:])
        self.status, printed = _opdtheory(command[1:]) if command[0] == "opdtheory" else _process(command)
        # That a command is refused may be what a page shows.
        return printed

    def fails(self) -> bool:
        """Whether the last command could not do its work."""
        return self.status not in _ANSWERS


def runs(command: list[str]) -> bool:
    """Whether a command can be run here."""
    if command[0] == "opdtheory":
        return command[1] in RUN
    if command[0] == "python":
        return not command[1].startswith("-")
    return command[0] in ("cat", "pytest") or command[:2] == ["git", "apply"]


def check(command: list[str]) -> None:
    """Raise unless what a command names exists: programs, subcommands, options, files, targets.

    Raises:
        WrongCommand: it does not, or the program is not known here.
    """
    while command and _ASSIGNMENT.fullmatch(command[0]) and "." not in command[0].partition("=")[0]:
        command = command[1:]
    if not command:
        return
    program = command[0].rpartition("/")[2]
    if "=" in command[0]:  # a block that continues a command of verl
        _check_overrides(command)
    elif re.fullmatch(r"python[\d.]*", program):
        _check_python(command[1:])
    elif program in _CHECKS:
        _CHECKS[program](command[1:])
    else:
        raise WrongCommand(f"{command[0]!r} is no command that the documentation may show: {shlex.join(command)}")


def _need(holds: object, problem: str) -> None:
    if not holds:
        raise WrongCommand(problem)


def _opdtheory(arguments: list[str]) -> tuple[int, str]:
    from opdtheory.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(printed):
        try:
            status = main(arguments)
        except SystemExit as usage:
            status = int(usage.code or 0)
    return status, printed.getvalue()


def _process(command: list[str]) -> tuple[int, str]:
    program, rest = [sys.executable], command[1:]
    if command[0] == "git":
        program = ["git"]
    elif command[0] == "pytest":
        installed = any(point.name == "opdtheory" for point in metadata.entry_points(group="pytest11"))
        # Without colours and plugins of this machine, from the sources of this checkout.
        program += ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
        program += [] if installed else ["-p", "opdtheory.testing.plugin"]
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "100"}
    env.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [*program, *rest], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600
    )
    return done.returncode, done.stdout


def _check_opdtheory(arguments: list[str]) -> None:
    from opdtheory.cli import _parser
    from opdtheory.errors import OpdTheoryError

    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            options = _parser().parse_args(arguments)
        except SystemExit as usage:
            raise WrongCommand(f"opdtheory {shlex.join(arguments)}: {said.getvalue()}") from usage
    _need(options.command in (*RUN, *TRAINS), f"opdtheory {options.command} is neither run nor checked")
    for target in [*getattr(options, "losses", ()), *filter(None, [getattr(options, "build", None)])]:
        _check_target(str(target))
    try:
        _check_values(options)
    except OpdTheoryError as error:
        raise WrongCommand(f"opdtheory {shlex.join(arguments)}: {error}") from error


def _check_target(target: str) -> None:
    """A function of this repository must exist; what stands for the reader's own code need not."""
    where, _, name = target.partition(":")
    if where.startswith("examples/"):
        _need((ROOT / where).is_file(), f"there is no {where}")
        source = (ROOT / where).read_text(encoding="utf-8")
        _need(re.search(rf"^(?:def )?{name}\b", source, re.MULTILINE), f"{where} has no {name}")


def _check_values(options: Any) -> None:
    """What the parser leaves as text must mean something to the library."""
    import dataclasses

    from opdtheory.divergences import divergence
    from opdtheory.testing.calls import checked_call
    from opdtheory.training.config import TrainConfig

    if getattr(options, "call", None):
        checked_call(options.call)
    if options.command in ("audit", "audit-trainer") and hasattr(options, "objective"):
        divergence(options.objective)
    if options.command == "train":
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        TrainConfig.from_dict({name: value for name, value in vars(options).items() if name in fields}).loss()


def _check_python(arguments: list[str]) -> None:
    _need(arguments, "python without a script")
    if arguments[0] != "-m":
        return _check_script(arguments)
    module, rest = arguments[1], arguments[2:]
    if module == _VERL:
        _check_overrides(rest)
    elif module == "venv":
        _need(len(rest) == 1 and not rest[0].startswith("-"), f"python -m venv {rest}")
    elif module in ("pip", "pytest", "opdtheory"):
        _CHECKS[module](rest)
    else:
        raise WrongCommand(f"python -m {module} is no command that the documentation may show")


def _check_script(arguments: list[str]) -> None:
    script = next((path for path in (Path(arguments[0]), ROOT / arguments[0]) if path.is_file()), None)
    _need(script is not None, f"there is no script {arguments[0]}")
    assert script is not None
    source = script.read_text(encoding="utf-8")
    for option in arguments[1:]:
        if option.startswith("-"):
            _need(f'"{option.partition("=")[0]}"' in source, f"{arguments[0]} has no option {option}")


def _check_overrides(arguments: list[str]) -> None:
    """Settings of verl, `a.b=value`; dots stand for what only the reader knows."""
    for each in arguments:
        _need(each == "..." or re.fullmatch(r"[a-z_]+(\.[a-z_]+)+=\S+", each), f"verl: {each!r} is no setting")


def _check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [each for each in arguments if "=" not in each]
    _need(named and set(named) <= set(targets), f"the Makefile has no {set(named) - set(targets) or 'default'}")


def _check_pip(arguments: list[str]) -> None:
    _need(arguments[:1] == ["install"], f"pip {arguments[:1]}")
    rest = iter(arguments[1:])
    for each in rest:
        if each == "-r":
            _need((ROOT / (name := next(rest, ""))).is_file(), f"pip: there is no {name}")
        elif each.startswith("-"):
            _need(each in ("-e", "-q", "--no-deps", "--upgrade", "-U"), f"pip: option {each} is not known here")
        elif found := re.fullmatch(r"(?:\.|opdtheory)\[([\w,-]+)\](?:[=<>~]=.*)?", each):
            unknown = set(found[1].split(",")) - _extras(each.startswith("."))
            _need(not unknown, f"there is no extra {', '.join(sorted(unknown))}")
        else:
            _need(re.fullmatch(r"\.|[A-Za-z][\w-]*(\[[\w,-]+\])?([=<>~]=.*)?", each), f"pip: {each!r} is no package")


def _extras(of_a_reader: bool) -> set[str]:
    """The extras of the library; where the project may be the reader's own, also those of the example of one."""
    found: set[str] = set()
    for path in [ROOT / "pyproject.toml", *([ROOT / "examples/project/pyproject.toml"] if of_a_reader else [])]:
        table = path.read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
        found |= set(re.findall(r"^(\w+) = ", table, re.MULTILINE))
    return found


def _check_pytest(arguments: list[str]) -> None:
    plugin = (ROOT / "opdtheory" / "testing" / "plugin.py").read_text(encoding="utf-8")
    takes_value = ("--opd-baseline", "--opd-write-baseline", "--opd-report", "-m", "-k", "--pyargs", "-n")
    words = iter(arguments)
    for each in words:
        if each.startswith("--opd-"):
            _need(f'"{each}"' in plugin, f"pytest: the plugin has no {each}")
        if each in takes_value:
            next(words, None)
        elif not each.startswith("-"):
            path = each.partition("::")[0]
            _need(Path(path).exists() or (ROOT / path).exists(), f"pytest: there is no {path}")


def _check_git(arguments: list[str]) -> None:
    _need(arguments[:1] in (["add"], ["clone"], ["apply"]), f"git {arguments[:1]}")
    if arguments[0] != "clone":
        for each in arguments[1:]:
            known = each.startswith("-") or Path(each).exists() or (ROOT / each).exists()
            _need(known, f"git {arguments[0]}: there is no {each}")


def _check_cat(arguments: list[str]) -> None:
    for each in arguments:
        _need(Path(each).is_file(), f"cat: there is no {each}")


def _check_export(arguments: list[str]) -> None:
    _need(arguments and all(map(_ASSIGNMENT.fullmatch, arguments)), f"export {arguments} assigns nothing")


def _check_pre_commit(arguments: list[str]) -> None:
    _need(arguments[:1] in (["install"], ["run"]), f"pre-commit {arguments[:1]}")


_CHECKS = {
    "opdtheory": _check_opdtheory,
    "make": _check_make,
    "pip": _check_pip,
    "pytest": _check_pytest,
    "git": _check_git,
    "cat": _check_cat,
    "export": _check_export,
    "pre-commit": _check_pre_commit,
}
