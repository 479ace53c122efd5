"""The page of an audit: one self-contained HTML file, without scripts and without requests."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from opdtheory.auditing.checks.numerics import DtypeResult
from opdtheory.auditing.checks.subject import Check
from opdtheory.auditing.effects.dependence import Dependence
from opdtheory.auditing.naming.weight_form import WeightForm
from opdtheory.auditing.report import Audit, Remedy
from opdtheory.auditing.views.figures import Curves, curves, figures
from opdtheory.auditing.worlds import World
from opdtheory.choices import VERDICTS
from opdtheory.divergences import Divergence
from opdtheory.rendering.html import (
    aligned,
    bullets,
    cosine,
    document,
    facts,
    figure,
    folded,
    formula,
    number,
    plain_text,
    prose,
    rows_of,
    save_page,
    section,
    sentence,
    table,
    verdict_words,
    yes_or_no,
)
from opdtheory.rendering.mathematics import can_typeset, display, inline
from opdtheory.version import __version__

__all__ = ["render_audit", "write_audit"]

_SETTINGS = {
    "batch_size": "rollouts in a batch",
    "eos": "end-of-sequence token",
    "off_policy": "logit noise of the sampling policy",
    "alpha": "error rate",
    "gamma": "discount",
    "seed": "seed of the panel",
    "prompts": "prompts",
    "environment": "positions that an environment writes",
    "shared_prompt": "one prompt for a batch",
    "student_temperature": "temperature of the student in the claim",
    "teacher_temperature": "temperature of the teacher in the claim",
    "sampling_temperature": "temperature of sampling",
    "histories": "whose histories the claim is about",
    "teachers": "teachers",
    "teacher_weights": "weights of the teachers",
    "base": "a base policy",
    "extrapolation": "extrapolation of the teacher from the base",
    "microbatches": "micro-batches in a batch",
    "accumulate": "how micro-batches are put together",
    "reward": "a task's reward",
}


def write_audit(report: Audit, path: Path, *, divergence: str | Divergence | None = None) -> Path:
    """Write the page of an audit, creating its folder if necessary, and return the path.

    Args:
        report: the audit.
        path: path of the HTML file.
        divergence: as in `render_audit`.
    """
    return save_page(render_audit(report, divergence=divergence), path)


def render_audit(report: Audit, *, divergence: str | Divergence | None = None) -> str:
    """The page of an audit as HTML: the verdict in words, figures and tables.

    Figures need matplotlib (extra `plots`); without it, a note takes their place. Every name from a user is escaped.

    Args:
        report: the audit.
        divergence: the claimed divergence, if the catalogue does not have it; its weight is then drawn behind the
            recovered one.
    """
    drawn = curves(report, divergence)
    record = report.to_dict()
    verdict = report.headline.lower()
    tone = "good" if report.passes else "open" if report.verdict == "undecided" else "bad"
    exactness = "Every expectation is over all rollouts, without sampling."
    if report.monte_carlo is not None:
        exactness = "Expectations are Monte Carlo estimates."
    sections = (
        _facts(report),
        _remedies(report.remedies),
        _figures(report, drawn),
        _pairs(record),
        _worlds(report.worlds),
        _form(report.form),
        _dependence(report.dependence),
        _checks(report.checks),
        _numerics(report.numerics),
        _monte_carlo(record["monte_carlo"]),
        _weight_table(report, drawn),
        _settings(record),
        _limits(report.limits),
    )
    summary = _worded(report.summary(), report.form)
    lead = f'<p class="lead">{sentence(VERDICTS.get(report.verdict, ""))}</p>\n<p>{summary}</p>'
    foot = (
        f"opdtheory {escape(__version__)}. {report.evaluations:,} evaluations of the loss in {report.seconds:.1f} s.\n"
        f"{exactness} Log-ratios are in nats, u is teacher over student."
    )
    return document("Audit of a loss", report.name, verdict, tone, lead, sections, foot)


def _facts(report: Audit) -> str:
    return facts(
        [
            ("claimed", escape(f"{report.objective} ({report.granularity})")),
            ("follows", prose(_followed(report))),
            ("relative bias", number(report.relative_bias)),
            ("smallest cosine", cosine(report.cosine)),
            ("best scale", number(report.scale)),
        ]
    )


def _followed(report: Audit) -> str:
    if report.verdict == "zero":
        return "nothing"
    found = report.identified
    if found is None or found.error > report.tolerance:
        return "no catalogue objective"
    # A signed sum is not in the catalogue, but it is what the loss follows.
    return f"{report.descends or found.objective} ({found.where})"


def _remedies(remedies: list[Remedy]) -> str:
    items = []
    for remedy in remedies:
        checked = "not verified"
        if remedy.verified:
            found = escape(verdict_words(remedy.verdict))
            checked = f"audited: {found}, relative bias {number(remedy.relative_bias)}"
        items.append(f"{prose(remedy.text)} <span class='note'>({checked})</span>")
    return section("What would make it right", bullets(items)) if items else ""


def _figures(report: Audit, drawn: Curves) -> str:
    try:
        found = figures(report, drawn)
    except ImportError:
        note = "<p class='note'>No figures: install the extra <code>opdtheory[plots]</code>.</p>"
        return section("Figures", note)
    missing = "" if drawn.claimed is not None else " The claimed divergence is known by name only and is not drawn."
    how = "recovered from exact expected gradients"
    if "low" in report.weight:
        how = "the middles of intervals that hold jointly, from drawn rollouts, joined by lines"
    captions = {
        "Weight on a token": "The factor by which the loss raises the log-probability of a token, shifted to zero at "
        f"u = 1: {how}, over the claimed one. The height is that of |log u| ≤ 2.5.{missing}",
        "Implied generator": "The generator whose divergence has the recovered weight (T4), against the claimed one, "
        f"both with value and slope zero at u = 1.{missing}",
        "Bias by pair": "Length of the error of the expected gradient relative to the exact one, at scale one. "
        "Pairs are numbered as in the table.",
        "Variance by pair": "Trace of the covariance of one batch's gradient, for this loss and for the estimator that "
        "sums over the vocabulary.",
    }
    parts = [figure(each.title, each.alt, each.svg, captions[each.title]) for each in found]
    return section("Figures", f"<div class='figures'>{''.join(parts)}</div>") if parts else ""


def _pairs(record: dict[str, Any]) -> str:
    rows = [
        (
            str(i),
            escape(pair["label"]),
            aligned(pair["relative_bias"]),
            cosine(pair["cosine"]),
            aligned(pair["variance"]),
            aligned(pair["full_vocabulary_variance"]),
        )
        for i, pair in enumerate(record["pairs"], 1)
    ]
    if not rows:
        return ""
    header = ("", "pair", "relative bias", "cosine", "variance", "whole-vocabulary variance")
    about = "One row for each student and teacher: how peaked the student is, and how far away the teacher."
    return section("Pairs", table(header, rows, about, numbers=(2, 3, 4, 5)) + _lengths(record))


def _worlds(worlds: list[World]) -> str:
    rows = [
        (escape(world.name), yes_or_no(world.holds), aligned(world.error), aligned(world.scale), prose(world.detail))
        for world in worlds
    ]
    about = "Whether the finding holds beside the panel, at the best scale there."
    header = ("world", "holds", "error", "scale", "")
    return section("Beyond the panel", table(header, rows, about, numbers=(2, 3))) if rows else ""


def _limits(limits: tuple[str, ...]) -> str:
    return section("What was not asked", bullets(map(prose, limits))) if limits else ""


def _lengths(record: dict[str, Any]) -> str:
    lengths = record.get("variable_lengths")
    if lengths is None:
        return ""
    return (
        f"<p>Where rollouts may end early: {escape(verdict_words(lengths['verdict']))}, relative bias "
        f"{number(lengths['relative_bias'])} at best scale.</p>"
    )


def _form(form: WeightForm | None) -> str:
    if form is None:
        return ""
    terms = ", ".join(
        f"<span class='term'>{number(value)} × {prose(name)}</span>" for name, value in form.terms.items()
    )
    # An unknown limit is NaN.
    limits = {end: value for end, value in form.limits.items() if value == value}
    ends = ", ".join(f"{number(value)} as u → {'∞' if end == 'inf' else end}" for end, value in limits.items())
    rows = [
        ("name", prose(form.label)),
        ("combination", terms if len(form.terms) > 1 else ""),
        ("weight w(u)", _formula(form.expr, form.latex, display)),
        ("implied generator V(u)", _formula(form.generator, form.generator_latex, display)),
        ("a genuine f-divergence", yes_or_no(form.genuine)),
        ("fixed at other distributions", "<br>".join(map(prose, form.fixed_points))),
        ("slope at the teacher", number(form.slope_at_teacher)),
        ("the teacher attracts", yes_or_no(form.attracts)),
        ("limits of w", ends),
        ("is plain OPD with the generator of", escape(form.stop_gradient_of or "")),
        ("growth", prose(form.growth)),
        ("second moment", _worded(form.second_moment, form)),
        ("error of the fit", number(form.error)),
        ("seen for |log u| up to", number(form.seen_to) if form.seen_to else ""),
    ]
    return section("The weight as a formula", rows_of([row for row in rows if row[1]]))


def _formula(expr: str | None, latex: str | None, typeset: Callable[[str], str] = inline) -> str:
    """An expression in print, or in characters where formulas are not typeset."""
    return typeset(latex) if latex and can_typeset() else formula(expr)


def _worded(text: str, form: WeightForm | None) -> str:
    """Prose that quotes the weight's expression, or `E_p[w^2]`, with both in print."""
    if form is None or not form.expr:
        return prose(text)
    shown = _formula(form.expr, form.latex).join(map(prose, text.split(form.expr)))
    return shown.replace("E<sub>p</sub>[w<sup>2</sup>]", inline("E_p[w^2]")) if can_typeset() else shown


def _dependence(found: Dependence | None) -> str:
    if found is None:
        return ""
    rows = [
        ("the token's own ratio alone", yes_or_no(found.ratio_only)),
        ("other tokens of the rollout", yes_or_no(found.other_tokens)),
        ("other rollouts of the batch", yes_or_no(found.batch)),
        ("the sampling policy", yes_or_no(found.sampling_policy)),
        ("the position", ", ".join(map(number, found.position or []))),
        ("the top-k set", "" if found.top_k is None else f"k = {found.top_k}"),
        ("both probabilities", escape(found.student_and_teacher or "")),
    ]
    body = (bullets(map(prose, found.words)) if found.words else "") + rows_of([row for row in rows if row[1]])
    return section("What the weight of a token depends on", body)


def _checks(checks: list[Check]) -> str:
    marks = {
        True: "<span class='good'>holds</span>",
        False: "<span class='bad'>fails</span>",
        None: "<span class='note'>noted</span>",
    }
    rows = [
        (
            marks[check.passed],
            escape(check.name),
            number(check.value),
            number(check.limit),
            prose(check.detail),
        )
        for check in checks
    ]
    header = ("", "check", "value", "limit", "found")
    about = "Further properties of a sound loss."
    return section("Checks", table(header, rows, about, numbers=(2, 3))) if rows else ""


def _numerics(results: list[DtypeResult]) -> str:
    rows = [
        (
            escape(result.dtype),
            escape(result.regime),
            *(_ratios(where) for where in (result.overflow, result.lost_gradient, result.sign_changed)),
            number(result.worst_error),
            prose(result.words),
        )
        for result in results
    ]
    header = ("dtype", "log-ratios", "overflows at", "loses gradient at", "changes sign at", "worst error", "in words")
    about = "The same loss in lower precision, against float64. Entries are log-ratios."
    return section("Numerics", table(header, rows, about, numbers=(5,))) if rows else ""


def _ratios(where: list[float] | None) -> str:
    return ", ".join(map(number, where)) if where else "nowhere"


def _monte_carlo(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    rows = [
        (escape(key.replace("_", " ")), plain_text(value))
        for key, value in found.items()
        # Four digits of a confidence say less than the error rate.
        if key not in ("words", "by_pair", "confidence") and value not in (None, "", [])
    ]
    keys = ("scale", "error", "seen", "cosine")
    pairs = [(escape(pair["label"]), *(plain_text(pair[key]) for key in keys)) for pair in found["by_pair"]]
    header = ("pair", "scale", "off by, as a vector", "off by, along any direction", "cosine")
    about = "Each pair beside the multiple of the exact gradient that is nearest on that pair: intervals."
    beside = table(header, pairs, about, numbers=(1, 2, 3, 4))
    return section("Monte Carlo", f"<p>{escape(found['words'])}</p>" + rows_of(rows) + beside)


def _weight_table(report: Audit, drawn: Curves) -> str:
    if len(drawn.log_u) == 0:
        return ""
    header: tuple[str, ...] = ("log u", "recovered w(u) − w(1)", "claimed")
    claimed = [None] * len(drawn.log_u) if drawn.claimed is None else drawn.claimed.tolist()
    # A weight this small is rounding.
    rows: list[tuple[str, ...]] = [
        (number(round(t, 6)), number(w if abs(w) > 1e-12 else 0.0), number(c))
        for t, w, c in zip(drawn.log_u.tolist(), drawn.weight.tolist(), claimed, strict=True)
    ]
    if "low" in report.weight:
        header = (*header, "at least", "at most")
        ends = zip(report.weight["low"].tolist(), report.weight["high"].tolist(), strict=True)
        rows = [(*row, number(low), number(high)) for row, (low, high) in zip(rows, ends, strict=True)]
    about = "The recovered weight by log-ratio."
    shown = table(header, rows, about, numbers=tuple(range(len(header))))
    return folded("The recovered weight as numbers", shown)


def _settings(record: dict[str, Any]) -> str:
    rows = [
        (escape(_SETTINGS.get(key, key.replace("_", " "))), "none" if value in (None, [], "") else plain_text(value))
        for key, value in record["settings"].items()
    ]
    return folded("Settings", rows_of(rows))
