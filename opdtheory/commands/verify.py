"""`opdtheory verify`: check every identity and refute every false twin."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdtheory.commands.console import FAILS, HOLDS, aside
from opdtheory.commands.console import console as console_of
from opdtheory.rendering.table import Cell, Styled, Table

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.verification.verify import Verification

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("verify", help="check every identity and refute every false twin")
    parser.add_argument(
        "select", nargs="*", metavar="NAME", help="theorems (T4) and estimators (opd_plus) to check (default: all)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--report", type=Path, default=Path("reports/verify.html"), metavar="FILE", help="page to write"
    )
    parser.add_argument("--no-report", action="store_true", help="write no page")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify, print the results, write the page, and return the exit status."""
    from opdtheory.machine import cores
    from opdtheory.verification.verify import verify

    console = None if options.json else console_of()
    workers = options.workers if options.workers is not None else cores()
    if console is not None and console.is_terminal:
        with console.status("verifying") as status:
            done = functools.partial(_show_progress, status)
            result = verify(options.select, workers=workers, progress=done)
    else:
        result = verify(options.select, workers=workers)
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result, console)
    if not options.no_report:
        from opdtheory.verification.page import write_page

        path = write_page(result, options.report)
        aside(options, f"wrote {path}")
    return HOLDS if result.passed else FAILS


def _show_progress(status: Any, item: str) -> None:
    status.update(f"verified {item}")


# The numbers of the theorems stand under a short word, so that the table fits into 80 columns.
_THEOREM_HEADER = ("", "no.", "check", "how", "error", "cases", "false twins", "s", "Coq")

_ESTIMATOR_HEADER = ("", "estimator", "claimed for", "audit's verdict", "false twin")


def _theorem_rows(result: Verification) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for theorem in result.theorems:
        steps = f"{sum(step.holds for step in theorem.steps)} of {len(theorem.steps)} steps"
        seconds = f"{theorem.seconds:.1f}"
        own = (theorem.number, theorem.name, f"derived: {steps}", "", "", "", seconds, _proved(theorem.number))
        rows.append((_mark(theorem.passed), *own))
        for r in theorem.identities:
            twins = f"{len(r.twins) - len(r.survivors)} of {len(r.twins)} refuted"
            name = f"{r.name} ({r.failure})" if r.failure else r.name
            numbers = (_error(r.error), str(r.cases), twins, f"{r.seconds:.1f}")
            rows.append((_mark(r.passed), "", name, r.kind, *numbers, ""))
    return rows


def _proved(number: str) -> str:
    """When a theorem was last checked in Coq, and from which sources; empty if never."""
    from opdtheory.theorems.proofs import proof

    found = proof(number)
    return f"{found.checked} {found.digest[:8]}" if found else ""


def _error(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.1e}"


def _estimator_rows(result: Verification) -> list[tuple[str, ...]]:
    return [
        (
            _mark(r.passed),
            r.label,
            r.claim.divergence.label + ("" if r.claim.granularity == "token_local" else f", {r.claim.granularity}"),
            r.audit.verdict.replace("_", " ")
            + (f": {r.audit.descends}" if r.audit.verdict == "other_objective" else ""),
            "refuted" if r.twin_refuted else "SURVIVES",
        )
        for r in result.estimators
    ]


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _summary(result: Verification) -> str:
    from opdtheory.verification.markdown import machine_checked

    steps = [step for theorem in result.theorems for step in theorem.steps]
    return (
        f"{sum(r.passed for r in result.theorems)} of {len(result.theorems)} theorems hold "
        f"({sum(step.holds for step in steps)} of {len(steps)} steps, "
        f"{sum(r.passed for r in result.identities)} of {len(result.identities)} checks), "
        f"{sum(r.passed for r in result.estimators)} of {len(result.estimators)} estimators keep their claim, "
        f"{result.twins_refuted} false twins refuted, in {result.seconds:.0f} s"
        + (f"; {machine_checked(len(result.proofs))}" if result.proofs else "")
    )


def _print(result: Verification, console: Any) -> None:
    _theorems(result).show(console)
    print()
    _estimators(result).show(console)
    print()
    if console is not None and console.is_terminal:
        console.print(_summary(result), style="bold green" if result.passed else "bold red", markup=False)
    else:
        print(_summary(result))


def _theorems(result: Verification) -> Table:
    # A theorem's own row heads those of its checks.
    rows = [
        (_marked(row[0]), *(Styled(cell, "bold") if row[1] else cell for cell in row[1:]))
        for row in _theorem_rows(result)
    ]
    return Table([_THEOREM_HEADER, *rows], "llllrrlrl", "Theorems")


def _estimators(result: Verification) -> Table:
    rows = [(_marked(row[0]), *row[1:]) for row in _estimator_rows(result)]
    return Table([_ESTIMATOR_HEADER, *rows], "l", "Estimators")


def _marked(mark: str) -> Cell:
    return Styled(mark, "green" if mark == "ok" else "bold red")
