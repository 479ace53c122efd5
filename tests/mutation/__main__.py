"""Break one term of the library at a time and see whether a check fails.

    python -m tests.mutation                                     # signs and terms of divergences, exact and theorems
    python -m tests.mutation opdtheory/exact/oracle.py --all     # every mutant of one module
    python -m tests.mutation --sample 200 --seed 0               # a random sample
    python -m tests.mutation --page docs/mutation.md             # write the page from the run

A mutant is killed when a test, or a step or an identity of a theorem, fails on it. Survivors are printed with their
line, those in `survivors.toml` with the reason. The exit status is 0 if at least 95 % are killed and every survivor
is explained.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation.checks import (
    TESTS,
    Check,
    Coverage,
    Item,
    Record,
    Unit,
    clear_caches,
    covering,
    fails,
    record,
    units,
)
from tests.mutation.mutants import ROOT, Mutant, mutants, source_tree
from tests.mutation.patch import exchange, import_anew
from tests.mutation.report import Outcome, is_success, summary, write_page

PACKAGES = ("opdtheory/divergences", "opdtheory/exact", "opdtheory/theorems")
OPTIONS = ["-x", "-q", "-s", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--no-summary"]
RECORDS = Path("reports/mutation-records")
PAGE = "::test_theorem_holds_and_its_twins_are_refuted"
MEMORY = 6 << 30
SECONDS = 60  # at least what a mutant may take; one that runs for ever is killed


class Session:
    """Runs the mutants inside one pytest session, whose tests are collected once."""

    def __init__(self, found: list[Mutant], workers: int, log: Path | None, budget: float) -> None:
        self.found, self.workers, self.log, self.budget = found, workers, log, budget
        self.outcomes: list[Outcome] = []
        self.imported: set[tuple[str, int]] = set()
        self.records: dict[Check, Record] = {}
        self.watch = Coverage()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's own loop."""
        self.collected_lines = self.watch.stop()
        # Slow tests cannot be held against thousands of mutants, but for the pages, whose parts are run anyhow.
        self.items = {
            item.nodeid: item
            for item in session.items
            if PAGE in item.nodeid or item.get_closest_marker("slow") is None
        }
        clear_caches()
        self.records = self._record(units(), list(map(Item, self.items)))
        self._require_sound_imports()
        self._run()
        return True

    def _record(self, parts: list[Unit], tests: list[Item]) -> dict[Check, Record]:
        """What each check runs, found in one fork per worker; kept for the next run of the same sources."""
        digest = hashlib.sha256(b"".join(f.read_bytes() for f in _sources())).hexdigest()
        if RECORDS.exists():
            kept, records = pickle.loads(RECORDS.read_bytes())
            if kept == digest:
                return records
        # A theorem's page is checked by running all its parts, which are recorded already.
        checks: list[Check] = [*parts, *(test for test in tests if PAGE not in test.name)]
        random.Random(0).shuffle(checks)
        paths = [Path(tempfile.mkdtemp()) / "records" for _ in range(self.workers)]
        for worker, path in enumerate(paths):

            def work(part: list[Check] = checks[worker :: self.workers], path: Path = path) -> int:
                path.write_bytes(pickle.dumps([(check, record(check, self.items)) for check in part]))
                return 0

            fork(work, 3600)
        for _ in paths:
            if os.wait()[1]:
                raise SystemExit("the checks could not be run without any change")
        found: dict[Check, Record] = {}
        for check, result in (pair for path in paths for pair in pickle.loads(path.read_bytes())):
            if result is None:
                # It would kill every mutant and show nothing.
                print(f"left out, as it fails without any change: {check.name}", flush=True)
            else:
                found[check] = result
        for test in tests:
            own = [found[part] for part in parts if part in found and test.name.endswith(f"{PAGE}[{part.number}]")]
            if own:
                lines = frozenset().union(*(r.lines for r in own))
                found[test] = Record(sum(r.seconds for r in own), lines)
        RECORDS.parent.mkdir(exist_ok=True)
        RECORDS.write_bytes(pickle.dumps((digest, found)))
        print(f"{len(found)} checks pass, in {sum(r.seconds for r in found.values()):.0f} s", flush=True)
        return found

    def _run(self) -> None:
        start, waiting, running = time.time(), list(self.found), {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                mutant = waiting.pop()
                guards = self._guards(mutant)
                if not guards:
                    self._tell(mutant, "no check runs it")
                    continue
                limit = SECONDS + int(4 * sum(self.records[check].seconds for check in guards))
                pid = fork(lambda mutant=mutant, guards=guards: int(self._kills(mutant, guards)), limit)
                running[pid] = mutant
            if running:
                pid, status = os.wait()
                how = "timeout" if os.WIFSIGNALED(status) else "killed" if os.WEXITSTATUS(status) else "survived"
                self._tell(running.pop(pid), how)
            if len(self.outcomes) % 100 == 0:
                print(f"... {len(self.outcomes)} of {len(self.found)} in {time.time() - start:.0f} s", flush=True)

    def _guards(self, mutant: Mutant) -> list[Check]:
        """The quickest checks of a mutant; what survives them all would take minutes to hold against the rest."""
        spent, kept = 0.0, []
        for check in covering(str(mutant.path), mutant.lines, self.records, self._ran_early(mutant)):
            spent += self.records[check].seconds
            if kept and spent > self.budget:
                break
            kept.append(check)
        return kept

    def _tell(self, mutant: Mutant, how: str) -> None:
        outcome = Outcome(str(mutant.path), mutant.function, mutant.line, mutant.before, mutant.after, mutant.nth, how)
        self.outcomes.append(outcome)
        if not outcome.dead:
            print(f"{how}: {mutant}", flush=True)
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps(vars(outcome)) + "\n")

    def _kills(self, mutant: Mutant, guards: list[Check]) -> bool:
        if not self._ran_early(mutant) and exchange(mutant):
            clear_caches()
            return any(fails(check, self.items) for check in guards)
        return self._anew_fails(mutant, mutant.tree(), guards)

    def _ran_early(self, mutant: Mutant) -> bool:
        """Whether a line of the mutant ran at import, or when the tests that hold its results were collected."""
        path = str(mutant.path)
        early = self.imported if path.startswith("opdtheory/theorems") else self.imported | self.collected_lines
        return not early.isdisjoint((path, line) for line in mutant.lines)

    def _anew_fails(self, mutant: Mutant, tree: ast.Module, guards: list[Check]) -> bool:
        """Whether a check fails on the library imported anew with this tree in place of the mutant's module."""
        import_anew(mutant.path, tree)
        tests = [check.name for check in guards if isinstance(check, Item)]
        if tests and pytest.main([*OPTIONS, *tests]) != 0:
            return True
        return any(fails(check, {}) for check in guards if isinstance(check, Unit))

    def _require_sound_imports(self) -> None:
        """Stop if a check fails on a module that was imported anew without any change: it would kill every mutant."""
        waiting = {mutant.path: mutant for mutant in self.found if self._ran_early(mutant)}
        for mutant in waiting.values():
            guards = self._guards(mutant)
            fork(
                lambda mutant=mutant, guards=guards: int(self._anew_fails(mutant, source_tree(mutant.path), guards)),
                900,
            )
            if os.wait()[1]:
                raise SystemExit(f"a check of {mutant.path} fails on the unchanged module, imported anew")


def _sources() -> list[Path]:
    """What the records depend on."""
    return sorted({*(f for package in PACKAGES for f in Path(package).rglob("*.py")), *map(Path, TESTS)})


def fork(work: Callable[[], int], limit: int) -> int:
    """Start a silent fork that exits with what the work returns, 1 if it raises; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    silent = os.open(os.environ.get("MUTATION_OUTPUT", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    signal.alarm(limit)
    # A mutant may ask for more memory than there is.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


def main() -> int:
    """Run the mutants; 0 if enough of them are killed and the survivors explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=PACKAGES, help="files or packages")
    parser.add_argument("--all", action="store_true", help="factors, comparisons and constants too, not terms only")
    parser.add_argument("--sample", type=int, help="how many mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of checks that a mutant is held against")
    parser.add_argument("--log", type=Path, help="append each outcome to this file, and skip those in it already")
    parser.add_argument("--retry", action="store_true", help="run those again that survive in the log")
    parser.add_argument("--recorded", action="store_true", help="run none; report what the log holds")
    parser.add_argument("--page", type=Path, help="write the page of the documentation")
    options = parser.parse_args()

    os.chdir(ROOT)
    files = [
        f
        for name in options.modules
        for f in (sorted(Path(name).rglob("*.py")) if Path(name).is_dir() else [Path(name)])
    ]
    found = [mutant for file in files for mutant in mutants(file, terms=not options.all)]
    random.Random(options.seed).shuffle(found)
    found = found[: options.sample]
    asked = len(found)
    found.sort(key=lambda mutant: "theorems" not in mutant.path.parts)  # taken from the end: the oracle comes first
    done: dict[tuple[str, str, str, str, int], Outcome] = {}
    if options.log and options.log.exists():
        # A later line is a later run of the same mutant.
        done = {o.key: o for o in (Outcome(**json.loads(line)) for line in options.log.read_text().splitlines())}
        today = {(str(m.path), m.function, m.before, m.after, m.nth): m for m in found}
        done = {key: o for key, o in done.items() if key in today and (o.dead or not options.retry)}
        found = [mutant for key, mutant in today.items() if key not in done]

    if options.recorded:
        found = []
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Forward mode loads parts of torch that warn of themselves, which the tests would take for an error.
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.setdefault("OPDTHEORY_EXAMPLES", "25")
    start = time.time()
    session = Session(found, options.workers, options.log, options.budget)
    watch = Coverage()
    watch.start()
    import importlib

    for package in PACKAGES:
        for file in Path(package).rglob("*.py"):
            importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    session.imported = watch.stop()
    session.watch.start()
    if found:
        pytest.main([*OPTIONS, *TESTS], plugins=[session])
    outcomes = [*done.values(), *session.outcomes]
    print(summary(outcomes, asked, time.time() - start))
    if options.page:
        write_page(options.page, outcomes, asked)
    return 0 if len(outcomes) == asked and is_success(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
