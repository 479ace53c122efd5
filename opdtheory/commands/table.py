"""`opdtheory table`: what each token-local estimator descends, derived symbolically."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

from opdtheory.commands.console import HOLDS, console
from opdtheory.rendering.markdown import markdown_table
from opdtheory.rendering.table import Table

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.verification.estimators import Row

__all__ = ["Format", "add_parser", "render", "run"]

Format = Literal["text", "markdown", "latex"]


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("table", help="derive symbolically what each token-local estimator descends")
    parser.add_argument("--format", choices=get_args(Format), default="text", help="format of the table")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table and return the exit status."""
    from opdtheory.verification.estimators import rows

    table = rows()
    if options.json:
        print(json.dumps([row.to_dict() for row in table], indent=2))
    elif options.format == "text":
        _as_table(table).show(console())
    else:
        print(render(table, options.format))
    return HOLDS


_HEADER = ("estimator", "weight w(u)", "implied generator V[w]", "what it is", "at the teacher", "E_p[w²] is")

# Longer formulas are cut in text and Markdown; LaTeX has them whole.
_WIDEST = 44


def render(table: list[Row], style: Format = "text") -> str:
    """The table as plain text, Markdown or a LaTeX `tabular`."""
    if style == "latex":
        return _latex(table)
    if style == "markdown":
        return markdown_table(_HEADER, [_cells(row) for row in table])
    return "\n".join(_as_table(table).lines())


def _as_table(table: list[Row]) -> Table:
    return Table([_HEADER, *(_cells(row) for row in table)])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.estimator.label,
        _short(str(row.weight)),
        _short(str(row.implied)),
        row.verdict,
        row.stability,
        row.second_moment,
    )


def _short(formula: str) -> str:
    return formula if len(formula) <= _WIDEST else formula[: _WIDEST - 2] + " …"


def _latex(table: list[Row]) -> str:
    import sympy

    escape: Callable[[str], str] = lambda words: (  # noqa: E731
        words.replace("_", r"\_").replace("→", r"$\to$").replace("∞", r"$\infty$").replace("²", "$^2$")
    )
    lines = [" & ".join(escape(cell) for cell in _HEADER) + r" \\ \midrule"]
    for row in table:
        formulas = [f"${sympy.latex(expr)}$" for expr in (row.weight, row.implied)]
        words = [escape(words) for words in (row.verdict, row.stability, row.second_moment)]
        lines.append(" & ".join([rf"\texttt{{{escape(row.estimator.label)}}}", *formulas, *words]) + r" \\")
    return "\n".join([r"\begin{tabular}{llllll} \toprule", *lines, r"\bottomrule", r"\end{tabular}"])
