"""Check the theorems in Coq: `python3 proofs/check.py`, or `make proofs`.

    python3 proofs/check.py                     # compile all, ask for the axioms, compare with the record
    python3 proofs/check.py --write             # the same, and write the record, opdtheory/theorems/proofs.json
    python3 proofs/check.py --recheck           # the same, and let Coq's second checker read what was compiled
    python3 proofs/check.py --signs [FILE ...]  # change every sign of the statements, which coqc must refuse
    python3 proofs/check.py --list-signs        # only list these changes, without Coq

It needs coqc with Coquelicot and nothing of Python but its standard library, and installs nothing. The exit status is 0
if everything holds, 1 if something does not, and 2 if Coq is missing or an option is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import record
import signs
from coq import Coq, Missing, axioms, compile_all, recheck
from sources import Problem, Source, affected, closure, problems, read

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path("opdtheory") / "theorems" / "proofs.json"
HOLDS, FAILS, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command on the `proofs` folder of a repository and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"argument --workers: must be at least 1, got {options.workers}")
    try:
        return _run(options, root, parser)
    except Missing as missing:
        print(missing, file=sys.stderr)
        return USAGE
    except Problem as problem:
        print(problem, file=sys.stderr)
        return FAILS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="proofs/check.py", description="Check the theorems in Coq.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--coqc", default="coqc", metavar="PROGRAM", help="the compiler (default: coqc on the PATH)")
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (default: one per core)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"write the record, {RECORD.as_posix()}")
    what.add_argument("--recheck", action="store_true", help="let coqchk read the compiled files, too")
    what.add_argument("--signs", nargs="*", metavar="FILE", help="change every sign, of all files or of these")
    what.add_argument("--list-signs", nargs="*", metavar="FILE", help="only list these changes")
    return parser


def _run(options: argparse.Namespace, root: Path, parser: argparse.ArgumentParser) -> int:
    sources = read(root / "proofs")
    if not any(source.is_theorem for source in sources.values()):
        raise Problem("proofs: there is no file of a theorem, such as proofs/T1.v")
    if found := problems(sources):
        raise Problem("\n".join(found))
    named = options.signs if options.signs is not None else options.list_signs
    names = [Path(name).stem for name in named or []] or list(sources)
    if unknown := [name for name in names if name not in sources]:
        parser.error(f"there is no proofs/{unknown[0]}.v; there are {', '.join(sources)}")
    if options.list_signs is not None:
        return _list(sources, names)
    build = root / "build" / "proofs"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    coq = Coq.found(options.coqc, build)
    print(f"Coq {coq.version}, {options.workers} processes at most", flush=True)
    if options.signs is not None:
        return _signs(coq, build, sources, names, options.workers)
    return _check(coq, build, sources, options, root / RECORD)


def _check(coq: Coq, build: Path, sources: Mapping[str, Source], options: argparse.Namespace, path: Path) -> int:
    start = time.perf_counter()
    compile_all(coq, build, sources, options.workers, _print_compiled)
    found = {}
    for name, source in sources.items():
        if source.is_theorem:
            found[name] = axioms(coq, build, source)
            _print_theorem(source, found[name])
    if options.recheck:
        recheck(coq, build, sources)
        print("coqchk accepts all of them, and the libraries that they require", flush=True)
    old = record.stored(path)
    new = record.made(sources, found, coq.version, old)
    if options.write:
        record.write(path, new)
        print(f"wrote {RECORD.as_posix()}; docs/generate_proofs.py and docs/generate_theory.py write the pages")
    elif others := record.differences(new, old):
        what = f"{', '.join(others)}: the record is of other sources"
        raise Problem(f"{what}: run `python3 proofs/check.py --write` ({RECORD.as_posix()})")
    _print_sum(sources, found, time.perf_counter() - start)
    return HOLDS


def _print_compiled(name: str, seconds: float) -> None:
    print(f"{seconds:7.1f} s  proofs/{name}.v", flush=True)


def _print_theorem(source: Source, found: Mapping[str, tuple[str, ...]]) -> None:
    print(f"{source.name}, {source.title}")
    for each in source.statements:
        print(
            f"  {each.name} {'is false' if each.is_twin else 'holds'}; axioms: {_short(found[each.name])}", flush=True
        )


def _short(names: Sequence[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names) or "none"


def _print_sum(
    sources: Mapping[str, Source], found: Mapping[str, Mapping[str, tuple[str, ...]]], seconds: float
) -> None:
    twins = [each.is_twin for name in found for each in sources[name].statements]
    every = dict.fromkeys(axiom for theorem in found.values() for names in theorem.values() for axiom in names)
    print(
        f"{_count(len(found), 'theorem file')}, {_count(twins.count(False), 'statement')}, "
        f"{_count(twins.count(True), 'false twin')}, axioms: {_short(list(every))}; {seconds:.0f} s"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _list(sources: Mapping[str, Source], names: Sequence[str]) -> int:
    found = [change for name in names for change in signs.changes(sources[name])]
    print(*(change.label for change in found), _count(len(found), "change"), sep="\n")
    return HOLDS


def _signs(coq: Coq, build: Path, sources: Mapping[str, Source], names: Sequence[str], workers: int) -> int:
    start = time.perf_counter()
    some = [change for name in names for change in signs.changes(sources[name])]
    needed = {other for name in names for each in affected(sources, name) for other in closure(sources, each)}
    # A change that is refused says something only if the file as it is is accepted.
    seconds: dict[str, float] = {}

    def done(name: str, each: float) -> None:
        seconds[name] = each
        _print_compiled(name, each)

    compile_all(coq, build, {name: sources[name] for name in sources if name in needed}, workers, done)
    found = signs.tried(coq, build, sources, seconds, some, workers, _print_outcome)
    surviving = sum(outcome.fails for outcome in found)
    senseless = sum(outcome.verdict == "no statement" for outcome in found)
    print(
        f"{_count(len(found), 'change')}: {len(found) - surviving} refused, {senseless} of them as no statement, "
        f"{surviving} not refused; {time.perf_counter() - start:.0f} s"
    )
    return FAILS if surviving or not found else HOLDS


def _print_outcome(outcome: signs.Outcome) -> None:
    by = f" by proofs/{outcome.by}.v" if outcome.by and outcome.by != outcome.change.source.name else ""
    print(f"{outcome.change.label}: {outcome.verdict}{by}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
