"""The page of an audit: one self-contained HTML file, without a script and without a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from opdtheory.auditing.report import Audit
from opdtheory.auditing.views.figures import Curves, curves, figures
from opdtheory.choices import FAITHFUL, VERDICTS
from opdtheory.divergences import Divergence
from opdtheory.rendering.html import (
    aligned,
    breakable,
    cosine,
    formula,
    number,
    plain_text,
    prose,
    rows_of,
    section,
    sentence,
    table,
    verdict_words,
    yes_or_no,
)
from opdtheory.rendering.style import CONTENT_POLICY, STYLE
from opdtheory.version import __version__

__all__ = ["render_audit", "write_audit"]

_SETTINGS = {
    "batch_size": "rollouts in a batch",
    "eos": "end-of-sequence token",
    "off_policy": "logit noise of the sampler",
    "gamma": "discount",
    "seed": "seed of the panel",
    "prompts": "prompts",
    "environment": "positions that an environment writes",
    "shared_prompt": "one prompt for a batch",
}


def write_audit(report: Audit, path: Path, *, divergence: str | Divergence | None = None) -> Path:
    """Write the page of an audit, making its folder if need be, and return its path.

    Args:
        report: the audit.
        path: of the HTML file.
        divergence: as of `render_audit`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_audit(report, divergence=divergence), encoding="utf-8")
    return path


def render_audit(report: Audit, *, divergence: str | Divergence | None = None) -> str:
    """The page of an audit as HTML: the verdict in words, figures, tables.

    Figures need matplotlib (extra `plots`) and are left out with a note without it. Everything that a user named
    is escaped.

    Args:
        report: the audit.
        divergence: the claimed one, if its label is not enough to find it, as of a generator of one's own: its weight
            is then drawn over the recovered one.
    """
    drawn = curves(report, divergence)
    record = _record(report)
    verdict = report.verdict.replace("_", " ")
    tone = "good" if report.verdict in FAITHFUL else "open" if report.verdict == "undecided" else "bad"
    sections = (
        _facts(report),
        _remedies(record),
        _figures(report, drawn),
        _pairs(record),
        _form(record),
        _dependence(record),
        _checks(record),
        _numerics(record),
        _monte_carlo(record),
        _weight_table(report, drawn),
        _settings(record),
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(report.name)}: {escape(verdict)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">Audit of a loss</p>
<h1>{breakable(report.name)}</h1>
</header>
<section class="verdict {tone}" aria-label="Verdict">
<p class="word">{escape(verdict)}</p>
<p class="lead">{sentence(VERDICTS.get(report.verdict, ""))}</p>
<p>{escape(report.summary())}</p>
</section>
{"".join(section for section in sections if section)}
</main>
<footer><p>opdtheory {escape(__version__)}. {report.evaluations:,} evaluations of the loss in {report.seconds:.1f} s.
{_exactness(record)} Log-ratios are in nats, u is teacher over student.</p></footer>
</body>
</html>
"""


def _record(report: Audit) -> dict[str, Any]:
    """The report as plain values, with infinite numbers as they are."""
    record = report.to_dict()
    for key in ("form", "dependence"):
        part = getattr(report, key)
        record[key] = None if part is None else asdict(part)
    for key in ("checks", "numerics", "remedies"):
        record[key] = [asdict(part) for part in getattr(report, key)]
    return record


def _exactness(record: dict[str, Any]) -> str:
    if record.get("monte_carlo") is not None:
        return "Expectations are Monte Carlo estimates."
    return "Every expectation is over all rollouts, without sampling."


def _facts(report: Audit) -> str:
    facts = [
        ("claimed", escape(f"{report.objective} ({report.granularity})")),
        ("follows", escape(_followed(report))),
        ("relative bias", number(report.relative_bias)),
        ("smallest cosine", cosine(report.cosine)),
        ("best scale", number(report.scale)),
    ]
    return "<dl class='facts'>" + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>"


def _followed(report: Audit) -> str:
    if report.verdict == "zero":
        return "nothing"
    found = report.identified
    if found is None or found.error > report.tolerance:
        return "no catalogue objective"
    # A signed sum is no catalogue objective, but it is what the loss follows.
    return f"{report.descends or found.objective} ({found.where})"


def _remedies(record: dict[str, Any]) -> str:
    items = []
    for remedy in record["remedies"]:
        checked = "not verified"
        if remedy.get("verified"):
            found = escape(verdict_words(remedy.get("verdict")))
            checked = f"audited: {found}, relative bias {number(remedy.get('relative_bias'))}"
        items.append(f"<li>{escape(str(remedy.get('text')))} <span class='note'>({checked})</span></li>")
    return section("What would make it right", f"<ul>{''.join(items)}</ul>") if items else ""


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
        "u = 1: " + how + ", over the one claimed. Drawn up to what |log u| ≤ 2.5 needs." + missing,
        "Implied generator": "The generator whose divergence has the recovered weight (T4), against the claimed one, "
        "both zero with their slope at u = 1." + missing,
        "Bias by pair": "Length of the error of the expected gradient over that of the exact one, at scale one. "
        "Pairs are numbered as in the table.",
        "Variance by pair": "Trace of the covariance of one batch's gradient, as it is, and of the estimator that sums "
        "over the vocabulary.",
    }
    parts = [
        f"<figure><h3>{escape(f.title)}</h3><div role='img' aria-label='{escape(f.alt, quote=True)}'>{f.svg}</div>"
        f"<figcaption>{escape(captions[f.title])}</figcaption></figure>"
        for f in found
    ]
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
    about = "One row for each student and teacher: how peaked the student is, how far away the teacher."
    return section("Pairs", table(header, rows, about, numbers=(2, 3, 4, 5)) + _lengths(record))


def _lengths(record: dict[str, Any]) -> str:
    lengths = record.get("variable_lengths")
    if lengths is None:
        return ""
    return (
        f"<p>Where rollouts may end early: {escape(verdict_words(lengths['verdict']))}, relative bias "
        f"{number(lengths['relative_bias'])} at best scale.</p>"
    )


def _form(record: dict[str, Any]) -> str:
    form = record["form"]
    if form is None:
        return ""
    terms = ", ".join(f"{number(value)} × {escape(str(name))}" for name, value in (form.get("terms") or {}).items())
    # NaN stands for a limit that is not known.
    limits = {end: value for end, value in (form.get("limits") or {}).items() if value == value}
    ends = ", ".join(
        f"{number(value)} as u → {'∞' if end == 'inf' else escape(str(end))}" for end, value in limits.items()
    )
    fixed = "<br>".join(prose(point) for point in form.get("fixed_points") or [])
    rows = [
        ("name", escape(str(form.get("label") or "none"))),
        ("combination", terms if len(form.get("terms") or {}) > 1 else ""),
        ("weight w(u)", formula(form.get("expr"))),
        ("implied generator V(u)", formula(form.get("generator"))),
        ("a genuine f-divergence", yes_or_no(form.get("genuine"))),
        ("fixed at other distributions", fixed),
        ("slope at the teacher", number(form.get("slope_at_teacher"))),
        ("the teacher attracts", yes_or_no(form.get("attracts"))),
        ("limits of w", ends),
        ("is plain OPD with the generator of", escape(str(form.get("stop_gradient_of") or ""))),
        ("growth", prose(form.get("growth"))),
        ("second moment", prose(form.get("second_moment"))),
        ("error of the fit", number(form.get("error"))),
        ("seen for |log u| up to", number(form.get("seen_to")) if form.get("seen_to") else ""),
    ]
    return section("The weight as a formula", rows_of([row for row in rows if row[1]]))


def _dependence(record: dict[str, Any]) -> str:
    found = record["dependence"]
    if found is None:
        return ""
    words = "".join(f"<li>{prose(word)}</li>" for word in found.get("words") or [])
    rows = [
        (label, yes_or_no(found[key]))
        for key, label in (
            ("ratio_only", "the token's own ratio alone"),
            ("other_tokens", "other tokens of the rollout"),
            ("batch", "other rollouts of the batch"),
            ("sampling_policy", "the policy that sampled"),
        )
        if isinstance(found.get(key), bool)
    ]
    if found.get("position"):
        rows.append(("the position", ", ".join(number(value) for value in found["position"])))
    if found.get("top_k") is not None:
        rows.append(("the top tokens", f"the {escape(str(found['top_k']))} of the top"))
    if found.get("student_and_teacher"):
        rows.append(("student and teacher apart", escape(str(found["student_and_teacher"]))))
    body = (f"<ul>{words}</ul>" if words else "") + rows_of(rows)
    return section("What the weight of a token depends on", body)


def _checks(record: dict[str, Any]) -> str:
    marks = {
        True: "<span class='good'>holds</span>",
        False: "<span class='bad'>fails</span>",
        None: "<span class='note'>noted</span>",
    }
    rows = [
        (
            marks[check.get("passed")],
            escape(str(check.get("name"))),
            number(check.get("value")),
            number(check.get("limit")),
            prose(check.get("detail")),
        )
        for check in record["checks"]
    ]
    header = ("", "check", "value", "limit", "found")
    about = "What else holds of a loss that follows its claim."
    return section("Checks", table(header, rows, about, numbers=(2, 3))) if rows else ""


def _numerics(record: dict[str, Any]) -> str:
    rows = [
        (
            escape(str(result.get("dtype"))),
            escape(str(result.get("regime"))),
            *(_ratios(result.get(key)) for key in ("overflow", "lost_gradient", "sign_changed")),
            number(result.get("worst_error")),
            prose(result.get("words")),
        )
        for result in record["numerics"]
    ]
    header = ("dtype", "log-ratios", "overflows at", "loses gradient at", "changes sign at", "worst error", "in words")
    about = "The same loss in lower precision, against float64. Entries are log-ratios."
    return section("Numerics", table(header, rows, about, numbers=(5,))) if rows else ""


def _ratios(value: object) -> str:
    if value is None or value == [] or value is False:
        return "nowhere"
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = [number(v) for v in value[:4]]
        return ", ".join(shown) + (" …" if len(value) > 4 else "")
    return "yes" if value is True else number(value)


def _monte_carlo(record: dict[str, Any]) -> str:
    found = record.get("monte_carlo")
    if found is None:
        return ""
    words = f"<p>{escape(str(found['words']))}</p>" if found.get("words") else ""
    rows = [
        (escape(str(key).replace("_", " ")), plain_text(value))
        for key, value in found.items()
        if key != "words" and value not in (None, "", [])
    ]
    return section("Monte Carlo", words + rows_of(rows))


def _weight_table(report: Audit, drawn: Curves) -> str:
    if len(drawn.log_u) == 0:
        return ""
    header: tuple[str, ...] = ("log u", "recovered w(u) − w(1)", "claimed")
    claimed = [None] * len(drawn.log_u) if drawn.claimed is None else drawn.claimed.tolist()
    # On the step beside zero only the slope was taken.
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
    return f"<details><summary>The recovered weight as numbers</summary>{shown}</details>"


def _settings(record: dict[str, Any]) -> str:
    rows = [
        (escape(_SETTINGS.get(key, key.replace("_", " "))), "none" if value in (None, [], "") else plain_text(value))
        for key, value in record["settings"].items()
    ]
    return f"<details><summary>Settings</summary>{rows_of(rows)}</details>"
