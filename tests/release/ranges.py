"""The ranges of pyproject.toml, and the interpreters that they are tried on."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from opdtheory.toml import read_toml

CORE = "dependencies"
_BOUND = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(\[[^]]*\])?\s*(?P<sign>>=|==)\s*(?P<version>[0-9][^\s,;]*)")


def requirements(pyproject: Path, extras: Iterable[str] = ()) -> list[str]:
    """The requirements of the core and of some extras, as written."""
    project = read_toml("pyproject", pyproject)["project"]
    return [*project[CORE], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def lowest(lines: Iterable[str]) -> list[str]:
    """The lower bounds of requirements as constraints; one without a bound is an error."""
    found = []
    for line in lines:
        bound = _BOUND.match(line)
        if bound is None:
            raise ValueError(f"{line}: must have a lower bound")
        marker = line.partition(";")[2].strip()
        found.append(f"{bound['name']}=={bound['version']}" + (f"; {marker}" if marker else ""))
    return found


def interpreter(name: str) -> str | None:
    """The path of the interpreter called `3.10`, or of a command; None if there is none that runs."""
    command = f"python{name}" if re.fullmatch(r"\d+\.\d+", name) else name
    path = shutil.which(command)
    if path is None:
        return None
    # A version manager may have a command for an interpreter that is not installed.
    said = output([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"])
    version, _, executable = said.strip().partition(" ")
    return executable if executable and name in (version, command) else None


def output(command: Sequence[str | Path]) -> str:
    """What a command prints; nothing if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""
