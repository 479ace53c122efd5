"""The page of a trainer's audit: one self-contained HTML file, without scripts and without requests."""

from __future__ import annotations

from html import escape
from pathlib import Path

from opdtheory.choices import VERDICTS
from opdtheory.end_to_end.report import TrainerAudit
from opdtheory.rendering.html import (
    bullets,
    cosine,
    document,
    facts,
    number,
    plain_text,
    prose,
    rows_of,
    save_page,
    section,
    sentence,
    table,
)
from opdtheory.rendering.text import percent
from opdtheory.version import __version__

__all__ = ["render_trainer_audit", "write_trainer_audit"]


def write_trainer_audit(report: TrainerAudit, path: Path) -> Path:
    """Write the page of an audit, creating its folder if necessary, and return the path."""
    return save_page(render_trainer_audit(report), path)


def render_trainer_audit(report: TrainerAudit) -> str:
    """The page of an audit as HTML: the verdict in words, where the gradient falls, variants, settings and limits."""
    verdict = report.headline.lower()
    tone = "good" if report.passes else "open" if report.verdict == "undecided" else "bad"
    sampled = report.monte_carlo is not None
    played = f"{report.outcomes:,} {'sampled steps' if sampled else 'outcomes of its sampling'}"
    lead = sentence(VERDICTS[report.verdict])
    if report.headline.startswith("FAILS"):
        lead = "In the main setting it does what it claims, in another one it does not."
    sections = (
        _facts(report),
        section("Findings", bullets(map(prose, report.words))),
        section("Where the gradient falls", _where(report)),
        section("In other settings", _variants(report)) if report.variants else "",
        section("Settings", rows_of(_settings(report))),
        section("What was not asked", bullets(map(prose, report.limits))),
    )
    foot = (
        f"opdtheory {escape(__version__)}. {escape(played)} in {report.seconds:.1f} s.\n"
        "Errors are relative; at the best scale, to the scaled gradient."
    )
    return document("Audit of a trainer", report.name, verdict, tone, f'<p class="lead">{lead}</p>', sections, foot)


def _facts(report: TrainerAudit) -> str:
    return facts(
        [
            ("claimed", escape(f"{report.claim.label} ({report.claim.granularity})")),
            ("follows", escape(report.descends or "nothing that we can name")),
            ("off by, at best scale", number(report.error)),
            ("cosine", cosine(report.cosine)),
            ("best scale", number(report.scale)),
        ]
    )


def _settings(report: TrainerAudit) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), plain_text(value)) for key, value in report.settings.items()]


def _where(report: TrainerAudit) -> str:
    rows = [(escape(kind), percent(share)) for kind, share in report.where.items()]
    about = "Shares of the gradient's squared length, by kind of prefix."
    return table(("gradient at", "share of its squared length"), rows, about, numbers=(1,))


def _variants(report: TrainerAudit) -> str:
    rows = [tuple(map(prose, (*each.cells, each.words))) for each in report.variants]
    header = ("setting", "error at best scale", "scale over the main one", "", "what changes")
    about = "The same claim beside the main setting: its error there, and its scale relative to the main one."
    return table(header, rows, about, numbers=(1, 2))
