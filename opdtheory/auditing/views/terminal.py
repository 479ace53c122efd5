"""An audit in a terminal, with rich (extra `cli`), or as plain text if the output is not a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opdtheory.auditing.report import PAIR_COLUMNS, Audit
from opdtheory.rendering.table import Cell, Styled, Table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_audit"]


def print_audit(report: Audit, console: Console | None = None) -> None:
    """Print an audit in colour, with tables, on a rich console that is a terminal; else print `str(report)`."""
    if console is None or not console.is_terminal:
        print(report)
        return
    from rich.text import Text

    colour = "green" if report.passes else "yellow" if report.verdict == "undecided" else "red"
    title = Text.assemble((report.name, "bold"), "  ", (f" {report.headline} ", f"bold reverse {colour}"))
    console.print(title)
    console.print()
    console.print(Text(report.summary()))
    for line in _weight(report):
        console.print(Text.assemble("  • ", line))
    for table in (_pairs(report), _worlds(report), _checks(report), _numerics(report)):
        if table is not None:
            console.print()
            table.show(console)
    if report.remedies:
        console.print()
        console.print(Text("What would make it right", style="bold"))
    for remedy in report.remedies:
        note = f"  audited: {remedy.verdict.replace('_', ' ')}" if remedy.verified else "  not verified"
        console.print(Text.assemble("  • ", remedy.text, (note, "dim")))
    if report.limits:
        console.print()
        console.print(Text("What was not asked", style="bold"))
    for sentence in report.limits:
        console.print(Text.assemble("  • ", sentence))


def _weight(report: Audit) -> list[str]:
    """The weight as a formula, and what it depends on, one line each."""
    lines = []
    if report.form is not None and report.form.expr:
        lines.append(f"weight w(u) = {report.form.expr}: {report.form.label}")
    if report.dependence is not None:
        lines += report.dependence.words
    return lines


_MARKS = {True: Styled("ok", "green"), False: Styled("FAILED", "bold red"), None: Styled("-", "dim")}


def _table(title: str, align: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table | None:
    return Table([header, *rows], align, title) if rows else None


def _pairs(report: Audit) -> Table | None:
    rows: list[list[Cell]] = []
    for pair in report.pairs:
        label, bias, cosine, *variances = pair.cells
        good = report.passes or pair.relative_bias <= report.tolerance
        shown = Styled(bias, "green" if good else "red"), Styled(cosine, "bold red" if pair.cosine < 0 else "")
        rows.append([label, *shown, *variances])
    return _table("Pairs", "lr", PAIR_COLUMNS, rows)


def _worlds(report: Audit) -> Table | None:
    rows = [(_MARKS[w.holds], w.name, _number(w.error), w.detail) for w in report.worlds]
    return _table("Beyond the panel", "llrl", ("", "world", "error", ""), rows)


def _checks(report: Audit) -> Table | None:
    rows = [(_MARKS[c.passed], c.name, _number(c.value), c.detail) for c in report.checks]
    return _table("Checks", "llrl", ("", "check", "value", ""), rows)


def _numerics(report: Audit) -> Table | None:
    rows = [(r.dtype, r.regime, _number(r.worst_error), r.words) for r in report.numerics]
    return _table("Numerics", "llrl", ("dtype", "log-ratios", "worst error", ""), rows)


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2e}"
