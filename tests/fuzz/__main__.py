"""`python -m tests.fuzz --calls 100000 --seed 0`: a table, and exit status 1 if any call failed."""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
from collections.abc import Callable

import torch

from opdtheory.rendering.table import Table
from tests.fuzz import batches, fused, oracle, ratios
from tests.fuzz.calls import Call, described, judged

__all__ = ["FAMILIES", "call_number", "fuzzed"]

# The shares of the calls, by what judging them costs.
FAMILIES: dict[str, tuple[Callable[[random.Random], Call], int]] = {
    "fused_divergence": (fused.fused, 5),
    "fused_linear_divergence": (fused.linear, 4),
    "fused_top_k_divergence": (fused.top_k, 4),
    "functions of log u": (ratios.functions, 5),
    "divergence(name)": (ratios.catalogue, 3),
    "Rollouts": (batches.rollouts, 4),
    "estimators": (batches.estimators, 3),
    "estimator(name)": (batches.options, 2),
    "policies": (oracle.policies, 3),
    "objectives": (oracle.objectives, 2),
    "moments": (oracle.automata, 1),
}
_TURNS = [name for name, (_, share) in FAMILIES.items() for _ in range(share)]


def call_number(seed: int, number: int) -> tuple[str, Call]:
    """A call and its family; the same for the same seed and number."""
    family = _TURNS[number % len(_TURNS)]
    return family, FAMILIES[family][0](random.Random(f"{seed}:{number}"))


def fuzzed(seed: int, numbers: range) -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """How often each family's calls were right, refused or failed; and the failures."""
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in FAMILIES}
    failures = []
    for number in numbers:
        family, call = call_number(seed, number)
        outcome = judged(call)
        counts[family][outcome.kind] += 1
        if outcome.kind == "failed":
            why = outcome.why.splitlines()[0]
            failures.append(f"--seed {seed} --only {number}: {' '.join(described(call).split())}: {why}")
    return counts, failures


def main(arguments: list[str] | None = None) -> int:
    """Run the calls."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", type=int, metavar="N", help="one call, by its number")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    numbers = range(options.calls) if options.only is None else range(options.only, options.only + 1)
    start = time.process_time()
    counts, failures = fuzzed(options.seed, numbers)
    rows = [("", "calls", "right", "refused", "failed")]
    for name, found in counts.items():
        row = [found[kind] for kind in ("right", "refused", "failed")]
        rows.append((name, *(f"{number:,}" for number in (sum(row), *row))))
    Table(rows, "lr").show()
    print(f"{len(numbers):,} calls, {len(failures)} failed, {time.process_time() - start:.0f} s CPU")
    for failure in failures[:40]:
        print(failure)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
