"""The curves of an audit, and the figures of its page as inline SVG, which need matplotlib (extra `plots`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.report import Audit
from opdtheory.choices import FAITHFUL
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import OpdTheoryError
from opdtheory.rendering.figures import CLAIMED, FOUND, INK, MUTED, drawing, frame, page_svg
from opdtheory.rendering.figures import sheet as new_sheet

__all__ = ["Curves", "Figure", "curves", "figures"]

# The implied generator is integrated only as far as it is drawn.
_GENERATOR_LIMIT = 2.5
_GENERATOR_POINTS = 1001

# Log-ratios that determine the height of the figure of the weight; higher values further out are cut off.
_WINDOW = 2.5
_HEADROOM = 1.25

# A recovered weight below this is rounding.
_ROUNDING = 1e-9

# The left end of the logarithmic axis of relative biases.
_SMALLEST = 1e-17


@dataclass(frozen=True)
class Curves:
    """The curves of the weight and of its generator.

    Attributes:
        log_u: grid of log-ratios.
        weight: the recovered weight, zero at `u = 1`.
        claimed: the claimed divergence's weight at the loss's scale, zero at `u = 1`; None if unknown.
        generator_log_u: a finer grid.
        generator: the implied generator `V[w]`, with value and slope zero at `u = 1`; None if the weight is not a
            function of the ratio, or known at too few points.
        claimed_generator: the claimed generator in the same gauge and at the same scale; None if unknown.
    """

    log_u: Float[Tensor, " points"]
    weight: Float[Tensor, " points"]
    claimed: Float[Tensor, " points"] | None
    generator_log_u: Float[Tensor, " fine"]
    generator: Float[Tensor, " fine"] | None
    claimed_generator: Float[Tensor, " fine"] | None


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        title: heading.
        alt: description for readers who do not see the figure.
        svg: the `<svg>` element.
    """

    title: str
    alt: str
    svg: str


def curves(report: Audit, divergence: str | Divergence | None = None) -> Curves:
    r"""The recovered weight and its implied generator $V[w](u) = u\int_1^u w(t)/t^2\,dt$ (T4), with the claimed ones.

    Args:
        report: the audit.
        divergence: the claimed divergence, if the catalogue does not have it.
    """
    log_u, weight = report.weight.log_u, report.weight.weight
    claim = _claimed(report, divergence)
    scale = report.scale if report.verdict in FAITHFUL else 1.0
    origin = torch.zeros((), dtype=torch.float64)
    claimed = None if claim is None else scale * (claim.weight(log_u) - claim.weight(origin))
    fine, generator = _implied(report)
    in_gauge = None
    if claim is not None:
        in_gauge = scale * (claim.generator(fine) - claim.log_slope(origin) * fine.expm1())
    return Curves(log_u, weight, claimed, fine, generator, in_gauge)


def _claimed(report: Audit, divergence: str | Divergence | None) -> Divergence | None:
    try:
        return as_divergence(report.objective if divergence is None else divergence)
    except OpdTheoryError:
        return None


def _implied(report: Audit) -> tuple[Tensor, Tensor | None]:
    log_u, weight = report.weight.log_u, report.weight.weight
    limit = min(_GENERATOR_LIMIT, float(log_u[-1])) if len(log_u) else 0.0
    fine = torch.linspace(-limit, limit, _GENERATOR_POINTS, dtype=torch.float64)
    if not report.weight.depends_on_ratio_only or limit < 1.0:
        return fine, None
    from scipy.integrate import cumulative_simpson
    from scipy.interpolate import PchipInterpolator

    # With s = log t, the integrand is w e^-s ds.
    integrand = PchipInterpolator(log_u.numpy(), weight.numpy())(fine.numpy()) * (-fine).exp().numpy()
    integral = torch.from_numpy(cumulative_simpson(integrand, x=fine.numpy(), initial=0.0))
    return fine, fine.exp() * (integral - integral[_GENERATOR_POINTS // 2])


def figures(report: Audit, drawn: Curves) -> list[Figure]:
    """The figures of an audit: weight, implied generator, bias and variance by pair.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with drawing():
        found = [_weight(report, drawn), _generator(drawn), _bias(report), _variance(report)]
    return [figure for figure in found if figure is not None]


def _weight(report: Audit, drawn: Curves) -> Figure | None:
    if len(drawn.log_u) == 0 or float(drawn.log_u[-1]) < 1.0:
        return None
    sheet, axis = new_sheet()
    inside = drawn.log_u.abs() <= _WINDOW
    if drawn.claimed is not None:
        _claimed_curve(axis, drawn.log_u, drawn.claimed)
    style = "-" if report.weight.depends_on_ratio_only else "--"
    axis.plot(drawn.log_u, drawn.weight, style, color=FOUND, label="recovered")
    ends = [report.weight[key] for key in ("low", "high") if key in report.weight]
    if ends:
        axis.fill_between(drawn.log_u, *ends, color=FOUND, alpha=0.2, linewidth=0.0, label="interval")
    _heights(axis, [c[inside] for c in (drawn.weight, drawn.claimed, *ends) if c is not None], zero=True)
    frame(axis, "log u", "w(u) − w(1)")
    axis.legend(loc="best")
    sides = f"from {float(drawn.weight[inside][0]):.3g} at log u = {float(drawn.log_u[inside][0]):.3g} "
    sides += f"to {float(drawn.weight[inside][-1]):.3g} at log u = {float(drawn.log_u[inside][-1]):.3g}"
    shape = "never falls" if report.weight.non_decreasing else "falls in places"
    alt = f"Recovered weight of a token against the log-ratio: {sides}; it {shape}."
    return Figure("Weight on a token", alt, page_svg(sheet, "weight"))


def _generator(drawn: Curves) -> Figure | None:
    if drawn.generator is None:
        return None
    sheet, axis = new_sheet()
    inside = drawn.generator_log_u.abs() <= 2.0
    if drawn.claimed_generator is not None:
        _claimed_curve(axis, drawn.generator_log_u, drawn.claimed_generator)
    axis.plot(drawn.generator_log_u, drawn.generator, color=FOUND, label="implied")
    _heights(axis, [c[inside] for c in (drawn.generator, drawn.claimed_generator) if c is not None])
    frame(axis, "log u", "V(u)")
    axis.legend(loc="best")
    low = float(drawn.generator.min())
    sign = "it is nowhere negative" if low >= -_ROUNDING else f"it falls to {low:.3g}"
    return Figure(
        "Implied generator", f"Generator implied by the recovered weight: {sign}.", page_svg(sheet, "generator")
    )


def _bias(report: Audit) -> Figure | None:
    values = [max(pair.relative_bias, _SMALLEST) for pair in report.pairs if math.isfinite(pair.relative_bias)]
    if not values or len(values) < len(report.pairs):
        return None
    sheet, axis, rows = _rows(len(values))
    axis.hlines(rows, _SMALLEST, values, color=FOUND, linewidth=2.5, alpha=0.45)
    axis.plot(values, rows, "o", color=FOUND, markersize=7)
    axis.axvline(report.tolerance, color=CLAIMED, linestyle="--", linewidth=1.4)
    axis.text(report.tolerance, 0.3, "rounding", ha="center", va="bottom", color=INK, fontsize=9)
    axis.set_xlim(_SMALLEST, max(10.0, 3.0 * max(values)))
    axis.set_xticks([1e-16, 1e-12, 1e-8, 1e-4, 1.0])
    frame(axis, "relative bias", "pair")
    alt = f"Relative bias of {len(values)} pairs, from {min(values):.1e} to {max(values):.1e}; "
    alt += f"up to {report.tolerance:.0e} is rounding."
    return Figure("Bias by pair", alt, page_svg(sheet, "bias"))


def _variance(report: Audit) -> Figure | None:
    pairs = [(pair.variance, pair.full_vocabulary_variance) for pair in report.pairs]
    if not pairs or not all(0.0 < value < math.inf for pair in pairs for value in pair):
        return None
    sheet, axis, rows = _rows(len(pairs))
    own, whole = zip(*pairs, strict=True)
    axis.hlines(rows, whole, own, color=MUTED, linewidth=1.2, alpha=0.6)
    axis.plot(whole, rows, "D", color=CLAIMED, markersize=6, label="whole vocabulary")
    axis.plot(own, rows, "o", color=FOUND, markersize=7, label="this loss")
    frame(axis, "variance of one batch's gradient", "pair")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=2, handletextpad=0.4, borderpad=0.0)
    ratios = [a / b for a, b in pairs]
    alt = "Variance of the loss's gradient against that of the whole-vocabulary estimator of the claim: "
    alt += f"{min(ratios):.3g} to {max(ratios):.3g} times."
    return Figure("Variance by pair", alt, page_svg(sheet, "variance"))


def _claimed_curve(axis: Any, log_u: Tensor, curve: Tensor) -> None:
    axis.plot(log_u, curve, color=CLAIMED, linewidth=4.5, alpha=0.55, label="claimed")


def _rows(count: int) -> tuple[Any, Any, list[int]]:
    """A sheet with a logarithmic axis and one row per pair."""
    sheet, axis = new_sheet()
    rows = list(range(1, count + 1))
    axis.set_xscale("log")
    axis.set_yticks(rows, [str(row) for row in rows])
    axis.set_ylim(count + 0.6, 0.4)
    axis.tick_params(axis="y", length=0)
    return sheet, axis, rows


def _heights(axis: Any, values: list[Tensor], zero: bool = False) -> None:
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if high - low < _ROUNDING:
        low, high = -1.0, 1.0
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    middle, half = (low + high) / 2, _HEADROOM * (high - low) / 2
    axis.set_ylim(middle - half, middle + half)
