"""Build the sdist and the wheel, and try each in empty environments.

    python -m tests.release                                   # on Python 3.10 to 3.13, versions left to pip
    python -m tests.release --pythons 3.11 --with torch==2.13.0
    python -m tests.release --lowest 3.10                     # the lowest versions that pyproject.toml allows
    python -m tests.release --newest 3.13                     # the newest ones, with some of the tests

The artefacts hold what git tracks, nothing else, and `twine check --strict` accepts them. `opdtheory verify` runs in
each environment with the core's packages alone. `--lowest` and `--newest` then add extras and run some of the tests of
the sdist against the package that is installed. Interpreters are found by name (`python3.10`); a command or a path does
as well. The exit status is 0 if every trial passes and, of the interpreters that were named, none is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opdtheory.rendering.table import Table
from tests.release.artefacts import ROOT, wrong
from tests.release.ranges import interpreter, lowest, requirements
from tests.release.trial import EXTRAS, FailedError, Trial, call

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TOOLS = ("build>=1.2", "twine>=6.1")
STAGES = ("install", "verify", "tests")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, try, print the table, and return the exit status."""
    options = _parser().parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        wheel, sdist = built(folder) if options.dist is None else _artefacts(options.dist.resolve())
    except FailedError as failed:
        print(failed, file=sys.stderr)
        return 1
    problems = wrong(wheel, sdist)
    print("\n".join(problems or [f"{sdist.name} and {wheel.name} hold what git tracks"]), flush=True)
    trials, missing = planned(options, folder, wheel, sdist)
    for trial in trials:
        trial.run(folder / "trial", sdist)
        print("\n".join(described(trial)), flush=True)
    print("\n".join(["", *summary(trials), *(f"Python {name}: no such interpreter" for name in missing)]))
    return int(bool(problems or missing or any(trial.problem for trial in trials)))


def built(folder: Path) -> tuple[Path, Path]:
    """Build both artefacts with tools of their own, and let twine check them."""
    tools, dist = folder / "tools", folder / "dist"
    call([sys.executable, "-m", "venv", "--clear", tools], ROOT, "tools")
    call([tools / "bin/python", "-m", "pip", "install", "-q", *TOOLS], ROOT, "tools")
    for old in dist.glob("opdtheory-*"):
        old.unlink()
    # The wheel is built from the sdist, as by whoever has only that.
    call([tools / "bin/python", "-m", "build", "--outdir", dist], ROOT, "build")
    wheel, sdist = _artefacts(dist)
    call([tools / "bin/twine", "check", "--strict", wheel, sdist], ROOT, "twine")
    print("twine check --strict: passed", flush=True)
    return wheel, sdist


def _artefacts(dist: Path) -> tuple[Path, Path]:
    (wheel,), (sdist,) = sorted(dist.glob("opdtheory-*.whl")), sorted(dist.glob("opdtheory-*.tar.gz"))
    return wheel, sdist


def planned(options: argparse.Namespace, folder: Path, wheel: Path, sdist: Path) -> tuple[list[Trial], list[str]]:
    """The trials that the options ask for, and the interpreters that are not there."""
    ends = [("lowest", name) for name in options.lowest] + [("newest", name) for name in options.newest]
    pythons = options.pythons if options.pythons is not None else () if ends else PYTHONS
    found = {name: interpreter(name) for name in dict.fromkeys([*pythons, *(name for _, name in ends)])}
    common = _constraints(folder / "constraints.txt", options.extra)
    bounds = _constraints(folder / "lowest.txt", lowest(requirements(ROOT / "pyproject.toml", EXTRAS)))
    trials = []
    for name in pythons:
        if path := found[name]:
            chosen = [artefact for kind, artefact in (("wheel", wheel), ("sdist", sdist)) if kind in options.artefacts]
            trials += [Trial(path, name, artefact, common) for artefact in chosen]
    for end, name in ends:
        if path := found[name]:
            trials.append(Trial(path, name, wheel, bounds if end == "lowest" else common, end))
    return trials, [name for name, path in found.items() if path is None]


def _constraints(file: Path, lines: Sequence[str]) -> Path | None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file if lines else None


def described(trial: Trial) -> list[str]:
    """What a trial found, or the end of what the failed command said."""
    what = f"Python {trial.version}, torch {trial.torch or '?'}, {trial.artefact.name}"
    return [f"{what}, {trial.ends or 'versions left to pip'}: {trial.problem or trial.said}"]


def summary(trials: Sequence[Trial]) -> list[str]:
    """The table of all trials."""
    rows = [("Python", "torch", "artefact", "versions", *(f"{stage}, s" for stage in STAGES), "result")]
    for trial in trials:
        kind = "wheel" if trial.artefact.suffix == ".whl" else "sdist"
        times = (f"{trial.seconds[stage]:.0f}" if stage in trial.seconds else "" for stage in STAGES)
        result = trial.problem.partition("\n")[0] or "passes"
        rows.append((trial.version, trial.torch, kind, trial.ends or "", *times, result))
    return Table(rows, "llllrrrl").lines()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=(__doc__ or "").partition("\n")[0])
    names = {"type": lambda text: tuple(text.split(",")), "metavar": "NAMES"}
    parser.add_argument("--pythons", **names, help=f"interpreters, with commas (default: {','.join(PYTHONS)})")
    parser.add_argument("--lowest", **names, default=(), help="interpreters for the lowest versions")
    parser.add_argument("--newest", **names, default=(), help="interpreters for the newest versions")
    parser.add_argument("--artefacts", nargs="+", choices=("wheel", "sdist"), default=("wheel", "sdist"))
    parser.add_argument(
        "--with",
        dest="extra",
        action="append",
        default=[],
        metavar="REQUIREMENT",
        help="a constraint for pip, but with --lowest",
    )
    parser.add_argument("--dist", type=Path, metavar="FOLDER", help="try what is built there, without building")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/release", help="where environments are made")
    return parser


if __name__ == "__main__":
    sys.exit(main())
