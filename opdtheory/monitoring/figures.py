"""The figures of a diagnosis: where the tokens lie under the weights, the sampler's ratio, the run over its steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.monitoring.report import Diagnosis
from opdtheory.monitoring.sums import EDGE, WIDTH, Sums
from opdtheory.monitoring.weights import Weight
from opdtheory.monitoring.zoo import beside
from opdtheory.rendering.figures import BAD, CLAIMED, FOUND, MUTED, drawing, frame, page_svg, sheet

__all__ = ["Figure", "figures"]

# Bars of a histogram, and the share of the tokens outside its window on either side.
_BARS, _OUTSIDE = 60, 0.002
_SMALLEST_WINDOW = 1.0


class Figure(NamedTuple):
    """One figure: its heading, a description for readers who do not see it, and the `<svg>` element."""

    title: str
    alt: str
    svg: str


def figures(found: Diagnosis) -> list[Figure]:
    """The figures that the evidence allows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with drawing():
        drawn = [_weights(found)]
        if found.evidence.off_policy is not None:
            drawn.append(_ratio(found.evidence.off_policy.ratio))
        if len(found.steps) > 1:
            drawn += [_distance(found), _slopes(found), _noise(found)]
    return drawn


def _weights(found: Diagnosis) -> Figure:
    drawn, axis = sheet()
    low, high = _window(found.sums)
    _bars(axis, found.sums, low, high)
    frame(axis, "log u", "tokens")
    axis.set_yticks([])
    over = axis.twinx()
    over.spines["right"].set_visible(False)
    over.set_yticks([])
    points = torch.linspace(low, high, 400, dtype=torch.float64)
    own = found.setting.weight
    _curve(over, own, points, FOUND, f"weight of {found.loss.name}")
    named = {weight.name: weight for weight in beside(found.loss)}
    better = next((weight for name, weight in named.items() if name.startswith("opd_plus(")), None)
    if better is not None and found.loss.name != "opd_plus":
        _curve(over, better, points, CLAIMED, "weight of opd_plus")
    axis.axvline(0.0, color=MUTED, linewidth=0.8)
    over.legend(loc="upper left", fontsize=9)
    falls = found.setting.measured.falls.value
    alt = f"Histogram of log u from {low:.2g} to {high:.2g} with the weight of {found.loss.label} over it, which falls "
    return Figure("Where the tokens lie", f"{alt}on {100 * falls:.2g} % of the tokens.", page_svg(drawn, "weights"))


def _ratio(ratio: Sums) -> Figure:
    drawn, axis = sheet()
    low, high = _window(ratio)
    _bars(axis, ratio, low, high)
    for bound in (0.5, 2.0):
        axis.axvline(float(torch.tensor(bound).log()), color=CLAIMED, linestyle="--", linewidth=1.4)
    frame(axis, "log p/mu", "tokens")
    axis.set_yticks([])
    alt = f"Histogram of log p/mu from {low:.2g} to {high:.2g}; dashed: ratios of 1/2 and 2."
    return Figure("The student against its sampler", alt, page_svg(drawn, "ratio"))


def _distance(found: Diagnosis) -> Figure:
    return _over_steps(found, "opd/reverse_kl", "nats per token", "Distance from the teacher", "KL(p|q)", low=0.0)


def _slopes(found: Diagnosis) -> Figure:
    return _over_steps(found, "opd/falls", "share of tokens", "Where the weight falls", "share", low=0.0, high=1.02)


def _noise(found: Diagnosis) -> Figure:
    return _over_steps(found, "opd/carried", "effective share", "Tokens that carry a step", "share", logarithmic=True)


def _over_steps(
    found: Diagnosis,
    name: str,
    unit: str,
    title: str,
    what: str,
    low: float | None = None,
    high: float | None = None,
    logarithmic: bool = False,
) -> Figure:
    drawn, axis = sheet()
    numbers = [step.number for step in found.steps]
    values = [step.metrics[name] for step in found.steps]
    axis.plot(numbers, values, color=FOUND)
    if logarithmic:
        axis.set_yscale("log")
    axis.set_ylim(low, high)
    if found.first_warning is not None:
        axis.axvline(found.first_warning, color=BAD, linestyle="--", linewidth=1.4, label="collapse foreseen")
        axis.legend(loc="best", fontsize=9)
    frame(axis, "step", unit)
    alt = f"{what} over {len(numbers)} steps, from {values[0]:.3g} to {values[-1]:.3g}."
    return Figure(title, alt, page_svg(drawn, name.removeprefix("opd/")))


def _window(sums: Sums) -> tuple[float, float]:
    """The part of the axis that holds almost all tokens, and log u = 0."""
    total = sums.total[0]
    share = total.cumsum(0) / total.sum()
    inside = torch.nonzero((share > _OUTSIDE) & (share < 1 - _OUTSIDE)).flatten()
    ends = (int(inside[0]), int(inside[-1])) if len(inside) else (0, len(total) - 1)
    low, high = (-EDGE + WIDTH * (end + 0.5) for end in ends)
    return min(low, -_SMALLEST_WINDOW), max(high, _SMALLEST_WINDOW)


def _bars(axis: Any, sums: Sums, low: float, high: float) -> None:
    edges = torch.linspace(low, high, _BARS + 1, dtype=torch.float64)
    centres = torch.arange(sums.table.shape[-1], dtype=torch.float64) * WIDTH - EDGE + WIDTH / 2
    place = torch.bucketize(centres, edges) - 1
    inside = (place >= 0) & (place < _BARS)
    counts = torch.zeros(_BARS, dtype=torch.float64).index_add_(0, place[inside], sums.total[0][inside])
    # Roots, so that rare tokens show.
    heights, widths, left = counts.sqrt().numpy(), (edges[1:] - edges[:-1]).numpy(), edges[:-1].numpy()
    axis.bar(left, heights, width=widths, align="edge", color=MUTED, alpha=0.45, linewidth=0)


def _curve(axis: Any, weight: Weight, points: Float[Tensor, " X"], colour: str, label: str) -> None:
    """A weight, centred at u = 1 and scaled to the height of the figure."""
    values = weight(points) - weight(torch.zeros(1, dtype=torch.float64))
    inside = points.abs() <= 1.5
    height = float(values[inside].abs().max())
    axis.plot(points, values / max(height, 1e-12), color=colour, label=label)
    axis.set_ylim(-1.7, 1.9)
