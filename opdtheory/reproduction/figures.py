"""The figures of the experiment's page, from its rows alone."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdtheory.errors import InvalidArgumentError
from opdtheory.reproduction.summary import Summary

__all__ = ["FIGURES", "write_figures"]

_LINES = {
    "opd": ("tab:red", "-"),
    "opd_plus": ("tab:blue", "-"),
    "opd_plus, optimal baseline": ("tab:cyan", "-"),
    "top 4 and tail": ("tab:green", "-"),
    "full_vocab": ("0.35", "--"),
}
_COLOURS = {"collapses": "tab:red", "trains": "tab:blue", "stays": "0.4", "declines": "tab:orange", "mixed": "0.4"}
_DPI = 110


def write_figures(table: Sequence[Summary], folder: Path) -> list[tuple[Path, str]]:
    """Draw every figure for which there are rows, and return the files and their captions.

    Raises:
        InvalidArgumentError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        raise InvalidArgumentError("page", 'figures need matplotlib: pip install "opdtheory[plots]"') from None
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # Not pyplot: no global state, and no display.
    with matplotlib.rc_context({"font.size": 8}):
        for name, (draw, caption) in FIGURES.items():
            sheet = draw(figure, table)
            if sheet is None:
                continue
            buffer = io.BytesIO()
            sheet.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
            path = folder / f"reproduction_{name}.png"
            path.write_bytes(buffer.getvalue())
            written.append((path, caption))
    return written


def _accuracy(figure: Any, table: Sequence[Summary]) -> Any:
    tasks = _tasks(table)
    names = list(dict.fromkeys(each.name for each in table))
    sheet = figure(figsize=(4.2 * len(tasks) + 2, 0.21 * len(names) + 0.9), layout="constrained")
    axes = sheet.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        mine = {each.name: each for each in table if each.task == task}
        starts = [each.start.mean for each in mine.values() if each.start is not None]
        if starts:
            axis.axvline(sum(starts) / len(starts), color="0.6", linewidth=0.8, zorder=0)
        for place, name in enumerate(names):
            share = mine[name].sampled if name in mine else None
            if share is None:
                continue
            colour = _COLOURS.get(mine[name].word, "0.4")
            axis.plot((share.low, share.high), (place, place), color=colour, linewidth=1)
            axis.plot(share.seeds, [place] * len(share.seeds), "o", color=colour, markersize=3, alpha=0.6)
        axis.set_title(f"{task}: sampled accuracy on the test problems")
        axis.set_xlim(-0.02, 1.02)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
    return sheet


def _curves(measure: str, label: str, logarithmic: bool) -> Callable[[Any, Sequence[Summary]], Any]:
    def draw(figure: Any, table: Sequence[Summary]) -> Any:
        grid = [each for each in table if each.form in _LINES]
        if not grid:
            return None
        tasks = _tasks(grid)
        divergences = list(dict.fromkeys(each.arm.fields["divergence"] for each in grid))
        size = (2.1 * len(divergences) + 0.8, 1.9 * len(tasks) + 0.5)
        sheet = figure(figsize=size, layout="constrained")
        axes = sheet.subplots(len(tasks), len(divergences), sharex=True, sharey="row", squeeze=False)
        for row, task in zip(axes, tasks, strict=True):
            for axis, divergence in zip(row, divergences, strict=True):
                for each in grid:
                    if (each.task, each.arm.fields["divergence"]) == (task, divergence):
                        _lines(axis, each.rows, measure, each.form)
                axis.set_title(f"{task}, {divergence}", fontsize=8)
                if logarithmic:
                    axis.set_yscale("log")
            row[0].set_ylabel(label)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        handles, labels = axes[0][0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes[0][0].legend(unique.values(), unique.keys(), fontsize=7)
        return sheet

    return draw


def _lines(axis: Any, rows: Sequence[Mapping[str, Any]], measure: str, form: str) -> None:
    colour, style = _LINES[form]
    for row in rows:
        values = [float("nan") if value is None else value for value in row["curve"][measure]]
        axis.plot(row["curve"]["step"], values, style, color=colour, linewidth=0.9, alpha=0.8, label=form)


def _tasks(table: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(each.task for each in table))


FIGURES: dict[str, tuple[Callable[[Any, Sequence[Summary]], Any], str]] = {
    "accuracy": (
        _accuracy,
        "Sampled accuracy at the end, a point for each seed, with the 95 % interval of the mean; the line is the "
        "students' start. Blue: trains, red: collapses, orange: declines.",
    ),
    "distance": (
        _curves("reverse_kl", "KL(p|q), nats a token", True),
        "The student's distance from the teacher on the student's own prefixes while it trains, a line for each seed.",
    ),
    "training": (
        _curves("sampled_accuracy", "sampled accuracy", False),
        "The share of right answers among the 128 rollouts of a step, a line for each seed.",
    ),
}
