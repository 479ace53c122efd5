"""`opdtheory train`: one option for every field of `TrainConfig`; options override a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from opdtheory.commands.console import FAILS, HOLDS, complain
from opdtheory.commands.fields import add_fields
from opdtheory.rendering import text
from opdtheory.training.config import TrainConfig

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.training.run import TrainResult

__all__ = ["add_parser", "run"]

_COLUMNS = ("step", "greedy", "95 %", "sampled", "95 %", "KL(p|q)", "KL(q|p)", "entropy")


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="distil a teacher into a small language model with any estimator",
        description="Train a student on its own samples, scored by a teacher. The value none unsets an option.",
        epilog="exit status: 0 when the run is finished, 1 if a step fails, 2 for a wrong option",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of fields; options override it")
    parser.add_argument("--json", action="store_true", help="print the run as JSON")
    # Without an option, the field comes from the file or has its default.
    add_fields(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, print the evaluations, and return the exit status."""
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    overrides = {name: value for name, value in vars(options).items() if name in fields}
    if options.config is None:
        config = TrainConfig.from_dict(overrides)
    else:
        config = TrainConfig.from_toml(options.config, **overrides)
    from opdtheory.training.trainer import train

    try:
        result = train(config)
    except KeyboardInterrupt:
        resume = "" if config.out is None else "; the same command resumes from the last checkpoint"
        complain(options, f"stopped{resume}")
        return FAILS
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(to_dict(result), indent=2) if options.json else as_text(result))
    return HOLDS


def to_dict(result: TrainResult) -> dict[str, Any]:
    """A run as JSON values: its configuration, its loss with the claim, the evaluations and the last step."""
    return {
        "config": result.config.to_dict(),
        "loss": repr(result.config.loss()),
        "claim": result.config.loss().claim.to_dict(),
        "evaluations": result.evaluations,
        "last": result.rows[-1] if result.rows else None,
    }


def as_text(result: TrainResult) -> str:
    """The loss, its claim, and the evaluations as a table; distances are in nats per token."""
    lines = [repr(result.config.loss()), f"claim: {result.config.loss().claim}", ""]
    rows = [_COLUMNS, *(_cells(row) for row in result.evaluations)]
    lines += text.table(rows, align="r")
    if result.config.out is not None:
        lines += ["", f"metrics, checkpoints and configuration are in {result.config.out}"]
    return "\n".join(lines)


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
