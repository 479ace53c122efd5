"""The pytest plugin: `pytest --opd-audit` audits every function that is marked with `opd_loss`.

pytest loads it in every run of every project that has opdtheory installed. Without `--opd-audit` it only adds its
options: nothing is collected, and neither torch nor the rest of opdtheory is imported.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from opdtheory.auditing import Audit
    from opdtheory.auditing.known_biases import Judgement, KnownVerdict
    from opdtheory.testing.marks import LossClaim

__all__ = ["LossAudit", "pytest_addoption", "pytest_configure"]

# Under these keys an item hands its finding to the process that reports, which may be another one (pytest-xdist).
_STATUS, _DETAIL, _RECORD = "opd_status", "opd_detail", "opd_record"

_SHORT = {
    "known": ("known", "k", "KNOWN"),
    "vanished": ("vanished", "v", "VANISHED"),
    "recorded": ("recorded", "r", "RECORDED"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("opd", "opdtheory: audits of distillation losses")
    group.addoption("--opd-audit", action="store_true", help="audit the functions marked with opd_loss")
    group.addoption("--opd-baseline", metavar="FILE", help="known biases: those pass, a new one or one that grew fails")
    group.addoption(
        "--opd-write-baseline", metavar="FILE", help="record what the audits find in FILE, and pass; adds to the file"
    )
    group.addoption("--opd-report", metavar="DIR", help="write a page of each audit into DIR")


def pytest_configure(config: pytest.Config) -> None:
    """Start collecting and reporting audits if they were asked for."""
    config.addinivalue_line("markers", "opd_audit: an audit of a loss, made by `pytest --opd-audit`")
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("opd_baseline", "opd_write_baseline", "opd_report")
        if config.getoption(name)
    ]
    if config.getoption("opd_audit"):
        config.pluginmanager.register(_Audits(config), "opdtheory-audits")
    elif given:
        raise pytest.UsageError(f"{given[0]} needs --opd-audit")


class LossAudit(pytest.Item):
    """One audit: a marked function and one of its marks."""

    def __init__(self, *, loss: Any, claim: LossClaim, audits: _Audits, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss, self.claim, self.audits = loss, claim, audits
        self.add_marker("opd_audit")

    def runtest(self) -> None:
        """Audit the loss and hold the verdict against the mark and the baseline."""
        from opdtheory.auditing import audit
        from opdtheory.errors import InvalidArgumentError

        claim = self.claim
        settings = {"name": self.name.partition("[")[0], **claim.settings}
        unknown = sorted(set(settings) - set(inspect.signature(audit).parameters))
        if unknown:
            raise InvalidArgumentError("opd_loss", f"{', '.join(unknown)}: opdtheory.audit has no such setting")
        report = audit(self.loss, claim.claims, claim.granularity, **settings)
        judgement = self.audits.judge(self.nodeid, report, claim)
        self.user_properties.append((_STATUS, judgement.status if judgement.status in _SHORT else ""))
        self.user_properties.append((_DETAIL, judgement.detail))
        self.user_properties.append((_RECORD, self.audits.record(report)))
        self.audits.write_page(self.nodeid, report, claim)
        if not judgement.passes:
            raise _AuditFailed(_failure(report, claim, judgement))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The audit's text in place of a traceback; of a loss that cannot be audited, the reason."""
        from opdtheory.errors import OpdTheoryError

        if isinstance(excinfo.value, _AuditFailed):
            return str(excinfo.value)
        if isinstance(excinfo.value, OpdTheoryError):
            return f"{self.name} cannot be audited: {excinfo.value}"
        # From the audit on, without pytest's own frames above it.
        excinfo.traceback = excinfo.traceback.cut(path=__file__)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the marked function stands."""
        line = getattr(getattr(self.loss, "__code__", None), "co_firstlineno", None)
        return self.path, None if line is None else line - 1, f"opd-audit {self.name}"


class _AuditFailed(Exception):
    """The verdict is not the one that the mark or the baseline names."""


class _Audits:
    """The hooks that act with `--opd-audit` only, and the files of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.baseline = _path(config, "opd_baseline")
        self.written = _path(config, "opd_write_baseline")
        self.pages = _path(config, "opd_report")
        self.known: dict[str, KnownVerdict] = {}
        self.found: dict[str, tuple[str, str, str]] = {}

    def pytest_sessionstart(self) -> None:
        """Read the baseline before anything is audited: a wrong file is a usage error."""
        if self.baseline is None:
            return
        from opdtheory.auditing.known_biases import read_baseline
        from opdtheory.errors import InvalidArgumentError

        try:
            self.known = read_baseline(self.baseline)
        except InvalidArgumentError as error:
            raise pytest.UsageError(f"--opd-{error}") from None

    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str, obj: object) -> Any:
        """One item for each mark of a function in a module."""
        from opdtheory.testing.marks import claims_of

        claims = claims_of(obj) if isinstance(collector, pytest.Module) else ()
        if not claims:
            return None
        labels = [claim.label for claim in claims]
        if len(set(labels)) < len(labels):
            labels = [f"{label}-{i}" for i, label in enumerate(labels)]
        return [
            LossAudit.from_parent(collector, name=f"{name}[{label}]", loss=obj, claim=claim, audits=self)
            for label, claim in zip(labels, claims, strict=True)
        ]

    def judge(self, key: str, report: Audit, claim: LossClaim) -> Judgement:
        """The audit against its mark and the record of that name."""
        from opdtheory.auditing.known_biases import Judgement, judge

        judgement = judge(report, self.known.get(key), claim.is_met_by)
        if self.written is not None and not judgement.passes:
            return Judgement("recorded", judgement.detail)
        return judgement

    def record(self, report: Audit) -> str:
        """What the baseline would say of this audit, as text."""
        from opdtheory.auditing.known_biases import KnownVerdict

        return json.dumps(vars(KnownVerdict.of(report)))

    def write_page(self, key: str, report: Audit, claim: LossClaim) -> None:
        """The page of one audit, named after it, if pages were asked for."""
        if self.pages is not None:
            from opdtheory.auditing.views import write_audit

            divergence = None if isinstance(claim.claims, str) else claim.claims
            write_audit(report, self.pages / f"{_file_name(key)}.html", divergence=divergence)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, Any] | None:
        """Count what is on record apart from what is as claimed."""
        status = dict(getattr(report, "user_properties", ())).get(_STATUS)
        if report.when != "call" or not report.passed or status not in _SHORT:
            return None
        category, letter, word = _SHORT[str(status)]
        return category, letter, (word, {"yellow": True})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the findings, in the process that reports."""
        found = dict(report.user_properties)
        if report.when == "call" and _RECORD in found:
            self.found[report.nodeid] = (str(found[_STATUS]), str(found[_DETAIL]), str(found[_RECORD]))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the baseline, once all findings are in."""
        if self.written is None or hasattr(self.config, "workerinput"):
            return
        from opdtheory.auditing.known_biases import KnownVerdict, write_baseline

        write_baseline(self.written, {key: KnownVerdict(**json.loads(found[2])) for key, found in self.found.items()})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List what passes for its record alone, and what the record no longer has to say."""
        lines = list(self._lines())
        if lines:
            terminalreporter.section("opd-audit")
            for line in lines:
                terminalreporter.write_line(line)

    def _lines(self) -> Iterator[str]:
        for key, (status, detail, _) in self.found.items():
            if status in _SHORT:
                yield f"{_SHORT[status][2]} {key}: {detail}"
        if self.written is not None:
            yield f"wrote {len(self.found)} verdicts to {self.written}"
        if self.pages is not None:
            yield f"wrote {len(self.found)} pages to {self.pages}"


def _failure(report: Audit, claim: LossClaim, judgement: Judgement) -> str:
    from opdtheory.auditing.known_biases import STATUSES

    return (
        f"{STATUSES[judgement.status]}: {judgement.detail}\n"
        f"claimed: {claim.verdict} for {report.objective} ({report.granularity})\n\n{report}"
    )


def _path(config: pytest.Config, option: str) -> Path | None:
    value = config.getoption(option)
    # Tests may change the working directory; what the user typed was meant where pytest was called.
    return None if value is None else config.invocation_params.dir / value


def _file_name(key: str) -> str:
    """A node's id as a file name; what it loses stays apart by a digest."""
    import hashlib

    plain = re.sub(r"[^\w.=-]+", "_", key).strip("_")
    return plain[:120] if plain == key else f"{plain[:120]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
