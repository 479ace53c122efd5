"""`opdtheory reproduce`: train every arm of the experiment and write its page."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from opdtheory.commands.console import FAILS, HOLDS, aside, complain, console
from opdtheory.reproduction.plan import PLANS, plan_of

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "reproduce",
        help="train every arm of the experiment and write the page of what reproduces",
        description="Run every arm of the experiment in its own process, and write the page. Finished arms are kept: "
        "the same command resumes a stopped run.",
        epilog="exit status: 0 if every arm has a row, 1 if an arm has none, 2 for a wrong option",
    )
    parser.add_argument(
        "--plan", choices=tuple(PLANS), default="full", help="which arms are run; smollm2 takes a GPU some ten minutes"
    )
    parser.add_argument(
        "--quick", action="store_const", dest="plan", const="quick", help="the plan of fewer steps, seeds and arms"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reports/reproduction"), metavar="DIR", help="folder of the rows"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="page to write (default: reproduction.md in the folder)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of processes at a time (default: the plan's, else one per core)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="number of seeds (default: the plan's)")
    parser.add_argument("--steps", type=int, metavar="N", help="number of steps of each arm (default: the plan's)")
    parser.add_argument("--task", action="append", metavar="NAME", help="run only this task; may be repeated")
    parser.add_argument("--device", default="auto", metavar="NAME", help="device of the arms")
    parser.add_argument("--cache", metavar="DIR", help="folder of trained teachers and students")
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="FILE",
        help="reuse the rows of another page (its .jsonl) if arm and models are the same",
    )
    parser.add_argument("--no-run", action="store_true", help="only write the page, from the existing rows")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the experiment, write its page, and return the exit status."""
    from opdtheory.reproduction.runner import NOT_RUN, adopt, reproduce, stored

    try:
        plan = plan_of(options.plan, seeds=options.seeds, steps=options.steps, tasks=options.task)
        if options.adopt is not None:
            print(f"{adopt(options.adopt, options.out)} rows adopted", file=sys.stderr)
        if options.no_run:
            outcome = stored(plan, options.out, cache=options.cache)
        else:
            with _terminated_like_interrupted():
                outcome = reproduce(
                    plan,
                    options.out,
                    workers=options.workers,
                    cache=options.cache,
                    device=options.device,
                    report=lambda line: print(line, file=sys.stderr, flush=True),
                )
    except KeyboardInterrupt:
        complain(options, "stopped; the same command runs the arms that are missing")
        return FAILS
    if not outcome.rows:
        complain(options, "there is no row to write a page from")
        return FAILS
    from opdtheory.reproduction.claims import as_table
    from opdtheory.reproduction.page import write_page
    from opdtheory.reproduction.summary import summaries

    table = summaries(outcome.rows)
    if options.json:
        print(json.dumps([each.to_dict() for each in table], indent=2))
    else:
        as_table(table).show(console())
    path = write_page(outcome, options.page or options.out / "reproduction.md")
    aside(options, f"wrote {path}")
    for name, reason in outcome.missing.items():
        if reason != NOT_RUN:
            print(f"{name}: {reason}", file=sys.stderr)
    return FAILS if outcome.missing and not options.no_run else HOLDS


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """End the processes on SIGTERM as Ctrl-C does; only the main thread can set the handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
