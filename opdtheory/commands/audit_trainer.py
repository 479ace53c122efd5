"""`opdtheory audit-trainer`: find out what a whole trainer descends."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdtheory.choices import CLAIMED_REDUCTIONS, GRANULARITIES, HISTORIES, METHODS
from opdtheory.commands.console import FAILS, HOLDS, aside, output_apart
from opdtheory.commands.targets import failure, find, importable
from opdtheory.errors import OpdTheoryError

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.end_to_end import TrainerAudit

__all__ = ["add_parser", "run"]

_SETTINGS = (
    *("objective", "granularity", "batch_size", "accumulate", "prompts", "horizon", "reduction", "histories"),
    *("variants", "method", "tolerance", "seed"),
)


def _texts(text: str) -> tuple[str, ...]:
    return tuple(each for each in text.split(",") if each)


_texts.__name__ = "text,..."  # for the message of argparse


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "audit-trainer",
        help="find out what a whole trainer descends",
        description="Audit build(pair) -> transformers.Trainer, or update(pair, prompts, answers), which leaves a "
        "gradient in pair.student; named as PATH.py:FUNCTION or package.module:FUNCTION, which run as Python code. "
        "Needs transformers and datasets (extra trainers).",
        epilog="exit status: 0 if the trainer descends its claim up to a scale, 1 if not, 2 if it cannot be found, "
        "imported, run, played or written",
    )
    parser.add_argument("build", metavar="BUILD", help="PATH.py:FUNCTION or package.module:FUNCTION")
    parser.add_argument(
        "--objective", default="reverse_kl", metavar="NAME", help="claimed divergence (default: reverse_kl)"
    )
    parser.add_argument(
        "--granularity", default="token_local", choices=GRANULARITIES, help="claimed granularity (default: token_local)"
    )
    parser.add_argument("--batch-size", default=2, type=int, metavar="B", help="rollouts scored at once (default: 2)")
    parser.add_argument("--accumulate", default=1, type=int, metavar="N", help="batches in a step (default: 1)")
    parser.add_argument(
        "--prompts", default=("a", "ba"), type=_texts, metavar="A,B", help="prompts of letters a and b (default: a,ba)"
    )
    parser.add_argument("--horizon", default=2, type=int, metavar="T", help="largest length of an answer (default: 2)")
    parser.add_argument(
        "--reduction", default="token_sum", choices=CLAIMED_REDUCTIONS, help="claimed reduction (default: token_sum)"
    )
    parser.add_argument(
        "--histories", default="student", choices=HISTORIES, help="whose histories are meant (default: student)"
    )
    parser.add_argument(
        "--variants", default=True, action=argparse.BooleanOptionalAction, help="ask other settings too (default: yes)"
    )
    parser.add_argument(
        "--method", default="auto", choices=METHODS, help="play all outcomes or sample steps (default: auto)"
    )
    parser.add_argument(
        "--tolerance", default=1e-6, type=float, metavar="R", help="error that counts as rounding (default: 1e-06)"
    )
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="seed of the tables (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the audit as JSON, and nothing else")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the audit as a self-contained HTML page")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of what fails")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit the trainer and return the exit status."""
    with output_apart(options.json):
        report = _audited(options)
    if options.html is not None:
        from opdtheory.end_to_end.page import write_trainer_audit

        write_trainer_audit(report, options.html)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    if options.html is not None:
        aside(options, f"wrote {options.html}")
    return HOLDS if report.passes else FAILS


def _audited(options: argparse.Namespace) -> TrainerAudit:
    """The audit of what the options name: of a trainer, or of an update if it takes three arguments."""
    from opdtheory.end_to_end import audit_trainer, audit_update

    target = find(options.build)
    settings: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS}
    is_update = len(inspect.signature(target.function).parameters) >= 3
    if is_update:
        del settings["histories"]
    audit: Any = audit_update if is_update else audit_trainer
    try:
        with importable(target.folder, target.stem):
            found: TrainerAudit = audit(target.function, name=options.build, **settings)
    except (KeyboardInterrupt, OpdTheoryError):
        raise
    except BaseException as error:
        raise failure(f"{options.build} cannot be audited", error, target.file) from error
    return found
