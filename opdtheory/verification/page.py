"""The page that `opdtheory verify` writes: one self-contained HTML file, with what fails first."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

import torch

from opdtheory.choices import VERDICTS
from opdtheory.rendering.html import document, folded, number, prose, save_page, section, sentence, table, verdict_words
from opdtheory.rendering.mathematics import can_typeset, typeset
from opdtheory.theorems import TheoremResult, theorems
from opdtheory.verification.article import anchor, article, mark
from opdtheory.verification.drawings import figures
from opdtheory.verification.families import FAMILIES, by_family
from opdtheory.verification.markdown import machine_checked, named
from opdtheory.verification.verify import EstimatorResult, Verification
from opdtheory.version import __version__

__all__ = ["render_page", "write_page"]


def write_page(result: Verification, path: Path) -> Path:
    """Write the page, create its folder if needed, and return its path."""
    return save_page(render_page(result), path)


def render_page(result: Verification) -> str:
    """The page as HTML: the verdict, what fails, contents, theorems by family, estimators, figures.

    Without the extra `plots` a note takes the place of the figures, and formulas stand as LaTeX.
    """
    stated = {theorem.number: theorem for theorem in theorems()}
    articles = {found.number: article(found, stated.get(found.number)) for found in result.theorems}
    families = list(by_family((found.number, stated.get(found.number)) for found in result.theorems))
    failing = [found.number for found in result.theorems if not found.passed]
    sections = [
        _failing(result, [articles[n] for n in failing]),
        _contents(result, families),
        *(
            section(FAMILIES[name], "".join(articles[n] for n in numbers if n not in failing), f"family-{name}")
            for name, numbers in families
            if set(numbers) - set(failing)
        ),
        _estimators(result),
        figures(result.estimators),
    ]
    verdict = "holds" if result.passed else "fails"
    return document(
        "Verification",
        f"opdtheory {__version__}",
        verdict,
        "good" if result.passed else "bad",
        _lead(result),
        sections,
        f"opdtheory {escape(__version__)}, torch {escape(torch.__version__)}, {result.seconds:.0f} s.",
    )


def _lead(result: Verification) -> str:
    twins = sum(len(check.twins) for check in result.identities) + len(result.estimators)
    failing = [f"<a href='#{anchor(r.number)}'>{escape(r.number)}</a>" for r in result.theorems if not r.passed]
    failing += [f"<a href='#failing'>{prose(r.label)}</a>" for r in result.estimators if not r.passed]
    said = f"These fail: {', '.join(failing)}." if failing else "Every theorem holds and every false twin is refuted."
    words = [
        f"{_count(result.theorems)} of {len(result.theorems)} theorems hold, by {len(result.identities)} checks; "
        f"{_count(result.estimators)} of {len(result.estimators)} estimators keep their claim on enumerated policies; "
        f"{result.twins_refuted} of {twins} false twins are refuted.",
        "Numeric checks are in float64, with errors relative to the larger of one and the numbers compared; "
        "exact ones compare fractions, rigorous ones enclose both sides.",
    ]
    if result.proofs:
        words.append(f"{machine_checked(len(result.proofs))}.")
    if not can_typeset():
        words.append("Formulas stand as LaTeX: the extra <code>opdtheory[plots]</code> typesets them.")
    return f"<p class='lead'>{said}</p>" + "".join(f"<p>{each}</p>" for each in words)


def _failing(result: Verification, articles: list[str]) -> str:
    wrong = [each for each in result.estimators if not each.passed]
    shown = "".join(articles) + (_table(wrong, "Estimators that do not keep their claim.") if wrong else "")
    return section("What fails", shown, "failing") if shown else ""


def _contents(result: Verification, families: list[tuple[str, list[str]]]) -> str:
    by_number = {found.number: found for found in result.theorems}

    def item(number: str) -> str:
        found = by_number[number]
        failed = "" if found.passed else f" {mark(False)}"
        name = typeset(named(found.name))
        return f"<li><a href='#{anchor(number)}'><b>{escape(number)}</b>{name}</a>{failed}</li>"

    def title(name: str, numbers: list[str]) -> str:
        # A family of which everything fails has no section of its own.
        linked = any(by_number[number].passed for number in numbers)
        return f"<a href='#family-{name}'>{FAMILIES[name]}</a>" if linked else FAMILIES[name]

    parts = [
        f"<div><h3>{title(name, numbers)}</h3><ul>{''.join(map(item, numbers))}</ul></div>"
        for name, numbers in families
    ]
    others = [("estimators", "The estimators")] if result.estimators else []
    items = "".join(f"<li><a href='#{to}'>{title}</a></li>" for to, title in [*others, ("figures", "Figures")])
    parts.append(f"<div><h3>Beside the theorems</h3><ul>{items}</ul></div>")
    return section("Contents", f"<nav class='contents' aria-label='Contents'>{''.join(parts)}</nav>", "contents")


def _estimators(result: Verification) -> str:
    if not result.estimators:
        return ""
    parts = [
        "<p>Each estimator is audited as a black box. The audit must find what the estimator claims, and must refute a "
        "false twin.</p>"
    ]
    for verdict, meaning in VERDICTS.items():
        group = [each for each in result.estimators if each.claim.verdict == verdict]
        if group:
            title = f"Claimed {verdict_words(verdict)}: {_count(group)} of {len(group)} confirmed"
            parts.append(folded(title, _table(group, sentence(meaning))))
    return section("Estimators", "".join(parts), "estimators")


def _table(results: list[EstimatorResult], caption: str) -> str:
    rows = [
        (
            f"{prose(r.label)} {mark(r.passed)}",
            escape(f"{r.claim.divergence.label} ({r.claim.granularity})"),
            escape(", ".join(r.claim.assumptions.words)),
            escape(verdict_words(r.audit.verdict) + (f", follows {r.audit.descends}" if r.audit.descends else "")),
            number(r.audit.relative_bias),
            f"{escape(r.twin)}: {escape(verdict_words(r.twin_verdict))} {mark(r.twin_refuted, 'refuted', 'survives')}",
        )
        for r in results
    ]
    header = ("estimator", "claimed for", "assumed", "the audit finds", "relative bias", "false twin")
    return table(header, rows, caption, numbers=(4,))


def _count(results: Iterable[TheoremResult | EstimatorResult]) -> int:
    return sum(each.passed for each in results)
