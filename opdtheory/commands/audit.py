"""`opdtheory audit`: find out what a loss really minimises."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdtheory.choices import ACCUMULATIONS, CLAIMED_REDUCTIONS, GRANULARITIES, HISTORIES, LENGTHS, METHODS
from opdtheory.commands.console import (
    FAILS,
    HOLDS,
    USAGE,
    UsageError,
    aside,
    complain,
    console,
    or_none,
    output_apart,
)
from opdtheory.commands.targets import Target, failure, find, importable
from opdtheory.errors import LossError, NotFiniteError, OpdTheoryError

if TYPE_CHECKING:
    from opdtheory.auditing import Audit
    from opdtheory.auditing.known_biases import KnownVerdict
    from opdtheory.commands.console import Commands
    from opdtheory.rollouts import Rollouts

__all__ = ["add_parser", "run"]


@dataclass(frozen=True)
class _Setting:
    """One argument of `opdtheory.audit` as an option.

    Attributes:
        name: the argument.
        default: its value if nothing sets it.
        help: what it means.
        shown: the default in words (default: its value).
        reader: how argparse reads it.
    """

    name: str
    default: Any
    help: str
    shown: str = ""
    reader: dict[str, Any] = field(default_factory=dict)


def _positions(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each.strip())


def _weights(text: str) -> tuple[float, ...]:
    return tuple(float(each) for each in text.split(",") if each.strip())


_weights.__name__ = "weight,..."
_positions.__name__ = "position,..."  # for the message of argparse


# Each is passed to the audit under its name; the loss's own claim and the project's settings override these defaults.
SETTINGS = (
    _Setting(
        "objective",
        "reverse_kl",
        "claimed divergence, such as jsd or 'skew_jsd(beta=0.1)'",
        reader={"metavar": "NAME"},
    ),
    _Setting("granularity", "token_local", "claimed granularity", reader={"choices": GRANULARITIES}),
    _Setting("gamma", 1.0, "discount of token_return", reader={"type": float, "metavar": "G"}),
    _Setting("batch_size", 1, "number of rollouts that the loss sees at once", reader={"type": int, "metavar": "B"}),
    _Setting(
        "eos",
        None,
        "token that ends rollouts early, or none",
        "none, a fixed length",
        {"type": or_none(int), "metavar": "TOKEN"},
    ),
    _Setting(
        "off_policy",
        0.0,
        "size of the noise on the logits of the sampling policy",
        reader={"type": float, "metavar": "S"},
    ),
    _Setting(
        "prompts",
        1,
        "number of prompts; from 2 on, one of them precedes every response",
        reader={"type": int, "metavar": "N"},
    ),
    _Setting(
        "environment",
        (),
        "positions of the response that an environment writes, such as 0,2",
        "none",
        {"type": _positions, "metavar": "N,..."},
    ),
    _Setting(
        "shared_prompt",
        False,
        "the rollouts of a batch answer one prompt, as a group of GRPO does",
        "no",
        {"action": argparse.BooleanOptionalAction},
    ),
    _Setting(
        "reduction",
        "any",
        "how the losses of tokens become one number, or any of these ways",
        reader={"choices": CLAIMED_REDUCTIONS},
    ),
    _Setting(
        "lengths",
        "both",
        "which lengths of rollouts the claim is about: fixed, variable or both",
        reader={"choices": LENGTHS},
    ),
    _Setting(
        "vocabulary",
        None,
        "number of tokens of the policies, or none",
        "none, 4 or what batches allow",
        {"type": or_none(int), "metavar": "V"},
    ),
    _Setting(
        "tolerance",
        None,
        "relative error that counts as rounding, or none",
        "none, by the dtype of the loss",
        {"type": or_none(float), "metavar": "R"},
    ),
    _Setting(
        "method",
        "auto",
        "enumerate every batch, sample batches, or enumerate where that is possible",
        reader={"choices": METHODS},
    ),
    _Setting(
        "alpha",
        1e-6,
        "where batches are sampled, the probability that any statement of the audit is wrong",
        reader={"type": float, "metavar": "P"},
    ),
    _Setting(
        "student_temperature",
        1.0,
        "temperature of the student's distribution in the claim",
        reader={"type": float, "metavar": "T"},
    ),
    _Setting(
        "teacher_temperature",
        1.0,
        "temperature of the teacher's distribution in the claim",
        reader={"type": float, "metavar": "T"},
    ),
    _Setting(
        "sampling_temperature",
        1.0,
        "temperature at which the student samples",
        reader={"type": float, "metavar": "T"},
    ),
    _Setting("histories", "student", "whose histories the claim is about", reader={"choices": HISTORIES}),
    _Setting("teachers", 1, "number of teachers", reader={"type": int, "metavar": "K"}),
    _Setting(
        "teacher_weights",
        (),
        "weights of the teachers, such as 1,2",
        "equal",
        {"type": _weights, "metavar": "W,..."},
    ),
    _Setting(
        "base",
        False,
        "rollouts hold a base policy's probabilities",
        "no",
        {"action": argparse.BooleanOptionalAction},
    ),
    _Setting(
        "extrapolation",
        None,
        "exponent of the teacher over the base in the claim, or none",
        "none",
        {"type": or_none(float), "metavar": "L"},
    ),
    _Setting(
        "microbatches",
        1,
        "number of parts into which a batch is cut, one call of the loss each",
        reader={"type": int, "metavar": "M"},
    ),
    _Setting("accumulate", "mean", "what becomes of the parts' gradients", reader={"choices": ACCUMULATIONS}),
    _Setting(
        "reward",
        False,
        "rollouts hold a task's reward, whose policy gradient is set apart",
        "no",
        {"action": argparse.BooleanOptionalAction},
    ),
    _Setting("seed", 0, "seed of the panel of policies", reader={"type": int, "metavar": "N"}),
)


def add_parser(commands: Commands) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "audit",
        help="find out what a loss really minimises",
        description="Audit loss(rollouts) -> scalar, named as PATH.py:FUNCTION or package.module:FUNCTION; of several, "
        "each by itself. The loss, its module and the expression of --call run as Python code. Options win over the "
        "claim that a loss carries, which wins over [tool.opdtheory] in the nearest pyproject.toml.",
        epilog="exit status: 0 if the loss follows its claim or has a known bias, 1 if not, 2 if the loss or a file "
        "cannot be found, imported, run, read, written or audited; of several losses, the largest",
    )
    parser.add_argument("losses", nargs="+", metavar="LOSS", help="PATH.py:FUNCTION or package.module:FUNCTION")
    for each in SETTINGS:
        flag, shown = f"--{each.name.replace('_', '-')}", each.shown or each.default
        # Without the option, the value comes from elsewhere.
        text = f"{each.help} (default: {shown})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **each.reader)
    parser.add_argument(
        "--call",
        metavar="EXPR",
        help="how to call a function that does not take rollouts alone: an expression of f, the function, and r, the "
        "rollouts, such as 'r.token_sum(f(r.teacher_logprobs, r.student_logprobs))'; it may use opdtheory and torch",
    )
    parser.add_argument("--json", action="store_true", help="print the audit as JSON, and nothing else")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the audit as a self-contained HTML page")
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="file of known biases, which do not fail unless they grew"
    )
    parser.add_argument(
        "--write-baseline", type=Path, metavar="FILE", help="add the result to the known biases in FILE"
    )
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of what fails")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Audit each loss and return the exit status, of several the largest."""
    if len(options.losses) == 1:
        return _run(options, options.losses[0])
    if options.json or options.html is not None:
        raise UsageError(f"--json and --html take one loss, got {len(options.losses)}")
    status = HOLDS
    for number, loss in enumerate(options.losses):
        if number:
            print()
        # One that cannot be audited keeps none of the others from it.
        try:
            status = max(status, _run(options, loss))
        except OpdTheoryError as error:
            complain(options, error)
            status = USAGE
    return status


def _run(options: argparse.Namespace, loss: str) -> int:
    """Audit one loss and return the exit status."""
    from opdtheory.auditing.known_biases import judge, read_known
    from opdtheory.auditing.views.terminal import print_audit

    options.loss = loss
    known = {} if options.baseline is None else read_known(options.baseline)
    # What the loss and its module print is no part of the JSON.
    with output_apart(options.json):
        report = _audited(options)
    written, recorded = _write_files(options, report)
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


def _audited(options: argparse.Namespace) -> Audit:
    """The audit of the loss that the options name.

    Raises:
        UsageError: the loss cannot be imported, called or run.
    """
    from opdtheory.auditing import audit
    from opdtheory.testing.calls import called
    from opdtheory.testing.project import project_settings

    project = project_settings(Path.cwd())
    target = find(options.loss)
    if options.call is None:
        _check_takes_rollouts(target)
    settings = _settings(options, project, target.function)
    loss = _Watched(called(target.function, options.call), target)
    try:
        return audit(loss, name=options.loss, **settings)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _unable(error, loss, options) from error


class _Watched:
    """A loss that finds the modules beside its own, and remembers what it raised and on what."""

    def __init__(self, loss: Callable[[Rollouts], Any], target: Target) -> None:
        self.loss, self.target = loss, target
        self.shape: tuple[int, ...] = ()
        self.raised: BaseException | None = None

    def __call__(self, rollouts: Rollouts) -> Any:
        """The loss's value."""
        self.shape, self.raised = tuple(rollouts.student_logits.shape), None
        with importable(self.target.folder, self.target.stem):
            try:
                return self.loss(rollouts)
            except BaseException as error:
                self.raised = error
                raise


def _unable(error: BaseException, loss: _Watched, options: argparse.Namespace) -> OpdTheoryError:
    """What to say of an exception that ends an audit."""
    name, on = options.loss, f"on a batch of shape (B, T, V) = {loss.shape}"
    if error is loss.raised:
        said = failure(f"{name} raises {on}", error, loss.target.file)
        hint = None if options.call is not None else _hint(loss.target.function)
        if hint is None or "..." in hint:
            return said
        return UsageError(f"{str(said).splitlines()[0]}\n{hint} (--traceback shows where it raises)")
    if isinstance(error, NotFiniteError):  # names the batch
        return UsageError(f"{name} cannot be audited: {error}\n--traceback shows where this was found")
    if isinstance(error, LossError):
        return UsageError(f"{name} cannot be audited: {error}\nfound {on} (--traceback shows where)")
    if isinstance(error, OpdTheoryError):
        return error
    return failure(f"{name} cannot be audited", error, loss.target.file)


def _check_takes_rollouts(target: Target) -> None:
    from opdtheory.testing.hints import signature_of, takes_rollouts_alone

    if takes_rollouts_alone(target.function):
        return
    hint = _hint(target.function) or "say how to call it with --call, an expression of f and r"
    raise UsageError(f"{signature_of(target.function)} does not take rollouts alone\n{hint}")


def _hint(function: Callable[..., Any]) -> str | None:
    from opdtheory.testing.hints import suggestion

    found = suggestion(function)
    # A function of rollouts is called as it should be.
    return None if found is None or "f(r)" in found.call else f"{found.words}: --call {shlex.quote(found.call)}"


def _settings(options: argparse.Namespace, project: dict[str, Any], loss: object) -> dict[str, Any]:
    """The arguments of the audit: of the options, the loss's claim, the project and the defaults, the first."""
    from opdtheory.estimators import Claim

    claim = getattr(loss, "claim", None)
    claimed = {}
    if isinstance(claim, Claim):
        claimed = {"objective": claim.divergence, "granularity": claim.granularity, "gamma": claim.gamma}
    defaults = {each.name: each.default for each in SETTINGS}
    given = {name: value for name, value in vars(options).items() if name in defaults}
    return {**defaults, **project, **claimed, **given}


def _write_files(options: argparse.Namespace, report: Audit) -> tuple[list[Path], dict[str, KnownVerdict]]:
    """Write the page and the record that the options name, and return their paths and the record."""
    from opdtheory.auditing.known_biases import KnownVerdict, write_known
    from opdtheory.auditing.views import write_audit

    recorded = {} if options.write_baseline is None else {_key(options.loss, report): KnownVerdict.of(report)}
    written = []
    try:
        if recorded:
            written.append(write_known(options.write_baseline, recorded))
        if options.html is not None:
            written.append(write_audit(report, options.html, divergence=report.claim.divergence))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be written: {error.strerror}") from None
    return written, recorded


def _key(target: str, report: Audit) -> str:
    """The name of an audit in a file of known biases: one loss may be held to several claims."""
    return f"{target} for {report.objective} ({report.granularity})"
