"""`opdtheory train`: one option for every field of `TrainConfig`; options override a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdtheory.commands.console import FAILS, HOLDS, complain, console
from opdtheory.commands.fields import add_fields
from opdtheory.rendering.table import Table
from opdtheory.toml import read_toml
from opdtheory.training.config import TrainConfig

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.monitoring import Monitor
    from opdtheory.training.records.outcome import Outcome
    from opdtheory.training.run import Run, TrainResult

__all__ = ["add_parser", "run"]

# Where no divergence is named, and the estimator takes one.
_DIVERGENCE = "reverse_kl"

_COLOURS = {"rose": "green", "fell": "red", "collapsed": "bold red", "unresolved": "yellow"}

_COLUMNS = ("step", "greedy", "95 %", "sampled", "95 %", "KL(p|q)", "KL(q|p)", "entropy")


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="distil a teacher into a small language model with any estimator",
        description="Train a student on its own samples, scored by a teacher. Without options, a small student learns "
        "arithmetic by opd_plus of the reverse KL, which takes minutes on two cores. The value none unsets an option.",
        epilog="exit status: 0 when the run is finished, 1 if a step fails, 2 for a wrong option",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of fields; options override it")
    parser.add_argument("--json", action="store_true", help="print the run as JSON")
    # Without an option, the field comes from the file or has its default.
    add_fields(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Say what will be done, train, print the evaluations and what they say, and return the exit status."""
    config = config_of(options)
    is_first = os.environ.get("RANK", "0") == "0"
    from opdtheory.training.progress import display_on
    from opdtheory.training.trainer import train

    display = display_on(sys.stderr) if config.progress and is_first else None
    watched = _Watched()
    try:
        result = train(config, observers=(watched,), display=display)
    except KeyboardInterrupt:
        resume = "" if config.out is None else "; the same command resumes from the last checkpoint"
        complain(options, f"stopped{resume}")
        return FAILS
    if is_first:
        from opdtheory.training.records.outcome import outcome_of

        outcome = outcome_of(result, watched.monitor)
        if options.json:
            print(json.dumps(to_dict(result) | {"outcome": outcome.to_dict()}, indent=2))
        else:
            _print(result, outcome, console())
    return HOLDS


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The configuration of the options and the file.

    Without a divergence, where one is needed, it is reverse KL; the task's own models, which are small, run on one
    thread, as more would only wait for each other.
    """
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    written = {} if options.config is None else read_toml("config", Path(options.config))
    named = {**written, **given}
    if "divergence" not in named and _needs_a_divergence(named):
        given["divergence"] = _DIVERGENCE
    if not named.keys() & {"threads", "student", "teacher"}:
        given["threads"] = 1
    if options.config is None:
        return TrainConfig.from_dict(given)
    return TrainConfig.from_toml(options.config, **given)


def _needs_a_divergence(named: Mapping[str, Any]) -> bool:
    from opdtheory.estimators.factory import ENTRIES

    control = named.get("control")
    if control not in (None, "none"):
        return bool(control == "exact_opd")
    name = named.get("estimator", TrainConfig.estimator)
    return isinstance(name, str) and name in ENTRIES and ENTRIES[name].nominal is None


class _Watched:
    """An observer that keeps the run's monitor."""

    def __init__(self) -> None:
        self.monitor: Monitor | None = None

    def __call__(self, run: Run, finished: int) -> dict[str, float]:
        """Note the monitor, and add no metric."""
        from opdtheory.monitoring import Monitor

        self.monitor = run.monitor if isinstance(run.monitor, Monitor) else None
        return {}


def to_dict(result: TrainResult) -> dict[str, Any]:
    """A run as JSON values: its configuration, its loss with the claim, the evaluations and the last step."""
    return {
        "config": result.config.to_dict(),
        "loss": repr(result.config.loss()),
        "claim": result.config.loss().claim.to_dict(),
        "evaluations": result.evaluations,
        "last": result.rows[-1] if result.rows else None,
    }


def _print(result: TrainResult, outcome: Outcome, console: Any) -> None:
    """The loss, its claim, the evaluations as a table with distances in nats per token, and what they say."""
    loss = result.config.loss()
    _paragraphs([repr(loss), f"claim: {loss.claim}"], console)
    if result.evaluations:
        print()
        Table([_COLUMNS, *(_cells(row) for row in result.evaluations)], "r").show(console)
    print()
    colours = [_COLOURS[each.word] for each in outcome.changes]
    _paragraphs(outcome.sentences, console, colours)
    if result.config.out is not None:
        print()
        _paragraphs([f"metrics, checkpoints and configuration are in {result.config.out}"], console)


def _paragraphs(sentences: Sequence[str], console: Any, colours: Sequence[str] = ()) -> None:
    """Each sentence in lines of the terminal's width, the first ones in colours."""
    is_terminal = console is not None and console.is_terminal
    for number, sentence in enumerate(sentences):
        if is_terminal:
            console.print(
                sentence, style=colours[number] if number < len(colours) else "", markup=False, highlight=False
            )
        else:
            print(sentence)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def interval(name: str) -> str:
        return f"{row[f'{name}_low']:.3f}-{row[f'{name}_high']:.3f}"

    def number(name: str) -> str:
        return "inf" if row[name] is None else f"{row[name]:.3f}"

    return (
        str(row["step"]),
        *(number("greedy_accuracy"), interval("greedy"), number("test_sampled_accuracy"), interval("test_sampled")),
        *(number(f"test_{name}") for name in ("reverse_kl", "forward_kl", "entropy")),
    )
