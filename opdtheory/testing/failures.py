"""The message of a failing assertion: short enough to read in a log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdtheory.choices import FAITHFUL, VERDICTS

if TYPE_CHECKING:
    from opdtheory.auditing import Audit

__all__ = ["LONGEST", "reason", "shortened", "shortened_traceback"]

# Lines of a message.
LONGEST = 40


def shortened(message: str) -> str:
    """The message, cut to 40 lines; the last one says how many are left out and how to see them."""
    lines = message.splitlines()
    if len(lines) <= LONGEST:
        return message
    kept, left = lines[: LONGEST - 1], len(lines) - LONGEST + 1
    return "\n".join([*kept, f"[{left} more lines: print(report) for the rest, where report is opdtheory.audit(...)]"])


def shortened_traceback(text: str) -> str:
    """The text of a traceback, cut to 40 lines; the end counts, and the first line says how many are left out."""
    lines = text.splitlines()
    if len(lines) <= LONGEST:
        return text
    kept = lines[1 - LONGEST :]
    return "\n".join([f"[{len(lines) - len(kept)} more lines above: --full-trace shows all]", *kept])


def reason(report: Audit) -> str:
    """Why an audit does not pass, in a clause."""
    if report.verdict in FAITHFUL and not report.passes:
        return f"{VERDICTS[report.verdict]} on the panel, but it is wrong beyond it or unsound"
    return VERDICTS[report.verdict]
