"""`opdtheory audit`: find out what a loss really minimises."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdtheory.choices import GRANULARITIES
from opdtheory.commands.console import FAILS, HOLDS, UsageError, aside, console

if TYPE_CHECKING:
    from opdtheory.auditing import Audit
    from opdtheory.auditing.known_biases import KnownVerdict
    from opdtheory.commands.console import Commands
    from opdtheory.divergences import Divergence
    from opdtheory.rollouts import Rollouts

__all__ = ["add_parser", "load_loss", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "audit",
        help="find out what a loss really minimises",
        description="Audit loss(rollouts) -> scalar, named as PATH.py:FUNCTION or package.module:FUNCTION.",
        epilog="exit status: 0 if the loss follows its claim or has a known bias, 1 if not, 2 if the loss or a file "
        "cannot be found, read, written or audited",
    )
    parser.add_argument("loss", metavar="LOSS", help="PATH.py:FUNCTION or package.module:FUNCTION")
    parser.add_argument(
        "--call",
        metavar="EXPR",
        help="how to call a function that does not take rollouts alone: an expression of f, the function, and r, the "
        "rollouts, such as 'r.token_sum(f(r.teacher_logprobs, r.student_logprobs))'",
    )
    parser.add_argument(
        "--objective",
        help="claimed divergence, such as jsd or 'skew_jsd(beta=0.1)' (default: the claim's, else reverse_kl)",
    )
    parser.add_argument(
        "--granularity", choices=GRANULARITIES, help="claimed granularity (default: the claim's, else token_local)"
    )
    parser.add_argument("--gamma", type=float, help="discount of token_return (default: the claim's, else 1)")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="number of rollouts that the loss sees at once"
    )
    parser.add_argument(
        "--eos", type=int, metavar="TOKEN", help="token that ends rollouts early (default: fixed length)"
    )
    parser.add_argument(
        "--off-policy",
        type=float,
        default=0.0,
        metavar="S",
        help="size of the noise on the logits of the sampling policy",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the panel of policies")
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the audit as a self-contained HTML page")
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="file of known biases, which do not fail unless they grew"
    )
    parser.add_argument(
        "--write-baseline", type=Path, metavar="FILE", help="add the result to the known biases in FILE"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit the loss and return the exit status."""
    from opdtheory.auditing import audit
    from opdtheory.auditing.known_biases import judge, read_known
    from opdtheory.auditing.views.terminal import print_audit

    known = {} if options.baseline is None else read_known(options.baseline)
    loss = _as_loss(load_loss(options.loss), options.call)
    claim = _claim(options, loss)
    report = audit(loss, name=options.loss, **claim)
    written, recorded = _write_files(options, report, claim["objective"])
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_audit(report, console())
    for path in written:
        aside(options, f"wrote {path}")
    judgement = judge(report, {**known, **recorded}.get(_key(options.loss, report)))
    if judgement.status != "as_claimed" and (options.baseline or options.write_baseline):
        aside(options, f"{judgement.status}: {judgement.detail}")
    return HOLDS if judgement.passes else FAILS


def _write_files(
    options: argparse.Namespace, report: Audit, objective: str | Divergence
) -> tuple[list[Path], dict[str, KnownVerdict]]:
    """Write the page and the record that the options name, and return their paths and the record."""
    from opdtheory.auditing.known_biases import KnownVerdict, write_known
    from opdtheory.auditing.views import write_audit

    recorded = {} if options.write_baseline is None else {_key(options.loss, report): KnownVerdict.of(report)}
    written = []
    try:
        if recorded:
            written.append(write_known(options.write_baseline, recorded))
        if options.html is not None:
            written.append(write_audit(report, options.html, divergence=objective))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}") from None
    return written, recorded


def _key(target: str, report: Audit) -> str:
    """The name of an audit in a file of known biases: one loss may be held to several claims."""
    return f"{target} for {report.objective} ({report.granularity})"


def _claim(options: argparse.Namespace, loss: object) -> dict[str, Any]:
    """The settings of the audit: those of the command line, else those of the loss's claim, else the defaults."""
    claim = getattr(loss, "claim", None)
    stated = {"objective": "reverse_kl", "granularity": "token_local", "gamma": 1.0}
    if claim is not None:
        stated = {"objective": claim.divergence, "granularity": claim.granularity, "gamma": claim.gamma}
    given = {name: getattr(options, name) for name in (*stated, "batch_size", "eos", "off_policy", "seed")}
    return {**given, **{name: value for name, value in stated.items() if given[name] is None}}


def _as_loss(function: Callable[..., Any], call: str | None) -> Callable[[Rollouts], Any]:
    """The function itself if it takes rollouts alone, else the expression that calls it."""
    if call is not None:
        try:
            code = compile(call, "--call", "eval")
        except SyntaxError as error:
            raise UsageError(f"--call {call!r} is not an expression: {error.msg}") from None
        return lambda rollouts: eval(code, {"f": function, "r": rollouts})
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise UsageError(
            f"{getattr(function, '__name__', function)}{inspect.signature(function)} does not take rollouts alone; say "
            "how to call it, such as --call 'r.token_sum(f(r.teacher_logprobs, r.student_logprobs))'"
        ) from None
    except ValueError:
        pass  # a builtin without a signature
    return function


def load_loss(target: str) -> Callable[[Rollouts], Any]:
    """Import the function that `PATH.py:FUNCTION` or `package.module:FUNCTION` names.

    Raises:
        UsageError: there is no such file, module or function, or it is not callable.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"the loss must be PATH.py:FUNCTION or package.module:FUNCTION, got {target!r}")
    module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    try:
        found = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        functions = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise UsageError(f"{where} has no {name!r}; it has {', '.join(functions) or 'no function'}") from None
    if not callable(found):
        raise UsageError(f"{target} must be a function of rollouts, got {type(found).__name__}")
    loss: Callable[[Rollouts], Any] = found
    return loss


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look the module up by name; its own imports are found next to it.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _load_module(name: str) -> Any:
    # A module in the working directory is found, as `python -m` finds it.
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"module {name!r} cannot be imported: {error}") from None
    finally:
        sys.path.remove("")
