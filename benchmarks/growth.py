"""The growth of time and memory with vocabulary, tokens and horizon: a log-log figure and the exponents.

`python benchmarks/growth.py --write docs/performance.md` draws `figures/growth.svg` beside the page and puts the
exponents into it. Every point is the median of repeats that take turns; memory is the peak beyond what was there.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from benchmarks.fused import fresh, fused, logits, trl  # noqa: E402
from benchmarks.measure import slope, write  # noqa: E402
from opdtheory.machine import Run, in_turn, machine, peak  # noqa: E402

# Divergences of different cost: the cheapest form, the most expensive one, and TRL's own.
SHOWN = ("total_variation", "jsd", "skew_reverse_kl(lam=0.1)")
# Points below this, in seconds, are overhead and say nothing about growth.
SHORTEST = 2e-3


@dataclass
class Panel:
    """One axis of growth.

    Attributes:
        title: what is measured.
        label: the axis.
        time: seconds by subject, as points.
        memory: MB by subject, as points.
    """

    title: str
    label: str
    time: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, at: int, subjects: dict[str, Run], repeats: int, before: Run = lambda: None) -> None:
        """The subjects at one point of the axis."""
        for name, took in in_turn(subjects, repeats, before).items():
            self.time.setdefault(name, []).append((at, took))
        for name, run in subjects.items():
            before()
            self.memory.setdefault(name, []).append((at, peak(run)))

    def exponents(self) -> list[str]:
        """A row for each subject: the exponents of time and memory over the larger half of the points."""
        rows = []
        for name, points in self.time.items():
            long = [point for point in points if point[1] > SHORTEST]
            large = [(at, mb) for at, mb in self.memory[name] if mb > 8.0]
            powers = [f"{slope(found):.2f}" if len(found) > 2 else "too small" for found in (long, large)]
            rows.append(f"| {self.title} | {name} | {self.label} | {powers[0]} | {powers[1]} |")
        return rows


def losses(shapes: list[tuple[int, int]], axis: int, label: str, repeats: int) -> Panel:
    """Whole-vocabulary losses by tokens or by vocabulary."""
    panel = Panel("whole-vocabulary losses", label)
    for shape in shapes:
        student, teacher = logits(*shape)
        subjects = {f"`{name}`": fused(student, teacher, name) for name in SHOWN} | {"TRL, JSD": trl(student, teacher)}
        panel.add(shape[axis], subjects, repeats, fresh(student))
    return panel


def batches(sizes: list[int], repeats: int) -> Panel:
    """A sampled estimator by the number of rollouts, gradient included."""
    panel = Panel("sampled estimators", "rollouts")
    from opdtheory.exact.sampling import Sampler

    sampler = Sampler.build(*opd.random_pair(8, 4, seed=0))
    for size in sizes:
        sample = sampler.draw(size, torch.Generator().manual_seed(0))

        def descend(estimator: opd.Estimator, sample=sample) -> None:  # noqa: ANN001
            torch.autograd.grad(estimator(sample.rollouts), sample.rollouts.student_logits, retain_graph=True)

        subjects: dict[str, Run] = {
            "OPD+, JSD": lambda: descend(opd.estimator("opd_plus", "jsd")),
            "return-to-go, JSD": lambda: descend(opd.estimator("return_to_go", "jsd", gamma=1.0)),
            "whole vocabulary, JSD": lambda: descend(opd.estimator("full_vocab", "jsd")),
        }
        panel.add(size, subjects, repeats)
    return panel


def trees(horizons: list[int], repeats: int) -> Panel:
    """The oracle on trees of four tokens, by the number of sequences."""
    panel = Panel("the oracle on a tree", "sequences")
    for horizon in horizons:
        pair = opd.random_pair(4, horizon, seed=0)
        subjects: dict[str, Run] = {
            f"`{name}` {objective}": lambda n=name, o=objective, pair=pair: opd.exact_gradient(*pair, n, o)
            for name, objective in (("reverse_kl", "token_local"), ("jsd", "token_return"), ("chi2", "sequence"))
        }
        panel.add(4**horizon, subjects, repeats)
    return panel


def chains(horizons: list[int], repeats: int) -> Panel:
    """The oracle on chains of sixteen tokens, by the horizon."""
    panel = Panel("the oracle on a chain", "horizon")
    d = opd.divergence("jsd")
    for horizon in horizons:
        pair = [opd.MarkovPolicy.random(16, horizon, seed=s) for s in (0, 1)]
        subjects: dict[str, Run] = {
            "`jsd` token_return": lambda pair=pair: opd.exact_gradient(*pair, d, "token_return"),
            "`hellinger` sequence": lambda pair=pair: opd.exact_gradient(*pair, "hellinger", "sequence"),
            "`rollout_moments`": lambda pair=pair: opd.rollout_moments(*pair, d.weight, d.generator),
        }
        panel.add(horizon, subjects, repeats)
    return panel


def draw(panels: list[Panel], path: Path) -> None:
    """Time above, memory below, a column for each axis."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "growth", "font.size": 8}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(panels), figsize=(3.0 * len(panels), 5.6), layout="constrained")
    for column, panel in zip(axes.T, panels, strict=True):
        for axis, what, unit in zip(column, (panel.time, panel.memory), ("seconds", "MB"), strict=True):
            for name, points in what.items():
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name.replace("`", "")
                )
            axis.set(xscale="log", yscale="log", ylabel=unit)
            axis.grid(alpha=0.3)
        column[0].set_title(panel.title)
        column[0].legend(fontsize=6)
        column[1].set_xlabel(panel.label)
        column[1].set_ylim(bottom=0.1)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--small", action="store_true", help="the first three points of each axis, to see that it runs")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="draw the figure beside this page, and fill it in")
    options = parser.parse_args(arguments)
    last = 3 if options.small else None
    words = [2_374, 9_496, 37_984, 151_936][:last]
    tokens = [4, 16, 64, 256][:last]
    panels = [
        losses([(64, v) for v in words], 1, "vocabulary", options.repeats),
        losses([(n, 37_984) for n in tokens], 0, "tokens", options.repeats),
        batches([100, 1_000, 10_000, 100_000][:last], options.repeats),
        trees([4, 6, 8, 10, 12][:last], options.repeats),
        chains([10, 100, 1_000, 10_000][:last], options.repeats),
    ]
    rows = [row for panel in panels for row in panel.exponents()]
    head = ["| | | axis | time grows with the power | memory with the power |", "|---|---|---|---|---|"]
    text = "\n".join(
        [
            f"On {machine()}, by `python benchmarks/growth.py`; medians of {options.repeats} alternated repeats.",
            f"Powers are fitted to points above {1e3 * SHORTEST:g} ms, and above 8 MB.",
            "",
            "![Time and memory against vocabulary, tokens, rollouts, sequences and horizon](figures/growth.svg)",
            "",
            *head,
            *rows,
        ]
    )
    print(text)
    if options.write:
        draw(panels, options.write.parent / "figures" / "growth.svg")
        write(options.write, "benchmarks/growth.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
