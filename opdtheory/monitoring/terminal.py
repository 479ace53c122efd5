"""A diagnosis in a terminal, with rich (extra `cli`), or as plain text if the output is not a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdtheory.monitoring.report import Diagnosis, zoo_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TONES", "print_diagnosis"]

# How grave a verdict is, in the words of the pages; the others are bad.
TONES = {"nothing_found": "good", "clipped": "open", "other_samples": "open"}
_COLOURS = {"good": "green", "open": "yellow", "bad": "red"}


def print_diagnosis(found: Diagnosis, console: Console | None = None) -> None:
    """Print a diagnosis in colour, with a table, on a rich console that is a terminal; else print `str(found)`."""
    if console is None or not console.is_terminal:
        print(found)
        return
    from rich.text import Text

    colour = _COLOURS[TONES.get(found.verdict, "bad")]
    verdict = f" {found.verdict.replace('_', ' ').upper()} "
    console.print(Text.assemble((found.source, "bold"), "  ", (verdict, f"bold reverse {colour}")))
    console.print()
    console.print(Text(f"{found.headline}."))
    for fact in found.facts:
        console.print(Text(fact, style="dim"))
    console.print()
    for each in found.findings:
        mark = ("warning ", "bold red") if each.level == "warning" else ("", "")
        remedy = f" {each.remedy}" if each.remedy else ""
        console.print(Text.assemble("  • ", mark, each.sentence, (remedy, "bold")))
    console.print()
    zoo_table(found).show(console)
    console.print()
    console.print(Text("What these tokens cannot say", style="bold"))
    for limit in found.limits:
        console.print(Text.assemble("  • ", limit))
