"""One trial: an artefact in an empty environment of one interpreter, and what it does there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# What the rest rests on, without what takes minutes.
TESTS = (
    "tests/divergences",
    "tests/exact/test_oracle.py",
    "tests/exact/test_expectation.py",
    "tests/auditing/test_report.py",
    "tests/estimators/test_sampled.py",
    "tests/kernels/test_fused.py",
    "tests/monitoring/test_measures.py",
    "tests/testing/test_assertions.py",
    "tests/testing/test_plugin.py",
    "tests/test_rollouts.py",
)
# The extras without packages that take long to install; the tests need the second and the third.
EXTRAS = ("cli", "plots", "testing", "parquet", "train")
MODULES = ("rich", "matplotlib.pyplot", "hypothesis", "pytest", "pyarrow.parquet", "safetensors.torch")


class FailedError(Exception):
    """A command failed; the message ends with what it said last."""


@dataclass
class Trial:
    """What is installed where, and how it went.

    Attributes:
        python: the interpreter's path.
        version: its version, such as `3.10`.
        artefact: the wheel or the sdist.
        constraints: a file of constraints, if versions are not left to pip.
        ends: which end of the ranges this is, `lowest` or `newest`; None runs no tests.
        seconds: of each stage that has ended.
        torch: the version of torch that pip chose.
        said: what `opdtheory verify` and the tests found.
        problem: why the trial failed; empty if it did not.
    """

    python: str
    version: str
    artefact: Path
    constraints: Path | None = None
    ends: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    torch: str = ""
    said: str = ""
    problem: str = ""

    def run(self, folder: Path, sdist: Path) -> None:
        """Make the environment in a folder, try the artefact there, and remove the environment."""
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            self._install()
            self._verify()
            if self.ends:
                self._test(sdist)
        except FailedError as failed:
            self.problem = str(failed)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _install(self) -> None:
        self._call("environment", [self.python, "-m", "venv", self._in("env")])
        self._pip("install", self.artefact)
        self._call("check", [self._in("env/bin/python"), "-m", "pip", "check"])
        show = "import opdtheory, torch; print(torch.__version__, opdtheory.__version__, opdtheory.__file__)"
        self.torch, ours, path = self._call("import", [self._in("env/bin/python"), "-c", show]).split()[-3:]
        if not Path(path).is_relative_to(self._in("env")) or f"-{ours}" not in self.artefact.name:
            raise FailedError(f"import: got {ours} of another place")

    def _verify(self) -> None:
        said = self._call("verify", [self._in("env/bin/opdtheory"), "verify"])
        counts = re.search(r"\d+ of \d+ theorems hold.*refuted", " ".join(said.split()))
        if counts is None or not (self.folder / "reports/verify.html").is_file():
            raise FailedError("verify: printed no summary, or wrote no page")
        self.said = counts[0]

    def _test(self, sdist: Path) -> None:
        self._pip("extras", f"{self.artefact}[{','.join(EXTRAS)}]")
        self._call("modules", [self._in("env/bin/python"), "-c", f"import {', '.join(MODULES)}"])
        with tarfile.open(sdist) as packed:
            packed.extractall(self._in("sdist"), filter="data")
        (source,) = (self.folder / "sdist").iterdir()
        # The tests are those of the sdist; the package is the one that is installed.
        shutil.rmtree(source / "opdtheory")
        # At the ends, libraries warn of each other, and of Python's own fixes.
        kinds = ("DeprecationWarning", "FutureWarning", "RuntimeWarning")
        warned = [part for kind in kinds for part in ("-W", f"default::{kind}")]
        pytest = [self._in("env/bin/python"), "-m", "pytest", "-q", "-p", "no:xdist", *warned]
        said = self._call("tests", [*pytest, *TESTS], source)
        self.said += f"; {said.strip().splitlines()[-1]}"

    def _in(self, name: str) -> Path:
        return self.folder / name

    def _pip(self, stage: str, what: str | Path) -> None:
        pip = [self._in("env/bin/python"), "-m", "pip"]
        command = [*pip, "install", "-q", "--disable-pip-version-check", "--no-compile"]
        if self.constraints:
            command += ["-c", self.constraints]
        self._call(stage, [*command, what])

    def _call(self, stage: str, command: Sequence[str | Path], folder: Path | None = None) -> str:
        begin = time.perf_counter()
        said = call(command, folder or self.folder, stage)
        self.seconds[stage] = time.perf_counter() - begin
        return said


def call(command: Sequence[str | Path], folder: Path, stage: str) -> str:
    """What a command prints in a folder, away from the environment and the sources of whoever calls."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise FailedError(f"{stage}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout
