"""What a run tells while it goes on: of models in the making and of its steps, as bars or as a line now and then."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol

from opdtheory.training.config import TrainConfig
from opdtheory.training.pairs import Recipe

__all__ = ["Bars", "Display", "Lines", "Silent", "StepsOnly", "display_on", "plan"]

Report = Callable[[int, float], None]
Show = Callable[[Mapping[str, Any]], None]

# Metrics by importance, with the words of the table at the end of a run, and how many digits are read.
_SHOWN = (
    ("reverse_kl", "KL(p|q) {:.3f}"),
    ("sampled_accuracy", "sampled {:.3f}"),
    ("greedy_accuracy", "greedy {:.3f}"),
    ("gradient_norm", "gradient {:.2g}"),
    ("response_length", "length {:.1f}"),
    ("clip_fraction", "clipped {:.1%}"),
)

# Seconds between lines in a log, and between lines of evaluations; the widths of a bar, and of the time that is left.
_EVERY, _EVALUATED = 20.0, 3.0
_NARROWEST, _WIDEST, _TIME = 8, 40, 8
_LOG_WIDTH = 96


class Display(Protocol):
    """What `train` tells of a run while it goes on."""

    def say(self, words: str) -> None:
        """Tell something in a sentence or two."""

    def making(self, recipe: Recipe, path: Path) -> AbstractContextManager[Report]:
        """While a model is made that the cache lacks; each step is told by its number and loss."""

    def training(self, config: TrainConfig, first: int) -> AbstractContextManager[Show]:
        """While a run trains from step `first` on; each row of its metrics is told."""


class Silent:
    """Tells nothing."""

    def say(self, words: str) -> None:
        """Say nothing."""

    @contextlib.contextmanager
    def making(self, recipe: Recipe, path: Path) -> Iterator[Report]:
        """Show nothing."""
        yield lambda step, loss: None

    @contextlib.contextmanager
    def training(self, config: TrainConfig, first: int) -> Iterator[Show]:
        """Show nothing."""
        yield lambda row: None


class Lines:
    """Plain lines on a stream, for logs and pipes: what is made, and how far it is, every 20 seconds at most.

    Args:
        stream: where the lines go.
        clock: the time in seconds.
    """

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._last = clock()

    def say(self, words: str) -> None:
        """Write a paragraph."""
        self._write(textwrap.fill(words, _LOG_WIDTH, break_long_words=False, break_on_hyphens=False))

    @contextlib.contextmanager
    def making(self, recipe: Recipe, path: Path) -> Iterator[Report]:
        """Announce the model, then tell of its steps."""
        self.say(_announcement(recipe, path))
        began = self._clock()

        def report(step: int, loss: float) -> None:
            if self._is_time(_EVERY):
                left = _left(self._clock() - began, step, recipe.steps - step)
                self._write(f"  {recipe.role}: step {step:,} of {recipe.steps:,}, loss {loss:.3f}{left}")

        yield report
        self._write(f"  {recipe.role}: made in {_duration(self._clock() - began)}")

    @contextlib.contextmanager
    def training(self, config: TrainConfig, first: int) -> Iterator[Show]:
        """Tell of steps and evaluations."""
        began, seen = self._clock(), dict[str, Any]()

        def show(row: Mapping[str, Any]) -> None:
            seen.update(row)
            step, evaluated = row["step"], "greedy_accuracy" in row
            if step == config.steps or self._is_time(_EVALUATED if evaluated else _EVERY):
                left = _left(self._clock() - began, step - first, config.steps - step)
                words = ", ".join(_metrics(seen))
                self._write(f"  step {step:,} of {config.steps:,}{': ' if words else ''}{words}{left}")

        yield show

    def _is_time(self, apart: float) -> bool:
        return self._clock() - self._last >= apart

    def _write(self, line: str) -> None:
        self._last = self._clock()
        print(line, file=self._stream, flush=True)


class Bars:
    """Bars on a terminal, each in one line of any width from 40 columns on.

    Args:
        console: a rich console.
    """

    def __init__(self, console: Any) -> None:
        self._console = console

    def say(self, words: str) -> None:
        """Print a paragraph."""
        from rich.text import Text

        self._console.print(Text(words))

    @contextlib.contextmanager
    def making(self, recipe: Recipe, path: Path) -> Iterator[Report]:
        """Announce the model, and show a bar until it is made."""
        self.say(_announcement(recipe, path))
        with self._bar(recipe.role, 0, recipe.steps) as update:
            yield lambda step, loss: update(step, [f"loss {loss:.3f}"])

    @contextlib.contextmanager
    def training(self, config: TrainConfig, first: int) -> Iterator[Show]:
        """Show a bar with the latest metrics, as many as the terminal is wide for."""
        seen = dict[str, Any]()
        with self._bar("training", first, config.steps) as update:

            def show(row: Mapping[str, Any]) -> None:
                seen.update(row)
                update(row["step"], _metrics(seen))

            yield show

    @contextlib.contextmanager
    def _bar(self, name: str, done: int, total: int) -> Iterator[Callable[[int, list[str]], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        line = BarColumn(bar_width=_NARROWEST)
        columns = (TextColumn("{task.description}"), line, MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns, TextColumn("{task.fields[words]}", markup=False), console=self._console)
        task = bar.add_task(name, total=total, completed=done, words="")
        # What stands beside the bar and the metrics, with a space after each.
        beside = len(name) + 2 * len(str(total)) + 1 + _TIME + 4

        def update(step: int, words: list[str]) -> None:
            kept = _fitting(words, self._console.width - beside - _NARROWEST)
            line.bar_width = max(1, min(_WIDEST, self._console.width - beside - len(kept)))
            bar.update(task, completed=step, words=kept)

        update(done, [])
        with bar:
            yield update


class StepsOnly(Silent):
    """What the library shows on its own: a bar of the steps, if standard error is a terminal and rich is installed."""

    @contextlib.contextmanager
    def training(self, config: TrainConfig, first: int) -> Iterator[Show]:
        """Show a bar, or nothing."""
        import sys

        shown = display_on(sys.stderr)
        with shown.training(config, first) if isinstance(shown, Bars) else super().training(config, first) as show:
            yield show


def display_on(stream: IO[str]) -> Display:
    """Bars if the stream is a terminal and rich is installed, else lines."""
    if stream.isatty():
        try:
            from rich.console import Console
        except ImportError:
            return Lines(stream)
        return Bars(Console(file=stream))
    return Lines(stream)


def plan(config: TrainConfig) -> str:
    """What a run will do, in a few sentences."""
    loss = config.loss()
    per_step = f"{config.prompts_per_step:,} prompts"
    if config.rollouts_per_prompt > 1:
        per_step += f", {config.rollouts_per_prompt} rollouts each"
    whose = [
        f"student {config.student}" if config.student else "",
        f"teacher {config.teacher}" if config.teacher else "",
    ]
    named = "".join(f", {each}" for each in whose if each)
    evaluated = "there is no evaluation"
    if config.eval_examples:
        often = f", every {config.eval_every} steps" if 0 < config.eval_every < config.steps else ""
        evaluated = f"{config.eval_examples:,} test problems are answered at the start{often} and at the end"
    kept = "nothing is kept (--out FOLDER keeps the run)" if config.out is None else f"the run is kept in {config.out}"
    return (
        f"Training with {loss.label} on {config.task}{named}: {_count(config.steps, 'step')} of {per_step}, with a "
        f"warm-up of {config.warmup_steps}, learning rate {config.learning_rate:g}, seed {config.seed}; "
        f"{evaluated}; {kept}."
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _announcement(recipe: Recipe, path: Path) -> str:
    kind = f"the {recipe.role} of {recipe.task}" + (f" (seed {recipe.seed})" if recipe.seed else "")
    most = "at most " if recipe.target is not None else ""
    return (
        f"{kind[0].upper()}{kind[1:]} is not in the cache yet, so it is trained first: {most}{recipe.steps:,} steps on "
        f"demonstrations, which takes from seconds to some minutes. It is kept in {path.parent} for all later runs."
    )


def _metrics(row: Mapping[str, Any]) -> list[str]:
    shown = {name: row[name] for name, _ in _SHOWN if row.get(name) is not None}
    if not shown.get("clip_fraction"):  # most estimators have no clip
        shown.pop("clip_fraction", None)
    return [words.format(shown[name]) for name, words in _SHOWN if name in shown]


def _fitting(words: list[str], room: int) -> str:
    """As many of the first words as there is room for."""
    kept = ""
    for each in words:
        longer = f"{kept}  {each}" if kept else each
        if len(longer) > room:
            break
        kept = longer
    return kept


def _left(elapsed: float, done: int, to_do: int) -> str:
    """How long the rest takes if it goes on like this; nothing where nothing is done yet, or all is."""
    return f", about {_duration(elapsed / done * to_do)} left" if done > 0 and to_do > 0 else ""


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
