"""The item of the pytest plugin that audits a whole trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from opdtheory.testing.marks import TrainerClaim

__all__ = ["TrainerAuditItem"]


class TrainerAuditItem(pytest.Item):
    """One audit: a function that builds a trainer, or an update, with one of its marks."""

    def __init__(self, *, build: Any, claim: TrainerClaim, pages: Path | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.build, self.claim, self.pages = build, claim, pages
        self.add_marker("opd_audit")

    def runtest(self) -> None:
        """Audit the trainer, and fail unless it descends its claim.

        Raises:
            InvalidArgumentError: a setting is not an argument of the audit.
        """
        from opdtheory.end_to_end import audit_trainer, audit_update
        from opdtheory.end_to_end.page import write_trainer_audit
        from opdtheory.errors import InvalidArgumentError

        takes = len(inspect.signature(self.build).parameters)
        audit: Any = audit_trainer if takes < 3 else audit_update
        unknown = sorted(set(self.claim.settings) - set(inspect.signature(audit).parameters))
        if unknown:
            raise InvalidArgumentError(
                "opd_trainer", f"must hold settings of opdtheory.{audit.__name__} only, got {', '.join(unknown)}"
            )
        name = self.name.partition("[")[0]
        settings = {"name": name, **self.claim.settings}
        report = audit(self.build, self.claim.claims, self.claim.granularity, **settings)
        if self.pages is not None:
            write_trainer_audit(report, self.pages / f"{name}-{self.claim.label}.html")
        if not report.passes:
            raise _TrainerFailed(str(report))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The audit's text instead of a traceback; for a trainer that cannot be audited, the reason."""
        from opdtheory.errors import OpdTheoryError
        from opdtheory.testing.failures import shortened

        if isinstance(excinfo.value, _TrainerFailed):
            return shortened(str(excinfo.value))
        if isinstance(excinfo.value, OpdTheoryError):
            return shortened(f"{self.name} cannot be audited: {excinfo.value}")
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the marked function is defined."""
        line = getattr(getattr(self.build, "__code__", None), "co_firstlineno", None)
        return self.path, None if line is None else line - 1, f"opd-audit {self.name}"


class _TrainerFailed(Exception):
    """The trainer does not descend what its mark says."""
