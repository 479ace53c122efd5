"""The pytest plugin: `pytest --opd-audit` audits what is marked with `opd_loss` or `opd_trainer`.

pytest loads it in every run of every project that has opdtheory installed. Without `--opd-audit` it only adds its
options: nothing is collected, and neither torch nor the rest of opdtheory is imported.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opdtheory.auditing import Audit
    from opdtheory.auditing.known_biases import Judgement, KnownVerdict
    from opdtheory.rollouts import Rollouts
    from opdtheory.testing.marks import LossClaim
    from opdtheory.testing.trainers import TrainerAuditItem

__all__ = ["LossAudit", "pytest_addoption", "pytest_configure"]

# Keys under which an item passes its finding to the process that reports, which may be another one (pytest-xdist).
_STATUS, _DETAIL, _RECORD = "opd_status", "opd_detail", "opd_record"

# Frames of this package say nothing of the user's code.
_PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

_SHORT = {
    "known": ("known", "k", "KNOWN"),
    "vanished": ("vanished", "v", "VANISHED"),
    "recorded": ("recorded", "r", "RECORDED"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options."""
    group = parser.getgroup("opd", "opdtheory: audits of distillation losses")
    group.addoption("--opd-audit", action="store_true", help="audit what is marked with opd_loss or opd_trainer")
    group.addoption(
        "--opd-baseline", metavar="FILE", help="file of known biases: those pass, a new one or one that grew fails"
    )
    group.addoption(
        "--opd-write-baseline",
        metavar="FILE",
        help="record what the audits find in FILE, beside what it holds, and pass",
    )
    group.addoption("--opd-report", metavar="DIR", help="write a page of each audit into DIR")


def pytest_configure(config: pytest.Config) -> None:
    """Register the audits if they were asked for."""
    config.addinivalue_line("markers", "opd_audit: an audit of a loss, made by `pytest --opd-audit`")
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("opd_baseline", "opd_write_baseline", "opd_report")
        if config.getoption(name)
    ]
    if config.getoption("opd_audit"):
        audits = _Audits(config)
        config.pluginmanager.register(audits, "opdtheory-audits")
        config.pluginmanager.register(_Methods(audits), "opdtheory-methods")
    elif given:
        raise pytest.UsageError(f"{given[0]} needs --opd-audit")


class LossAudit(pytest.Item):
    """One audit: a marked function, or a method of a class, with one of its marks."""

    def __init__(
        self, *, loss: Any, claim: LossClaim, audits: _Audits, owner: type | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.loss, self.claim, self.audits, self.owner = loss, claim, audits, owner
        self.add_marker("opd_audit")

    def runtest(self) -> None:
        """Audit the loss and compare the verdict with the mark and with the record."""
        from opdtheory.auditing import audit

        claim = self.claim
        report = audit(self._callable(), **{"name": self.plain_name, **_arguments(claim)})
        judgement = self.audits.judge(self.nodeid, report, claim)
        self.user_properties.append((_STATUS, judgement.status if judgement.status in _SHORT else ""))
        self.user_properties.append((_DETAIL, judgement.detail))
        self.user_properties.append((_RECORD, self.audits.record(report)))
        self.audits.write_page(self.nodeid, report, claim)
        if not judgement.passes:
            raise _AuditFailed(_failure(report, claim, judgement))

    @property
    def plain_name(self) -> str:
        """The name of the function, after that of its class if it has one."""
        return self.name.partition("[")[0]

    def _callable(self) -> Callable[[Rollouts], Any]:
        """The loss of rollouts that the mark speaks of.

        Raises:
            InvalidArgumentError: the class of a method cannot be made without arguments, or the function does not take
                rollouts alone and the mark does not say how to call it.
        """
        from opdtheory.errors import InvalidArgumentError
        from opdtheory.testing.calls import called
        from opdtheory.testing.hints import signature_of, suggestion, takes_rollouts_alone

        call, function = self.claim.call, self.loss
        if self.owner is not None:
            function = _member(self.owner, self.plain_name.rpartition(".")[2], bound=call is None)
        if call is not None or takes_rollouts_alone(function):
            return called(function, call)
        found = suggestion(function)
        hint = "say how to call it with call=..." if found is None else f"{found.words}: call={found.call!r}"
        raise InvalidArgumentError("opd_loss", f"{signature_of(function)} does not take rollouts alone; {hint}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The audit's text instead of a traceback; for a loss that cannot be audited, the reason."""
        from opdtheory.errors import OpdTheoryError
        from opdtheory.testing.failures import LONGEST, shortened, shortened_traceback

        if isinstance(excinfo.value, _AuditFailed):
            return shortened(str(excinfo.value))
        if isinstance(excinfo.value, OpdTheoryError):
            return shortened(f"{self.name} cannot be audited: {excinfo.value}")
        # The frames of the user's code, without those of pytest and of the audit above.
        below = excinfo.traceback.cut(path=__file__)
        if not self.config.getoption("fulltrace"):
            excinfo.traceback = below.filter(lambda entry: not str(entry.path).startswith(_PACKAGE)) or below
        whole = super().repr_failure(excinfo, style)
        if self.config.getoption("fulltrace") or len(str(whole).splitlines()) <= LONGEST:
            return whole
        return shortened_traceback(str(super().repr_failure(excinfo, "short")))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the marked function is defined."""
        function = getattr(self.loss, "__func__", self.loss)
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
        return self.path, None if line is None else line - 1, f"opd-audit {self.name}"


class _Methods:
    """The hook that collects marked members of classes, beside what pytest collects there."""

    def __init__(self, audits: _Audits) -> None:
        self.audits = audits

    @pytest.hookimpl(wrapper=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Collector, name: str, obj: object
    ) -> Generator[None, Any, Any]:
        """Add one item for each mark of a method of a class in a module."""
        collected = yield
        if not isinstance(collector, pytest.Module) or not isinstance(obj, type):
            return collected
        found = [
            item
            for qualified, member, owner in _marked_members(name, obj)
            for item in self.audits.items(collector, qualified, member, owner)
        ]
        if not found:
            return collected
        others = [collected] if isinstance(collected, pytest.Collector | pytest.Item) else collected or []
        return [*others, *found]


class _AuditFailed(Exception):
    """The verdict is neither the one of the mark nor the recorded one."""


class _Audits:
    """The hooks that act only with `--opd-audit`, and the files of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.known_file = _path(config, "opd_baseline")
        self.written_file = _path(config, "opd_write_baseline")
        self.pages = _path(config, "opd_report")
        self.known: dict[str, KnownVerdict] = {}
        self.project: dict[str, Any] = {}
        self.found: dict[str, tuple[str, str, str]] = {}

    def pytest_sessionstart(self) -> None:
        """Read the files of the run before anything is audited: a wrong one is a usage error."""
        from opdtheory.errors import InvalidArgumentError
        from opdtheory.testing.project import project_settings

        if self.pages is not None and self.pages.exists() and not self.pages.is_dir():
            raise pytest.UsageError(f"--opd-report: must be a folder, got the file {self.pages}")

        try:
            self.project = project_settings(self.config.rootpath)
        except InvalidArgumentError as error:
            raise pytest.UsageError(str(error)) from None
        kept = self.written_file if self.written_file is not None and self.written_file.exists() else None
        if self.known_file is None and kept is None:
            return
        from opdtheory.auditing.known_biases import read_known

        try:
            if self.known_file is not None:
                self.known = read_known(self.known_file)
            if kept is not None:
                read_known(kept)  # what is recorded there will be kept
        except InvalidArgumentError as error:
            raise pytest.UsageError(f"--opd-{error}") from None

    def pytest_pycollect_makeitem(
        self, collector: pytest.Collector, name: str, obj: object
    ) -> list[pytest.Item] | None:
        """Collect one item for each mark of a function in a module."""
        if not isinstance(collector, pytest.Module) or isinstance(obj, type):
            return None
        return [*self.items(collector, name, obj, None), *self.trainers(collector, name, obj)] or None

    def trainers(self, collector: pytest.Module, name: str, build: object) -> Iterator[TrainerAuditItem]:
        """One item for each mark of a function that builds a trainer."""
        from opdtheory.testing.marks import trainer_claims_of
        from opdtheory.testing.trainers import TrainerAuditItem

        for claim in trainer_claims_of(build):
            full = f"{name}[{claim.label}]"
            yield TrainerAuditItem.from_parent(collector, name=full, build=build, claim=claim, pages=self.pages)

    def items(self, collector: pytest.Module, name: str, loss: object, owner: type | None) -> Iterator[LossAudit]:
        """One item for each mark of a function, which is a member of the class `owner` if there is one."""
        from opdtheory.testing.marks import claims_of

        claims = [claim.within(self.project) for claim in claims_of(loss)]
        labels = [claim.label for claim in claims]
        if len(set(labels)) < len(labels):
            labels = [f"{label}-{i}" for i, label in enumerate(labels)]
        for label, claim in zip(labels, claims, strict=True):
            full = f"{name}[{label}]"
            yield LossAudit.from_parent(collector, name=full, loss=loss, claim=claim, owner=owner, audits=self)

    def judge(self, key: str, report: Audit, claim: LossClaim) -> Judgement:
        """Compare the audit with its mark and with the record of that name."""
        from opdtheory.auditing.known_biases import Judgement, judge

        judgement = judge(report, self.known.get(key), lambda _: claim.is_met_by(report))
        if self.written_file is not None and not judgement.passes:
            return Judgement("recorded", judgement.detail)
        return judgement

    def record(self, report: Audit) -> str:
        """The record of an audit as text."""
        from opdtheory.auditing.known_biases import KnownVerdict

        return json.dumps(vars(KnownVerdict.of(report)))

    def write_page(self, key: str, report: Audit, claim: LossClaim) -> None:
        """Write the page of an audit, named after it, if pages were asked for."""
        if self.pages is not None:
            from opdtheory.auditing.views import write_audit

            divergence = None if isinstance(claim.claims, str) else claim.claims
            write_audit(report, self.pages / f"{_file_name(key)}.html", divergence=divergence)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, Any] | None:
        """Count recorded biases apart from losses that keep their claim."""
        status = dict(getattr(report, "user_properties", ())).get(_STATUS)
        if report.when != "call" or not report.passed or status not in _SHORT:
            return None
        category, letter, word = _SHORT[str(status)]
        return category, letter, (word, {"yellow": True})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the findings in the process that reports."""
        found = dict(report.user_properties)
        if report.when == "call" and _RECORD in found:
            self.found[report.nodeid] = (str(found[_STATUS]), str(found[_DETAIL]), str(found[_RECORD]))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the file of known biases once all findings are in."""
        if self.written_file is None or hasattr(self.config, "workerinput"):
            return
        from opdtheory.auditing.known_biases import KnownVerdict, write_known

        write_known(self.written_file, {key: KnownVerdict(**json.loads(found[2])) for key, found in self.found.items()})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what passes only because it is recorded, and the records that are out of date."""
        lines = list(self._lines())
        if lines:
            terminalreporter.section("opd-audit")
            for line in lines:
                terminalreporter.write_line(line)

    def _lines(self) -> Iterator[str]:
        for key, (status, detail, _) in self.found.items():
            if status in _SHORT:
                yield f"{_SHORT[status][2]} {key}: {detail}"
        if self.written_file is not None:
            yield f"wrote {len(self.found)} verdicts to {self.written_file}"
        if self.pages is not None:
            yield f"wrote {len(self.found)} pages to {self.pages}"


def _arguments(claim: LossClaim) -> dict[str, Any]:
    """The arguments of `audit` that a mark states.

    Raises:
        InvalidArgumentError: a setting is not an argument of `audit`, or there is no objective.
    """
    from opdtheory.auditing import audit
    from opdtheory.errors import InvalidArgumentError

    known = set(inspect.signature(audit).parameters) - {"loss", "objective", "granularity"}
    unknown = sorted(set(claim.settings) - known)
    if unknown:
        raise InvalidArgumentError("opd_loss", f"must hold settings of opdtheory.audit only, got {', '.join(unknown)}")
    if claim.claims is None:
        raise InvalidArgumentError(
            "claims", "must be given, by the mark or as objective in [tool.opdtheory] of pyproject.toml"
        )
    return {
        "objective": claim.claims,
        "granularity": claim.granularity or "token_local",
        "reduction": "any",
        **claim.settings,
    }


def _marked_members(name: str, owner: type) -> Iterator[tuple[str, object, type]]:
    """The marked members of a class and of the classes inside it: qualified name, member, class."""
    from opdtheory.testing.marks import claims_of

    seen: dict[str, object] = {}
    for base in owner.__mro__:
        for key, member in list(vars(base).items()):
            seen.setdefault(key, member)
    for key, member in seen.items():
        if claims_of(member):
            yield f"{name}.{key}", member, owner
        elif isinstance(member, type) and key in vars(owner) and member.__qualname__ == f"{owner.__qualname__}.{key}":
            yield from _marked_members(f"{name}.{key}", member)


def _member(owner: type, name: str, bound: bool) -> Any:
    """What a class has under a name; a method is `bound` to an instance that is made without arguments."""
    from opdtheory.errors import InvalidArgumentError

    if not bound or isinstance(inspect.getattr_static(owner, name), staticmethod | classmethod):
        return getattr(owner, name)
    try:
        instance = owner()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InvalidArgumentError(
            "opd_loss",
            f"must mark a method of a class that can be made without arguments, got {owner.__qualname__}.{name} "
            f"({reason}); mark a static method, or say in call=... how to call it",
        ) from None
    return getattr(instance, name)


def _failure(report: Audit, claim: LossClaim, judgement: Judgement) -> str:
    from opdtheory.auditing.known_biases import STATUSES
    from opdtheory.testing.failures import reason

    return (
        f"{STATUSES[judgement.status]}: {judgement.detail}\n"
        f"claimed: {claim.verdict} for {report.objective} ({report.granularity})\n"
        f"found: {reason(report)}\n\n{report}"
    )


def _path(config: pytest.Config, option: str) -> Path | None:
    value = config.getoption(option)
    # Tests may change the working directory; the path is relative to where pytest was called.
    return None if value is None else config.invocation_params.dir / value


def _file_name(key: str) -> str:
    """A node's id as a file name; a digest keeps ids distinct that differ only in replaced characters."""
    import hashlib

    plain = re.sub(r"[^\w.=-]+", "_", key).strip("_")
    return plain[:120] if plain == key else f"{plain[:120]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
