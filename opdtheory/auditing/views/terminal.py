"""An audit in a terminal, with rich (extra `cli`), or as plain text if the output is not a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opdtheory.auditing.report import PAIR_COLUMNS, Audit

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
            console.print(table)
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


def _table(title: str, columns: list[tuple[str, str]], rows: list[list[Any]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        # `Text`, because rich would read brackets in a plain string as markup.
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def _pairs(report: Audit) -> Any:
    from rich.text import Text

    rows: list[list[Any]] = []
    for pair in report.pairs:
        label, bias, cosine, *variances = pair.cells
        good = report.passes or pair.relative_bias <= report.tolerance
        shown = Text(bias, style="green" if good else "red"), Text(cosine, style="bold red" if pair.cosine < 0 else "")
        rows.append([label, *shown, *variances])
    return _table("Pairs", [(name, "left" if name == "pair" else "right") for name in PAIR_COLUMNS], rows)


def _marks() -> dict[bool | None, Any]:
    from rich.text import Text

    return {True: Text("ok", style="green"), False: Text("FAILED", style="bold red"), None: Text("-", style="dim")}


def _worlds(report: Audit) -> Any:
    marks = _marks()
    rows = [[marks[w.holds], w.name, _number(w.error), w.detail] for w in report.worlds]
    columns = [("", "left"), ("world", "left"), ("error", "right"), ("", "left")]
    return _table("Beyond the panel", columns, rows) if rows else None


def _checks(report: Audit) -> Any:
    marks = _marks()
    rows = [[marks[c.passed], c.name, _number(c.value), c.detail] for c in report.checks]
    columns = [("", "left"), ("check", "left"), ("value", "right"), ("", "left")]
    return _table("Checks", columns, rows) if rows else None


def _numerics(report: Audit) -> Any:
    rows = [[r.dtype, r.regime, _number(r.worst_error), r.words] for r in report.numerics]
    columns = [("dtype", "left"), ("log-ratios", "left"), ("worst error", "right"), ("", "left")]
    return _table("Numerics", columns, rows) if rows else None


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2e}"
