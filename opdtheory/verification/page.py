"""The page that `opdtheory verify` writes: one self-contained HTML file with tables and figures."""

from __future__ import annotations

import textwrap
from html import escape
from pathlib import Path
from typing import Any

import torch

from opdtheory import divergences
from opdtheory.rendering.svg import svg_of
from opdtheory.verification.verify import EstimatorResult, Verification
from opdtheory.version import __version__

__all__ = ["render_page", "write_page"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --ok: #1a7f37; --bad: #c62828; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.ok { color: var(--ok); } .bad { color: var(--bad); font-weight: bold; }
tr.head td { font-weight: 600; border-top: 2px solid var(--line); } tr.head details { font-weight: 400; }
code { font-size: .95em; } .scroll { overflow-x: auto; }
figure { margin: 1.5rem 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; } figcaption { color: #333; font-size: .9rem; padding: .3rem .5rem; }
"""


def write_page(result: Verification, path: Path) -> Path:
    """Write the page, create its folder if needed, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page(result), encoding="utf-8")
    return path


def render_page(result: Verification) -> str:
    """The page as HTML; without matplotlib (extra `plots`) a note takes the place of the figures."""
    verdict = "Every theorem holds and every false twin is refuted." if result.passed else "Something failed."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>opdtheory verify</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>opdtheory {escape(__version__)}: verification</h1>
<p class="{"ok" if result.passed else "bad"}">{verdict}</p>
<p>{len(result.theorems)} theorems with {len(result.identities)} checks, and {len(result.estimators)} estimators on
enumerated policies in float64; torch {escape(torch.__version__)}, {result.seconds:.0f} s. Numeric errors are relative
to the larger of one and the numbers compared; exact checks compare fractions, rigorous ones enclose both sides.</p>
<h2>Theorems</h2>
<div class="scroll">{_theorems(result)}</div>
<h2>Estimators</h2>
<p>Each estimator is audited as a black box. The audit must find what the estimator claims, and must refute a false
twin.</p>
<div class="scroll">{_estimators(result)}</div>
<h2>Figures</h2>
{_figures(result)}
</body>
</html>
"""


def _theorems(result: Verification) -> str:
    rows = []
    for theorem in result.theorems:
        steps = "".join(
            f"<li>{_mark(step.holds)} <code>{escape(step.says)}</code><br><small>{escape(step.why)}"
            f"{' (in words; the machine checked a lemma or an instance)' if step.in_words else ''}</small></li>"
            for step in theorem.steps
        )
        rows.append(
            f"<tr class='head'><td>{_mark(theorem.passed)}</td><td>{escape(theorem.number)}</td>"
            f"<td colspan='5'>{escape(theorem.name)}<details><summary>derivation, {len(theorem.steps)} steps"
            f"</summary><ol>{steps}</ol></details></td><td class='number'>{theorem.seconds:.1f}</td></tr>"
        )
        for r in theorem.identities:
            twins = "<br>".join(
                f"{escape(name)}: <span class='{'bad' if name in r.survivors else 'ok'}'>"
                f"{'survives' if name in r.survivors else 'refuted'}</span> ({_number(error)})"
                for name, error in r.twins.items()
            )
            failure = f"<br><span class='bad'>{escape(r.failure)}</span>" if r.failure else ""
            rows.append(
                f"<tr><td>{_mark(r.passed)}</td><td></td>"
                f"<td>{escape(r.name)}<br><code>{escape(r.statement)}</code>{failure}</td><td>{escape(r.kind)}</td>"
                f"<td class='number'>{_number(r.error)}</td><td class='number'>{r.cases}</td>"
                f"<td>{twins}</td><td class='number'>{r.seconds:.1f}</td></tr>"
            )
    head = (
        "<tr><th></th><th>theorem</th><th>check</th><th>how</th><th>largest error</th><th>cases</th>"
        "<th>false twins</th><th>s</th></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _estimators(result: Verification) -> str:
    rows = []
    for r in result.estimators:
        assumptions = (
            f"<br><small>{escape(', '.join(r.claim.assumptions.words))}</small>" if r.claim.assumptions.words else ""
        )
        rows.append(
            f"<tr><td>{_mark(r.passed)}</td><td><code>{escape(r.name)}</code></td>"
            f"<td>{escape(r.claim.divergence.label)} ({escape(r.claim.granularity)}){assumptions}</td>"
            f"<td>{escape(r.audit.verdict.replace('_', ' '))}</td><td>{escape(r.audit.descends or '-')}</td>"
            f"<td class='number'>{_number(r.audit.relative_bias)}</td>"
            f"<td>{escape(r.twin)}: {escape(r.twin_verdict.replace('_', ' '))}</td></tr>"
        )
    head = (
        "<tr><th></th><th>estimator</th><th>claimed for</th><th>verdict</th><th>descends</th>"
        "<th>relative bias</th><th>false twin</th></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _figures(result: Verification) -> str:
    try:
        import matplotlib
    except ImportError:
        return "<p>No figures: install the extra <code>opdtheory[plots]</code>.</p>"
    # Not pyplot: no global state, and no display.
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "opdtheory", "font.size": 9}):
        return (
            "<figure>"
            + svg_of(_weights_figure(Figure))
            + "<figcaption>The advantage that stop-gradient OPD puts on a token, &minus;f(u), and the corrected "
            "one of OPD+, u f&prime;(u) &minus; f(u), both shifted to 0 at u = 1. Only for the reverse KL do they "
            "agree.</figcaption></figure><figure>"
            + svg_of(_recovered_figure(Figure, result.estimators))
            + "<figcaption>The weight of each audited estimator, recovered from its exact expected gradient on "
            "one-step policies, with its verdict. A dashed line marks a weight that depends on more than u."
            "</figcaption></figure>"
        )


def _weights_figure(figure: Any) -> Any:
    names = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "le_cam")
    log_u = torch.linspace(-3, 3, 121, dtype=torch.float64)
    sheet = figure(figsize=(10, 5.5), layout="constrained")
    for axis, name in zip(sheet.subplots(2, 3, sharex=True).flat, names, strict=True):
        divergence = divergences.divergence(name)
        at_one = torch.zeros((), dtype=torch.float64)
        corrected = divergence.weight(log_u) - divergence.weight(at_one)
        axis.plot(log_u, -divergence.generator(log_u), color="tab:red", label="OPD: $-f(u)$")
        axis.plot(log_u, corrected, color="tab:blue", linestyle="--", label="OPD+: $u f'(u) - f(u)$")
        _decorate(axis, name)
        axis.set_ylim(-4, 4)
    sheet.axes[0].legend()
    return sheet


def _recovered_figure(figure: Any, results: list[EstimatorResult]) -> Any:
    columns = 5
    rows = max(1, -(-len(results) // columns))
    sheet = figure(figsize=(12, 2.1 * rows), layout="constrained")
    axes = list(sheet.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axis, r in zip(axes, results, strict=False):
        weight = r.audit.weight
        style = "-" if weight["depends_on_ratio_only"] else "--"
        axis.plot(weight["log_u"], weight["weight"], style, color="tab:blue" if r.audit.passes else "tab:red")
        title = textwrap.fill(r.label, width=32)
        _decorate(axis, f"{title}\n{r.audit.verdict.replace('_', ' ')}")
        axis.title.set_fontsize(7)
        if float(weight["weight"].abs().max()) < 1e-9:
            axis.set_ylim(-1.0, 1.0)  # rounding, not a weight
    for axis in axes[len(results) :]:
        axis.set_visible(False)
    return sheet


def _decorate(axis: Any, title: str) -> None:
    # Names are shown as they are: a dollar sign would start mathematics.
    axis.set_title(title.replace("$", r"\$"))
    axis.axhline(0.0, color="0.7", linewidth=0.7, zorder=0)
    axis.axvline(0.0, color="0.7", linewidth=0.7, zorder=0)
    axis.set_xlabel("log u")


def _mark(passed: bool) -> str:
    return "<span class='ok'>ok</span>" if passed else "<span class='bad'>failed</span>"


def _number(value: float) -> str:
    if value == 0.0:
        return "0"
    return f"{value:.1e}" if value < float("inf") else "wrong"
