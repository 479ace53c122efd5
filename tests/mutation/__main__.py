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
import hashlib
import json
import os
import pickle
import random
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
from tests.mutation.mutants import ROOT, Mutant, mutants
from tests.mutation.patch import exchange, import_anew
from tests.mutation.report import Outcome, is_success, summary, write_page

PACKAGES = ("opdtheory/divergences", "opdtheory/exact", "opdtheory/theorems")
OPTIONS = ["-x", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--no-summary"]
RECORDS = Path("reports/mutation-records")
PAGE = "::test_theorem_holds_and_its_twins_are_refuted"
SECONDS = 60  # at least what a mutant may take; one that runs for ever is killed


class Session:
    """Runs the mutants inside one pytest session, whose tests are collected once."""

    def __init__(self, found: list[Mutant], workers: int, log: Path | None) -> None:
        self.found, self.workers, self.log = found, workers, log
        self.outcomes: list[Outcome] = []
        self.imported: set[tuple[str, int]] = set()
        self.records: dict[Check, Record] = {}
        self.watch = Coverage()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's own loop."""
        self.collected_lines = self.watch.stop()
        self.items = {item.nodeid: item for item in session.items}
        clear_caches()
        self.records = self._record(units(), list(map(Item, self.items)))
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
                guards = covering(str(mutant.path), mutant.lines, self.records)
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

    def _tell(self, mutant: Mutant, how: str) -> None:
        outcome = Outcome(str(mutant.path), mutant.function, mutant.line, mutant.before, mutant.after, how)
        self.outcomes.append(outcome)
        if not outcome.dead:
            print(f"{how}: {mutant}", flush=True)
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps(vars(outcome)) + "\n")

    def _kills(self, mutant: Mutant, guards: list[Check]) -> bool:
        path = str(mutant.path)
        early = self.imported if path.startswith("opdtheory/theorems") else self.imported | self.collected_lines
        if early.isdisjoint((path, line) for line in mutant.lines) and exchange(mutant):
            clear_caches()
            return any(fails(check, self.items) for check in guards)
        import_anew(mutant)
        tests = [check.name for check in guards if isinstance(check, Item)]
        return any(fails(check, {}) for check in guards if isinstance(check, Unit)) or (
            bool(tests) and pytest.main([*OPTIONS, *tests]) != 0
        )


def _sources() -> list[Path]:
    """What the records depend on."""
    return sorted({*(f for package in PACKAGES for f in Path(package).glob("*.py")), *map(Path, TESTS)})


def fork(work: Callable[[], int], limit: int) -> int:
    """Start a silent fork that exits with what the work returns, 1 if it raises; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    silent = os.open(os.environ.get("MUTATION_OUTPUT", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    signal.alarm(limit)
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
    parser.add_argument("--log", type=Path, help="append each outcome to this file, and skip those in it already")
    parser.add_argument("--page", type=Path, help="write the page of the documentation")
    options = parser.parse_args()

    os.chdir(ROOT)
    files = [
        f
        for name in options.modules
        for f in (sorted(Path(name).glob("*.py")) if Path(name).is_dir() else [Path(name)])
    ]
    found = [mutant for file in files for mutant in mutants(file, terms=not options.all)]
    order = random.Random(options.seed)
    order.shuffle(found)
    found = found[: options.sample]
    done: list[Outcome] = []
    if options.log and options.log.exists():
        done = [Outcome(**json.loads(line)) for line in options.log.read_text().splitlines()]
        known = {outcome.key for outcome in done}
        found = [m for m in found if (str(m.path), m.function, m.line, m.before, m.after) not in known]

    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # Forward mode loads parts of torch that warn of themselves, which the tests would take for an error.
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    start = time.time()
    session = Session(found, options.workers, options.log)
    watch = Coverage()
    watch.start()
    import importlib

    for package in PACKAGES:
        for file in Path(package).glob("*.py"):
            importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    session.imported = watch.stop()
    session.watch.start()
    if found:
        pytest.main([*OPTIONS, *TESTS], plugins=[session])
    outcomes = done + session.outcomes
    print(summary(outcomes, time.time() - start))
    if options.page:
        write_page(options.page, outcomes)
    return 0 if is_success(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
