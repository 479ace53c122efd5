"""The page of a diagnosis: one self-contained HTML file, without scripts and without requests."""

from __future__ import annotations

from html import escape
from pathlib import Path

from opdtheory.monitoring.figures import figures
from opdtheory.monitoring.report import ZOO_COLUMNS, Diagnosis, cells
from opdtheory.monitoring.sums import Number
from opdtheory.monitoring.terminal import TONES
from opdtheory.rendering.html import (
    bullets,
    document,
    facts,
    figure,
    number,
    prose,
    rows_of,
    save_page,
    section,
    table,
)
from opdtheory.version import __version__

__all__ = ["render_diagnosis", "write_diagnosis"]


def write_diagnosis(found: Diagnosis, path: Path) -> Path:
    """Write the page of a diagnosis, creating its folder if necessary, and return the path."""
    return save_page(render_diagnosis(found), path)


def render_diagnosis(found: Diagnosis) -> str:
    """The page as HTML: the verdict, the findings, figures, other estimators on the same tokens, and limits."""
    lead = f"<p class='lead'>{prose(found.headline)}.</p>"
    for each in found.warnings[:1]:
        lead += f"<p>{prose(each.sentence)} {prose(each.remedy)}</p>"
    sections = (
        _facts(found),
        section("Findings", _findings(found)),
        section("Figures", _figures(found)),
        section("Other estimators on these tokens", _zoo(found)),
        section("The tokens", rows_of(_tokens(found))),
        section("What these tokens cannot say", bullets(map(prose, found.limits))),
    )
    return document(
        "Diagnosis of a run",
        found.source,
        found.verdict.replace("_", " "),
        TONES.get(found.verdict, "bad"),
        lead,
        sections,
        f"opdtheory {escape(__version__)}; the theorems are those of its documentation.",
    )


def _facts(found: Diagnosis) -> str:
    foreseen = "–" if found.first_warning is None else f"step {found.first_warning}"
    falls = found.steps[0].metrics["opd/falls"] if found.steps else found.setting.measured.falls.value
    return facts(
        [
            ("tokens", f"{found.tokens:,}"),
            ("rollouts", f"{found.evidence.rollouts:,}"),
            ("steps", str(len(found.steps)) if found.steps else "–"),
            ("KL(p|q), nats a token", number(found.reverse_kl.value)),
            ("weight falls on", f"{100 * falls:.2g} %{' at first' if found.steps else ''}"),
            ("collapse foreseen", foreseen),
        ]
    )


def _findings(found: Diagnosis) -> str:
    rows = []
    for each in found.findings:
        tone = "bad" if each.level == "warning" else "note"
        what = f"{prose(each.sentence)} {prose(each.remedy)}"
        rows.append(
            (
                f"<span class='{tone}'>{escape(each.level)}</span>",
                what,
                _interval(each.number),
                escape(each.quantity),
                escape(each.theorem),
            )
        )
    head = ("level", "finding", "number", "of what", "theorem")
    return table(head, rows, "Everything that was found, warnings first; intervals hold at 99.9 %.")


def _interval(given: Number) -> str:
    if given.low is None or given.high is None:
        return number(given.value)
    return f"{number(given.value)} [{number(given.low)}, {number(given.high)}]"


def _figures(found: Diagnosis) -> str:
    try:
        drawn = figures(found)
    except ImportError:
        return "<p class='note'>No figures: install the extra <code>opdtheory[plots]</code>.</p>"
    parts = (figure(each.title, each.alt, each.svg, each.alt[:1].upper() + each.alt[1:]) for each in drawn)
    return f"<div class='figures'>{''.join(parts)}</div>"


def _zoo(found: Diagnosis) -> str:
    rows = [
        tuple(escape(cell).replace("-", "−") if i else escape(cell) for i, cell in enumerate(cells(row)))
        for row in found.zoo
    ]
    caption = (
        "The estimator in use comes first; slope, pull at u = 1, step towards the teacher, signal to noise of a token"
    )
    shown = table(ZOO_COLUMNS, rows, caption, numbers=range(1, len(ZOO_COLUMNS)))
    if found.signal:
        exact = [(escape(name), _interval(each)) for name, each in found.signal.items()]
        shown += table(
            ("estimator", "signal to noise of a token"), exact, "Exact, from whole distributions", numbers=(1,)
        )
    return shown


def _tokens(found: Diagnosis) -> list[tuple[str, str]]:
    rows = [(f"log u, {100 * share:g} % quantile", number(round(value, 4))) for share, value in found.log_u.items()]
    rows.append(("KL(p|q), nats a token", _interval(found.reverse_kl)))
    rows.append(("tokens of one step", f"{found.batch_tokens:,.0f}"))
    return rows + [("left out", escape(each)) for each in found.left_out]
