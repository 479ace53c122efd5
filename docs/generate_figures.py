"""Write docs/figures/weights.svg, the picture of README and home page: `python docs/generate_figures.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from opdtheory import divergences
from opdtheory.rendering.figures import BAD, FOUND, INK, MUTED, drawing, picture

PATH = Path(__file__).parent / "figures" / "weights.svg"
_PANELS = (("reverse_kl", "reverse KL"), ("jsd", "JSD"), ("forward_kl", "forward KL"))


def main() -> None:
    """Draw the figure and write it."""
    PATH.write_text(drawn(), encoding="utf-8")
    print(f"wrote {PATH.name}")


def drawn() -> str:
    """The weight of a token in OPD, -f(u), beside that of OPD+, u f'(u) - f(u), and where the former falls."""
    with drawing():
        sheet = Figure(figsize=(9.6, 3.3))
        sheet.patch.set_alpha(0.0)
        sheet.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.78, wspace=0.16)
        axes = sheet.subplots(1, len(_PANELS), sharex=True, sharey=True)
        for axis, (name, title) in zip(axes, _PANELS, strict=True):
            _panel(axis, divergences.divergence(name), title)
        lines = [axes[1].lines[0], axes[1].lines[1], axes[1].collections[0]]
        words = ["OPD+: u f′(u) − f(u)", "OPD, the gradient stopped: −f(u)", "where the weight of OPD falls"]
        sheet.legend(lines, words, loc="upper center", ncols=3)
        return picture(sheet)


def _panel(axis: Any, divergence: divergences.Divergence, title: str) -> None:
    log_u = torch.linspace(-2.5, 2.5, 301, dtype=torch.float64)
    at_one = torch.zeros((), dtype=torch.float64)
    corrected = divergence.weight(log_u) - divergence.weight(at_one)
    stopped = -divergence.generator(log_u)
    axis.plot(log_u, corrected, color=FOUND)
    axis.plot(log_u, stopped, color=BAD, linestyle=(0, (4, 1.5)))
    falls = torch.zeros_like(log_u, dtype=torch.bool)
    falls[1:] = stopped.diff() < -1e-12
    axis.fill_between(log_u, -3, 3, where=falls, color=BAD, alpha=0.1, linewidth=0.0)
    axis.axvline(0.0, color=MUTED, linewidth=0.6)
    axis.axhline(0.0, color=MUTED, linewidth=0.6)
    axis.patch.set_alpha(0.0)
    axis.set(
        xlim=(-2.5, 2.5),
        ylim=(-3, 3),
        xticks=[-2, -1, 0, 1, 2],
        yticks=[-2, 0, 2],
        xlabel="log u, u = teacher / student",
    )
    axis.set_title(title, color=INK, fontsize=11)


if __name__ == "__main__":
    main()
