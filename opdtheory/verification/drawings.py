"""The figures of a verification: the weights of OPD and OPD+, and those that the audits recovered."""

from __future__ import annotations

from html import escape
from typing import Any

import torch

from opdtheory import divergences
from opdtheory.rendering.figures import CLAIMED, FOUND, INK, MUTED, drawing, page_svg, sheet
from opdtheory.rendering.html import folded, prose, section, verdict_words
from opdtheory.rendering.mathematics import typeset
from opdtheory.verification.verify import EstimatorResult

__all__ = ["figures"]

_DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "le_cam")

_ADVANTAGES = (
    "Against $\\log u$, the advantage that stop-gradient OPD puts on a token, $-f(u)$ (solid), and the one of OPD+, "
    "$u f'(u) - f(u)$ (dashed), both shifted to 0 at $u = 1$. Only for the reverse KL do they agree."
)
_RECOVERED = (
    "The weight of each audited estimator against $\\log u$, recovered from its exact expected gradient on one-step "
    "policies. A dashed line marks a weight that depends on more than $u$."
)


def figures(results: list[EstimatorResult]) -> str:
    """A section of small figures as HTML; without matplotlib (extra `plots`), a note takes their place."""
    try:
        with drawing():
            advantages = "".join(_advantages(name, f"advantage-{i}") for i, name in enumerate(_DIVERGENCES))
            recovered = "".join(_recovered(result, f"recovered-{i}") for i, result in enumerate(results))
    except ImportError:
        note = "<p class='note'>No figures: install the extra <code>opdtheory[plots]</code>.</p>"
        return section("Figures", note, "figures")
    body = f"<p>{typeset(_ADVANTAGES)}</p><div class='multiples'>{advantages}</div>"
    if recovered:
        shown = f"<p>{typeset(_RECOVERED)}</p><div class='multiples'>{recovered}</div>"
        body += folded(f"The weights of the {len(results)} estimators", shown)
    return section("Figures", body, "figures")


def _advantages(name: str, prefix: str) -> str:
    divergence = divergences.divergence(name)
    log_u = torch.linspace(-3, 3, 61, dtype=torch.float64)
    at_one = torch.zeros((), dtype=torch.float64)
    drawn, axis = _axes()
    axis.plot(log_u, -divergence.generator(log_u), color=FOUND)
    axis.plot(log_u, divergence.weight(log_u) - divergence.weight(at_one), color=CLAIMED, linestyle="--")
    axis.set_ylim(-4, 4)
    return _small(drawn, prefix, escape(name))


def _recovered(result: EstimatorResult, prefix: str) -> str:
    weight = result.audit.weight
    drawn, axis = _axes()
    axis.plot(weight["log_u"], weight["weight"], "-" if weight["depends_on_ratio_only"] else "--", color=FOUND)
    if float(weight["weight"].abs().max()) < 1e-9:
        axis.set_ylim(-1.0, 1.0)  # rounding, not a weight
    verdict = escape(verdict_words(result.audit.verdict))
    return _small(drawn, prefix, f"{prose(result.label)}: {verdict}")


def _axes() -> tuple[Any, Any]:
    drawn, axis = sheet(small=True)
    axis.axhline(0.0, color=MUTED, linewidth=0.6)
    axis.axvline(0.0, color=MUTED, linewidth=0.6)
    axis.tick_params(labelsize=9, labelcolor=INK)
    axis.locator_params(nbins=4)
    axis.yaxis.set_major_formatter(_short)
    return drawn, axis


def _short(value: float, _: int) -> str:
    """A number that fits beside a small axis: thousands as k."""
    text = f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
    return text.replace("-", "−")


def _small(drawn: Any, prefix: str, caption: str) -> str:
    return f"<figure>{page_svg(drawn, prefix)}<figcaption>{caption}</figcaption></figure>"
