"""What a run tells: bars that fit their terminal, lines that are few, and nothing where nothing is asked."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import opdtheory as opd
from opdtheory.training import loading, progress
from opdtheory.training.progress import Bars, Lines, display_on
from tests.training.recipes import TINY
from tests.training.runs import SMALL, TASK, untrained

ROW = {
    "step": 0,
    "reverse_kl": 0.5479,
    "sampled_accuracy": 0.1679,
    "greedy_accuracy": 0.5351,
    "gradient_norm": 11.25,
    "response_length": 30.9,
    "clip_fraction": 0.0123,
}
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(width: int, steps: int, rows: int = 3) -> list[str]:
    """What stands on the line of a bar, one after the other."""
    console = pytest.importorskip("rich.console")
    out = io.StringIO()
    display = Bars(console.Console(file=out, force_terminal=True, width=width, legacy_windows=False))
    with display.training(opd.TrainConfig(divergence="jsd", steps=steps), 0) as show:
        for number in range(rows):
            show({**ROW, "step": number * steps // rows})
            time_passes(display)
    return [line for line in re.split(r"[\r\n]+", ANSI.sub("", out.getvalue())) if line.strip()]


def time_passes(display: Bars) -> None:
    """The bar is drawn now, and not when its own thread is next awake."""
    live = display._console._live_stack[-1] if hasattr(display._console, "_live_stack") else display._console._live
    live.refresh()


def problems(lines: list[str], width: int) -> list[str]:
    """Lines that are wider than the terminal, or in which something is cut."""
    return [line for line in lines if len(line.rstrip()) > width or "…" in line or "training" not in line]


@pytest.mark.parametrize("steps", [5, 200, 100_000])
@pytest.mark.parametrize(
    ("width", "words"), [(40, ""), (60, "KL(p|q) 0.548"), (80, "sampled 0.168"), (120, "length 30.9")]
)
def test_a_bar_is_one_whole_line_at_every_width(width: int, words: str, steps: int) -> None:
    lines = shown(width, steps)
    assert problems(lines, width) == []
    assert width == 60 and steps == 100_000 or words in lines[-1]


def test_what_is_too_wide_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all metrics on the bar, as if there were room, they are cut."""
    monkeypatch.setattr(progress, "_fitting", lambda words, room: "  ".join(words))
    assert problems(shown(80, 200), 80) != [] and problems(shown(160, 200), 160) == []


class Clock:
    """A time that goes on by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_are_few_and_say_how_long_it_takes(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    lines = Lines(out, clock)
    with lines.making(dataclasses.replace(TINY, steps=100), tmp_path / "model.safetensors") as report:
        for step in range(1, 101):
            clock.now += 0.5
            report(step, 1.5)
    with lines.training(opd.TrainConfig(divergence="jsd", steps=400), 0) as show:
        show({"step": 0, "greedy_accuracy": 0.25})
        for step in range(1, 401):
            clock.now += 0.1
            show({**ROW, "step": step})  # an evaluation at each step is no reason for a line at each
    said = out.getvalue().splitlines()
    assert str(tmp_path) in " ".join(said[:3]) and "is not in the cache yet" in said[0]
    told = [line for line in said if "step " in line and "greedy" not in line]
    assert len(told) == 2 and "loss 1.500, about" in told[0]
    steps = [line for line in said if "greedy" in line]
    assert 10 <= len(steps) <= 15
    assert "step 400 of 400: KL(p|q) 0.548, sampled 0.168" in steps[-1] and "left" not in steps[-1]
    assert max(map(len, said)) <= 120
    first = re.search(r"step (\d+) of 400.*about (\d+) s left", steps[0])
    assert first is not None and int(first[2]) == pytest.approx((400 - int(first[1])) * 0.1, abs=0.5)


def test_a_stream_that_is_no_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(display_on(io.StringIO()), Lines)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    pytest.importorskip("rich")
    assert isinstance(display_on(terminal), Bars)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert isinstance(display_on(terminal), Lines)


class Heard:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.rows: list[Any] = []

    def say(self, words: str) -> None:
        self.words.append(words)

    @contextlib.contextmanager
    def making(self, recipe: Any, path: Path) -> Iterator[Any]:
        self.words.append(f"{recipe.role} into {path.parent}")
        yield lambda step, loss: self.rows.append((recipe.role, step))

    @contextlib.contextmanager
    def training(self, config: Any, first: int) -> Iterator[Any]:
        self.words.append(f"from {first}")
        yield lambda row: self.rows.append(row["step"])


def tiny_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_pair(task: Any, seed: int, *, cache: Any, making: Any) -> Any:
        with making(TINY, Path("cache") / "model") as report:
            report(1, 2.0)
        return untrained(task, 0), untrained(task, 1)

    monkeypatch.setattr(loading, "load_pair", load_pair)


def test_a_display_is_told_of_models_and_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_pairs(monkeypatch)
    heard, config = Heard(), opd.TrainConfig(**SMALL, divergence="jsd", out=str(tmp_path)).replace(steps=3)
    opd.train(config, task=TASK, display=heard)
    assert heard.words[0].startswith("Training with opd_plus(jsd")
    assert heard.words[1:] == [f"{TINY.role} into cache", "from 0"]
    assert heard.rows == [(TINY.role, 1), 1, 2, 3]
    opd.train(config, task=TASK, display=heard)  # it is finished, so no bar is shown
    assert heard.words[-2:] == [f"{TINY.role} into cache", f"{tmp_path} holds this run up to step 3 of 3."]


def test_the_library_is_silent_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pairs(monkeypatch)
    config = opd.TrainConfig(**SMALL, divergence="jsd").replace(steps=2, progress=True)
    opd.train(config, task=TASK)
    assert capsys.readouterr() == ("", "")
    opd.train(config, task=TASK, display=display_on(sys.stderr))
    assert "is not in the cache yet" in capsys.readouterr().err
