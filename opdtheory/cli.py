"""The command line: `opdtheory verify`, `audit`, `table`, `train`, `reproduce` and `bench`.

Exit status: 0 if what was asked holds, 1 if it does not, 2 for a usage error. Nothing beyond the core
is needed; with rich installed the tables are coloured.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdtheory.auditing import Audit
    from opdtheory.auditing.baseline import KnownVerdict
    from opdtheory.divergences import Divergence
    from opdtheory.rollouts import Rollouts
    from opdtheory.verification import Verification

__all__ = ["main"]

HOLDS, FAILS, USAGE = 0, 1, 2

_PIPED_WIDTH = 120


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return USAGE
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILS
    return status


def _parser() -> argparse.ArgumentParser:
    from opdtheory import __version__
    from opdtheory.training import command, reproduce

    parser = argparse.ArgumentParser(
        prog="opdtheory", description="What an on-policy-distillation loss really does, by exact expectation."
    )
    parser.add_argument("--version", action="version", version=f"opdtheory {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    verify = commands.add_parser("verify", help="check every identity and refute every false twin")
    verify.add_argument(
        "select", nargs="*", metavar="NAME", help="theorems (T4) and estimators (opd_plus); all if none"
    )
    verify.add_argument("--workers", type=int, metavar="N", help="processes to share the work among (one per core)")
    verify.add_argument("--json", action="store_true", help="print the results as JSON")
    verify.add_argument(
        "--report", type=Path, default=Path("reports/verify.html"), metavar="FILE", help="page to write (%(default)s)"
    )
    verify.add_argument("--no-report", action="store_true", help="write no page")
    verify.set_defaults(run=_verify)

    table = commands.add_parser("table", help="what each local estimator follows, derived symbolically")
    table.add_argument("--format", choices=("text", "markdown", "latex"), default="text", help="(%(default)s)")
    table.add_argument("--json", action="store_true", help="print the table as JSON")
    table.set_defaults(run=_table)

    audit = commands.add_parser(
        "audit",
        help="find out what a loss really minimises",
        description="Audit loss(rollouts) -> scalar, named as PATH.py:FUNCTION or package.module:FUNCTION.",
        epilog="exit status: 0 if the loss follows its claim, or its bias is the one that the baseline records; 1 if "
        "it does not; 2 if the loss or a file cannot be found, read or audited",
    )
    audit.add_argument("loss", metavar="LOSS", help="PATH.py:FUNCTION or package.module:FUNCTION")
    audit.add_argument(
        "--call",
        metavar="EXPR",
        help="how to call another kind of function: an expression of f, the function, and r, the rollouts, such as "
        "'r.token_sum(f(r.teacher_logprobs, r.student_logprobs))'",
    )
    audit.add_argument("--objective", help="claimed divergence, such as jsd or 'skew_jsd(beta=0.1)'")
    audit.add_argument("--granularity", choices=("token_local", "token_return", "sequence"))
    audit.add_argument("--gamma", type=float, help="discount of token_return (1)")
    audit.add_argument("--batch-size", type=int, default=1, metavar="B", help="rollouts the loss sees at once (1)")
    audit.add_argument("--eos", type=int, metavar="TOKEN", help="token that ends a rollout early (fixed length)")
    audit.add_argument("--off-policy", type=float, default=0.0, metavar="S", help="logit noise of the sampler (0)")
    audit.add_argument("--seed", type=int, default=0, help="of the panel of policies (0)")
    audit.add_argument("--json", action="store_true", help="print the audit as JSON")
    audit.add_argument("--html", type=Path, metavar="FILE", help="write the audit as a page")
    audit.add_argument(
        "--baseline", type=Path, metavar="FILE", help="known biases: the status is 0 for one of those, unless it grew"
    )
    audit.add_argument(
        "--write-baseline", type=Path, metavar="FILE", help="record what is found in FILE, beside what it holds"
    )
    audit.set_defaults(run=_audit)

    train = commands.add_parser(
        "train",
        help="distil a teacher into a small language model with any estimator",
        description="Train a student on its own samples, scored by a teacher. The value none unsets an option.",
        epilog="exit status: 0 when the run is finished, 1 if a step cannot be taken, 2 for a wrong option",
    )
    command.add_options(train)
    train.set_defaults(run=command.run)

    again = commands.add_parser(
        "reproduce",
        help="train every arm of the experiment and write the page of what reproduces",
        description="Run every arm of the experiment in a process of its own, and write the page. Finished arms are "
        "kept: the same command goes on where it was stopped.",
        epilog="exit status: 0 if every arm has a row, 1 if one has none, 2 for a wrong option",
    )
    reproduce.add_options(again)
    again.set_defaults(run=reproduce.run)

    bench = commands.add_parser(
        "bench",
        help="time the whole-vocabulary losses on this machine",
        description="Time, memory and error of fused_divergence, side by side with the textbook formula by autograd.",
        epilog="exit status: 0 if every gradient is right, 1 if one is not, 2 for a wrong option; times decide nothing",
    )
    bench.add_argument(
        "divergences", nargs="*", metavar="DIVERGENCE", help="names or labels; a choice of the catalogue if none"
    )
    bench.add_argument("--tokens", type=int, default=64, metavar="N", help="rows of logits (%(default)s)")
    bench.add_argument("--vocabulary", type=int, default=151_936, metavar="V", help="words of a row (%(default)s)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="of each, alternated (%(default)s)")
    bench.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="(%(default)s)"
    )
    bench.add_argument("--device", default="cpu", metavar="NAME", help="where the losses are computed (%(default)s)")
    bench.add_argument("--json", action="store_true", help="print the rows as JSON")
    bench.set_defaults(run=_bench)
    return parser


def _bench(options: argparse.Namespace) -> int:
    from opdtheory.benchmark import run

    return run(options)


def _audit(options: argparse.Namespace) -> int:
    from opdtheory.auditing import audit
    from opdtheory.auditing.baseline import judge, read_baseline
    from opdtheory.auditing.terminal import print_audit
    from opdtheory.errors import OpdTheoryError

    try:
        known = {} if options.baseline is None else read_baseline(options.baseline)
        loss = _as_loss(load_loss(options.loss), options.call)
        claim = _claim(options, loss)
        report = audit(loss, name=options.loss, **claim)
        written, recorded = _write_files(options, report, claim["objective"])
    except (OpdTheoryError, LookupError) as error:
        print(f"opdtheory audit: {error}", file=sys.stderr)
        return USAGE
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_audit(report, _console())
    # Beside the JSON, not in it.
    aside = sys.stderr if options.json else sys.stdout
    for path in written:
        print(f"wrote {path}", file=aside)
    judgement = judge(report, {**known, **recorded}.get(_key(options.loss, report)))
    if judgement.status != "as_claimed" and (options.baseline or options.write_baseline):
        print(f"{judgement.status}: {judgement.detail}", file=aside)
    return HOLDS if judgement.passes else FAILS


def _write_files(
    options: argparse.Namespace, report: Audit, objective: str | Divergence
) -> tuple[list[Path], dict[str, KnownVerdict]]:
    """Write the page and the record that were asked for; returns their paths and the record."""
    from opdtheory.auditing.baseline import KnownVerdict, write_baseline
    from opdtheory.auditing.page import write_audit

    recorded = {} if options.write_baseline is None else {_key(options.loss, report): KnownVerdict.of(report)}
    written = []
    try:
        if recorded:
            written.append(write_baseline(options.write_baseline, recorded))
        if options.html is not None:
            written.append(write_audit(report, options.html, divergence=objective))
    except OSError as error:
        raise LookupError(f"{error.filename} cannot be written: {error.strerror}") from None
    return written, recorded


def _key(target: str, report: Audit) -> str:
    """The name of an audit in a baseline: one loss may be held to several claims."""
    return f"{target} for {report.objective} ({report.granularity})"


def _table(options: argparse.Namespace) -> int:
    from opdtheory.estimator_table import render, rows

    table = rows()
    print(json.dumps([row.to_dict() for row in table], indent=2) if options.json else render(table, options.format))
    return HOLDS


def _claim(options: argparse.Namespace, loss: object) -> dict[str, Any]:
    """The settings of the audit: what the command line says, else what the loss claims, else the defaults."""
    claim = getattr(loss, "claim", None)
    objective, granularity, gamma = ("reverse_kl", "token_local", 1.0)
    if claim is not None:
        objective, granularity, gamma = claim.divergence, claim.granularity, claim.gamma
    return {
        "objective": options.objective if options.objective is not None else objective,
        "granularity": options.granularity or granularity,
        "gamma": options.gamma if options.gamma is not None else gamma,
        "batch_size": options.batch_size,
        "eos": options.eos,
        "off_policy": options.off_policy,
        "seed": options.seed,
    }


def _as_loss(function: Callable[..., Any], call: str | None) -> Callable[[Rollouts], Any]:
    """The function itself if it takes rollouts alone, or the expression that calls it."""
    if call is not None:
        try:
            code = compile(call, "--call", "eval")
        except SyntaxError as error:
            raise LookupError(f"--call {call!r} is no expression: {error.msg}") from None
        return lambda rollouts: eval(code, {"f": function, "r": rollouts})
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise LookupError(
            f"{getattr(function, '__name__', function)}{inspect.signature(function)} does not take rollouts alone; say "
            "how to call it, such as --call 'r.token_sum(f(r.teacher_logprobs, r.student_logprobs))'"
        ) from None
    except ValueError:
        pass  # a builtin without a signature
    return function


def load_loss(target: str) -> Callable[[Rollouts], Any]:
    """Import the function that `PATH.py:FUNCTION` or `package.module:FUNCTION` names.

    Raises:
        LookupError: no such file, module or function; the message says which.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise LookupError(f"{target!r} names no loss; write PATH.py:FUNCTION or package.module:FUNCTION")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    try:
        found = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        functions = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise LookupError(f"{where} has no {name!r}; it has {', '.join(functions) or 'no function'}") from None
    if not callable(found):
        raise LookupError(f"{target} is a {type(found).__name__}; a function of rollouts is needed")
    loss: Callable[[Rollouts], Any] = found
    return loss


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise LookupError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise LookupError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # Registered under its name, so that dataclasses and pickles in the file work; beside it, its own imports.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _load_module(name: str) -> Any:
    # A module beside the caller is found as `python -m` would find it.
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LookupError(f"module {name!r} cannot be imported: {error}") from None
    finally:
        sys.path.remove("")


def _verify(options: argparse.Namespace) -> int:
    from opdtheory.errors import OpdTheoryError
    from opdtheory.verification import verify

    console = None if options.json else _console()
    workers = options.workers if options.workers is not None else len(os.sched_getaffinity(0))
    try:
        if console is not None and console.is_terminal:
            with console.status("verifying") as status:
                done = functools.partial(_show_progress, status)
                result = verify(options.select, workers=workers, progress=done)
        else:
            result = verify(options.select, workers=workers)
    except OpdTheoryError as error:
        print(f"opdtheory verify: {error}", file=sys.stderr)
        return USAGE
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
    elif console is not None:
        _print_rich(console, result)
    else:
        _print_plain(result)
    if not options.no_report:
        from opdtheory.verification_page import write_page

        path = write_page(result, options.report)
        print(f"wrote {path}", file=sys.stderr if options.json else sys.stdout)
    return HOLDS if result.passed else FAILS


def _show_progress(status: Any, item: str) -> None:
    status.update(f"verified {item}")


def _console() -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    # What is piped into a file or a log has no width of its own.
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH)


_THEOREM_HEADER = ("", "theorem", "check", "how", "error", "cases", "false twins", "s")
_ESTIMATOR_HEADER = ("", "estimator", "claimed for", "audit's verdict", "false twin")


def _theorem_rows(result: Verification) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for theorem in result.theorems:
        steps = f"{sum(step.holds for step in theorem.steps)} of {len(theorem.steps)} steps"
        seconds = f"{theorem.seconds:.1f}"
        rows.append((_mark(theorem.passed), theorem.number, theorem.name, f"derived: {steps}", "", "", "", seconds))
        for r in theorem.identities:
            twins = f"{len(r.twins) - len(r.survivors)} of {len(r.twins)} refuted"
            rows.append((_mark(r.passed), "", r.name, r.kind, _error(r.error), str(r.cases), twins, f"{r.seconds:.1f}"))
    return rows


def _error(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.1e}"


def _estimator_rows(result: Verification) -> list[tuple[str, ...]]:
    return [
        (
            _mark(r.passed),
            r.short_name,
            r.claim.divergence.label + ("" if r.claim.granularity == "token_local" else f", {r.claim.granularity}"),
            r.audit.verdict.replace("_", " ")
            + (f": {r.audit.descends}" if r.audit.verdict == "other_objective" else ""),
            "refuted" if r.twin_refuted else "SURVIVES",
        )
        for r in result.estimators
    ]


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _summary(result: Verification) -> str:
    steps = [step for theorem in result.theorems for step in theorem.steps]
    return (
        f"{sum(r.passed for r in result.theorems)} of {len(result.theorems)} theorems hold "
        f"({sum(step.holds for step in steps)} of {len(steps)} steps, "
        f"{sum(r.passed for r in result.identities)} of {len(result.identities)} checks), "
        f"{sum(r.passed for r in result.estimators)} of {len(result.estimators)} estimators keep their claim, "
        f"{result.twins_refuted} false twins refuted, in {result.seconds:.0f} s"
    )


def _print_rich(console: Any, result: Verification) -> None:
    from rich.table import Table
    from rich.text import Text

    for title, header, rows in (
        ("Theorems", _THEOREM_HEADER, _theorem_rows(result)),
        ("Estimators", _ESTIMATOR_HEADER, _estimator_rows(result)),
    ):
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column, overflow="fold")
        for row in rows:
            mark = Text(row[0], style="green" if row[0] == "ok" else "bold red")
            # A theorem's own row heads those of its checks.
            table.add_row(
                mark, *(Text(cell) for cell in row[1:]), style="bold" if row[1] and header[1] == "theorem" else ""
            )
        console.print(table)
    console.print(Text(_summary(result), style="bold green" if result.passed else "bold red"))


def _print_plain(result: Verification) -> None:
    for header, rows in (
        (_THEOREM_HEADER, _theorem_rows(result)),
        (_ESTIMATOR_HEADER, _estimator_rows(result)),
    ):
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print()
    print(_summary(result))


if __name__ == "__main__":
    sys.exit(main())
