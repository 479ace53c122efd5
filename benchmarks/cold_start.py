"""How long a newcomer waits: from `pip install .` in a fresh clone to an audit and to a failing test of a loss.

`python benchmarks/cold_start.py` clones the repository into a temporary folder, makes an empty environment, and does
there what a newcomer does: install the library, audit a loss of their own, install pytest and run a test of that loss.
It prints the seconds of each stage, by the clock and of processor time. No time is asserted.

The exit status is 1 if a stage does not do what it says: the audit must name the forward KL, and the test must be red
with the audit's message. Downloads are no part of it: pip must find its packages in its cache or on the disk. Versions
are those of `constraints.txt`.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from opdtheory.rendering.table import Table

ROOT = Path(__file__).resolve().parents[1]
# What a newcomer should wait at most, in seconds by the clock.
UNTIL_AUDIT, UNTIL_TEST = 60, 90

LOSS = """\
def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)
"""

TEST = """\
from my_loss import k3
from opdtheory.testing import assert_unbiased


def test_k3_follows_the_reverse_kl():
    assert_unbiased(k3, "reverse_kl")
"""

IMPORTS = """\
import time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
import opdtheory
opdtheory.audit
print(f"Once more, to import torch: {middle - begin:.1f} s; to import opdtheory: {time.perf_counter() - middle:.1f} s.")
"""


class WrongError(Exception):
    """A stage did not do what it says."""


class Stages:
    """Commands run one after the other in a folder, with the seconds of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[tuple[str, float, float]] = []

    def run(self, name: str, command: Sequence[str | Path], status: int = 0, says: Sequence[str] = ()) -> str:
        """Run a command, which must end with a status and print some words; returns what it prints."""
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [str(part) for part in command], cwd=self.folder, env=clean, capture_output=True, text=True, check=False
        )
        clock, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        self.rows.append((name, clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        words = " ".join((done.stdout + done.stderr).split())
        lacks = [part for part in says if part not in words]
        if done.returncode != status or lacks:
            raise WrongError(
                f"{name}: must exit with {status} and say {list(says)}, got {done.returncode}, without {lacks}:\n"
                f"{done.stdout}{done.stderr}"
            )
        return done.stdout

    def until(self, name: str, first: str) -> float:
        """The seconds by the clock from one stage to another, both included."""
        names = [row[0] for row in self.rows]
        return sum(clock for _, clock, _ in self.rows[names.index(first) : names.index(name) + 1])


def newcomer(folder: Path, source: Path, python: str) -> Stages:
    """What a newcomer does, in an empty folder."""
    stages = Stages(folder)
    stages.run("git clone", ["git", "clone", "-q", source, "opdtheory"])
    stages.run("python -m venv", [python, "-m", "venv", "env"])
    pip = [folder / "env/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["-c", folder / "opdtheory/constraints.txt"]
    stages.run("pip install .", [*pip, "./opdtheory"])
    (folder / "my_loss.py").write_text(LOSS, encoding="utf-8")
    audit = [folder / "env/bin/opdtheory", "audit", "my_loss.py:k3", "--objective", "reverse_kl"]
    found = ("does not descend reverse_kl", "Its expected gradient is that of forward_kl")
    stages.run("opdtheory audit", audit, status=1, says=found)
    stages.run("pip install pytest", [*pip, "pytest"])
    (folder / "test_my_loss.py").write_text(TEST, encoding="utf-8")
    test = [folder / "env/bin/python", "-m", "pytest", "-q", "test_my_loss.py"]
    red = ("k3 is not unbiased for reverse_kl", "forward_kl", "1 failed")
    stages.run("pytest", test, status=1, says=red)
    stages.run("imports", [folder / "env/bin/python", "-c", IMPORTS], says=["to import opdtheory"])
    return stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environment")
    parser.add_argument("--source", type=Path, default=ROOT, help="the repository that is cloned")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            stages = newcomer(Path(folder), options.source.resolve(), options.python)
        except WrongError as wrong:
            print(wrong, file=sys.stderr)
            return 1
    rows = [("stage", "seconds", "of processor"), *((name, f"{a:.1f}", f"{b:.1f}") for name, a, b in stages.rows)]
    Table(rows, "lr").show()
    for name, most in (("opdtheory audit", UNTIL_AUDIT), ("pytest", UNTIL_TEST)):
        print(f"from pip install to {name}: {stages.until(name, 'pip install .'):.0f} s (wanted: under {most} s)")
    print(f"other processes of this machine: load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    return 0


if __name__ == "__main__":
    sys.exit(main())
