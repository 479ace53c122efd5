"""The page of a trainer's audit: one self-contained HTML file, without scripts and without requests."""

from __future__ import annotations

from html import escape
from pathlib import Path

from opdtheory.choices import VERDICTS
from opdtheory.end_to_end.report import TrainerAudit
from opdtheory.rendering.html import cosine, document, number, plain_text, rows_of, section, sentence, table
from opdtheory.rendering.text import percent
from opdtheory.version import __version__

__all__ = ["render_trainer_audit", "write_trainer_audit"]


def write_trainer_audit(report: TrainerAudit, path: Path) -> Path:
    """Write the page of an audit, creating its folder if necessary, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_trainer_audit(report), encoding="utf-8")
    return path


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
        section("Findings", f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in report.words)}</ul>"),
        section("Where the gradient falls", _where(report)),
        section("In other settings", _variants(report)) if report.variants else "",
        section("Settings", rows_of(_settings(report))),
        section("What was not asked", f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in report.limits)}</ul>"),
    )
    foot = (
        f"opdtheory {escape(__version__)}. {escape(played)} in {report.seconds:.1f} s.\n"
        "Errors are relative; at the best scale, to the scaled gradient."
    )
    return document("Audit of a trainer", report.name, verdict, tone, f'<p class="lead">{lead}</p>', sections, foot)


def _facts(report: TrainerAudit) -> str:
    facts = [
        ("claimed", escape(f"{report.claim.label} ({report.claim.granularity})")),
        ("follows", escape(report.descends or "nothing that we can name")),
        ("off by, at best scale", number(report.error)),
        ("cosine", cosine(report.cosine)),
        ("best scale", number(report.scale)),
    ]
    return "<dl class='facts'>" + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>"


def _settings(report: TrainerAudit) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), plain_text(value)) for key, value in report.settings.items()]


def _where(report: TrainerAudit) -> str:
    rows = [(escape(kind), percent(share)) for kind, share in report.where.items()]
    return table(("gradient at", "share of its squared length"), rows, "Where the gradient falls", numbers=(1,))


def _variants(report: TrainerAudit) -> str:
    rows = [tuple(map(escape, (*each.cells, each.words))) for each in report.variants]
    header = ("setting", "error at best scale", "scale over the main one", "", "what changes")
    return table(header, rows, "The trainer in other settings", numbers=(1, 2))
