"""`opdtheory diagnose`: what the files of a run say of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdtheory.commands.console import FAILS, HOLDS, UsageError, aside, console
from opdtheory.commands.fields import add_fields
from opdtheory.training.config import ESTIMATOR_OPTIONS, TrainConfig

if TYPE_CHECKING:
    from opdtheory.commands.console import Commands
    from opdtheory.monitoring import Diagnosis

__all__ = ["add_parser", "run"]

# As `recommend` has them; no torch here.
_HAVE = ("sampled", "top_k", "vocabulary")
_FIELDS = ("student", "teacher", "behavior", "mask")


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "diagnose",
        help="read a run: why did it collapse, and what to use",
        description="Read the log-probabilities that a run has logged: .jsonl, .jsonl.gz, .json, .parquet, .pt, or "
        "folders of them. The fields of TRL, verl, slime, prime-rl, NeMo-RL, ms-swift, OpenRLHF and of opdtheory train "
        "are recognised. The folder of a run of opdtheory train names its estimator itself.",
        epilog="exit status: 0 if nothing speaks against the run, 1 if there is a warning, 2 if it cannot be read",
    )
    parser.add_argument("paths", nargs="+", metavar="RUN", help="files or folders, read in this order")
    parser.add_argument("--estimator", metavar="NAME", help="the estimator in use (default: opd)")
    parser.add_argument("--divergence", metavar="NAME", help="the divergence that it is for (default: reverse_kl)")
    roles = parser.add_argument_group("fields", "names of the run's fields, where they are not recognised")
    what = ("the student's log-probabilities", "the teacher's", "those of what sampled", "1 on tokens that count")
    for name, text in zip(_FIELDS, what, strict=True):
        roles.add_argument(f"--{name}", metavar="FIELD", help=text)
    parser.add_argument(
        "--together", type=int, default=1, metavar="G", help="rollouts of one prompt, which stand together (default: 1)"
    )
    parser.add_argument(
        "--batch-tokens", type=float, metavar="N", help="tokens of one optimiser step (default: median of the steps)"
    )
    parser.add_argument(
        "--have",
        choices=_HAVE,
        help="what the teacher can send of a token: also rank the estimators that it suffices for",
    )
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON, and nothing else")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the diagnosis as a self-contained HTML page")
    add_fields(parser.add_argument_group("options of the estimator"), ESTIMATOR_OPTIONS, defaults=False)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Diagnose the run and return the exit status."""
    found = _diagnosed(options)
    if options.html is not None:
        from opdtheory.monitoring.page import write_diagnosis

        write_diagnosis(found, options.html)
    from opdtheory.monitoring.terminal import print_diagnosis

    advice = None
    if options.have is not None:
        from opdtheory.monitoring import recommend

        advice = recommend(found, options.have)
    if options.json:
        print(json.dumps(found.to_dict() | ({} if advice is None else {"advice": advice.to_dict()}), indent=2))
    else:
        print_diagnosis(found, console())
        print(*([] if advice is None else ["", advice]), sep="\n", end="" if advice is None else "\n")
    if options.html is not None:
        aside(options, f"wrote {options.html}")
    return FAILS if found.warnings else HOLDS


def _diagnosed(options: argparse.Namespace) -> Diagnosis:
    from opdtheory.monitoring import diagnose_file
    from opdtheory.training.objective import parse_divergence

    given: dict[str, Any] = {name: value for name, value in vars(options).items() if name in ESTIMATOR_OPTIONS}
    settings: dict[str, Any] = {name: getattr(options, name) for name in _FIELDS}
    settings |= {"batch_tokens": options.batch_tokens, "together": options.together}
    own = _own_run(options.paths)
    named = options.estimator is not None or options.divergence is not None or bool(given)
    with _progress() as progress:
        if own is not None and not named:
            folder, config = own
            settings["together"] = config.rollouts_per_prompt
            return diagnose_file(folder, config.loss(), progress=progress, **settings)
        divergence = None if options.divergence is None else parse_divergence(options.divergence)
        paths = [str(own[0])] if own is not None else options.paths
        return diagnose_file(paths, options.estimator or "opd", divergence, progress=progress, **settings, **given)


def _own_run(paths: list[str]) -> tuple[Path, TrainConfig] | None:
    """The records and the settings of a run of `opdtheory train`, if that is what is named.

    Raises:
        UsageError: it recorded no rollouts.
    """
    folder = Path(paths[0])
    if len(paths) > 1 or not (folder / "config.toml").is_file():
        return None
    if not (folder / "rollouts").is_dir():
        raise UsageError(f"{folder} holds a run without records of its rollouts: train with --record-every 1")
    return folder / "rollouts", TrainConfig.from_toml(folder / "config.toml")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar on standard error, if that is a terminal and rich is installed."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield None
        return
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
