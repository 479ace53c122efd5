"""What could notice a mutant: every step and identity of every theorem, and the tests that guard the library.

Each check is run once on the library as it is, under coverage; a mutant is then held against those that run its
lines, the quickest first.
"""

from __future__ import annotations

import functools
import gc
import importlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage

from tests.mutation.mutants import ROOT

LIBRARY = str(ROOT / "opdtheory")

# The tests that hold the divergences, the oracle and the theorems to independent numbers.
TESTS = [
    "tests/divergences/test_logspace.py",
    "tests/divergences/test_catalogue.py",
    "tests/divergences/test_divergence.py",
    "tests/divergences/test_registry.py",
    "tests/divergences/test_custom.py",
    "tests/divergences/test_transform.py",
    "tests/divergences/test_quadrature.py",
    "tests/exact/test_oracle.py",
    "tests/exact/test_policies.py",
    "tests/exact/test_enumeration.py",
    "tests/exact/test_expectation.py",
    "tests/exact/test_subtrees.py",
    "tests/exact/test_finite_state.py",
    "tests/exact/test_chain.py",
    "tests/exact/test_second_moments.py",
    "tests/exact/test_sampling.py",
    "tests/exact/test_per_rollout.py",
    "tests/laws/test_environment.py",
    "tests/auditing/test_scenario.py",
    "tests/auditing/sampling/test_montecarlo.py",
    "tests/auditing/sampling/test_projections.py",
    "tests/laws/test_theorems.py",
    "tests/laws/test_theorems_local.py",
    "tests/laws/test_theorems_sequences.py",
    "tests/laws/test_theorems_stability.py",
    "tests/laws/test_theorems_truncation.py",
    "tests/laws/test_theorems_variance.py",
    "tests/theorems/test_theorem.py",
]


@dataclass(frozen=True)
class Unit:
    """A step of a derivation, or an identity with its twins."""

    module: str
    number: str
    part: str
    index: int

    @property
    def name(self) -> str:
        """For the log."""
        return f"{self.number} {self.part} {self.index}"

    def fails(self) -> bool:
        """Whether the library refutes its own statement."""
        theorem = next(t for t in importlib.import_module(self.module).theorems() if t.number == self.number)
        if self.part == "step":
            return not theorem.derivation[self.index].run().holds
        return not theorem.identities[self.index].run().passed


@dataclass(frozen=True)
class Item:
    """A test that pytest has collected."""

    name: str

    def fails(self, collected: dict[str, Any]) -> bool:
        """Whether any phase of the test fails."""
        from _pytest.runner import runtestprotocol

        return any(report.failed for report in runtestprotocol(collected[self.name], log=False, nextitem=None))


Check = Unit | Item


def units() -> list[Unit]:
    """The parts of every theorem."""
    from opdtheory import theorems

    found = []
    for name in theorems._MODULES:
        module = f"opdtheory.theorems.{name}"
        for theorem in importlib.import_module(module).theorems():
            found += [Unit(module, theorem.number, "step", i) for i in range(len(theorem.derivation))]
            found += [Unit(module, theorem.number, "identity", i) for i in range(len(theorem.identities))]
    return found


@functools.cache
def _caches() -> list[Any]:
    # `isinstance` would ask odd objects of other packages for their class.
    found = [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]
    return [c for c in found if (getattr(c, "__module__", None) or "").startswith(("opdtheory", "tests.laws", "tests"))]


def clear_caches() -> None:
    """Forget what functions of the library and the tests have remembered."""
    for cache in _caches():
        cache.cache_clear()


class Coverage:
    """The library's lines that run between start and stop."""

    def __init__(self) -> None:
        self._coverage = coverage.Coverage(data_file=None, include=[f"{LIBRARY}/*"], config_file=False)
        self._coverage.set_option("run:disable_warnings", ["no-data-collected", "module-not-measured"])

    def start(self) -> None:
        """Begin to record."""
        self._coverage.start()

    def stop(self) -> set[tuple[str, int]]:
        """End, forget, and say which lines ran, as (path below the root, line)."""
        self._coverage.stop()
        data = self._coverage.get_data()
        lines = {
            (str(Path(file).relative_to(ROOT)), line)
            for file in data.measured_files()
            for line in data.lines(file) or ()
        }
        self._coverage.erase()
        return lines


@dataclass(frozen=True)
class Record:
    """What a check did on the library as it is."""

    seconds: float
    lines: frozenset[tuple[str, int]]


def record(check: Check, collected: dict[str, Any]) -> Record | None:
    """Run a check under coverage; None if it fails, for it would kill every mutant and show nothing."""
    clear_caches()
    watch = Coverage()
    watch.start()
    start = time.process_time()
    failed = fails(check, collected)
    seconds = time.process_time() - start
    lines = watch.stop()
    return None if failed else Record(seconds, frozenset(lines))


def fails(check: Check, collected: dict[str, Any]) -> bool:
    """Whether the check fails or raises."""
    try:
        return check.fails(collected) if isinstance(check, Item) else check.fails()
    except Exception:
        return True


def covering(path: str, lines: Iterable[int], records: dict[Check, Record], early: bool = False) -> list[Check]:
    """The checks that run any of the lines: of a theorem its own parts first, else the tests, the quickest first.

    A line that ran `early`, at the import, is held against all that run its module: any may use what it left.
    """
    wanted = {(path, line) for line in lines}
    found = [c for c, r in records.items() if not wanted.isdisjoint(r.lines)]
    if early or not found:
        found = [c for c, r in records.items() if any(file == path for file, _ in r.lines)]
    parts = sum(isinstance(c, Unit) for c in found)
    # What nearly every part runs, such as the running of a check itself, says nothing in any of them: tests look at it.
    near = Unit if "theorems" in path and 2 * parts < sum(isinstance(c, Unit) for c in records) else Item
    return sorted(found, key=lambda c: (not isinstance(c, near), records[c].seconds))
