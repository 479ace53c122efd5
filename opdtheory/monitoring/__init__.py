"""Real runs: what their logged log-probabilities say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdtheory.monitoring.advice import Advice as Advice
    from opdtheory.monitoring.advice import Choice as Choice
    from opdtheory.monitoring.advice import recommend as recommend
    from opdtheory.monitoring.diagnosis import diagnose as diagnose
    from opdtheory.monitoring.findings import Finding as Finding
    from opdtheory.monitoring.from_files import diagnose_file as diagnose_file
    from opdtheory.monitoring.monitor import CollapseWarning as CollapseWarning
    from opdtheory.monitoring.monitor import Monitor as Monitor
    from opdtheory.monitoring.report import Diagnosis as Diagnosis
    from opdtheory.monitoring.report import Step as Step
    from opdtheory.monitoring.tokens import SampledTokens as SampledTokens

# Processes that only parse a run's lines start without torch, so nothing here imports it eagerly.
_HOMES = {
    "Advice": "advice",
    "Choice": "advice",
    "CollapseWarning": "monitor",
    "Diagnosis": "report",
    "Finding": "findings",
    "Monitor": "monitor",
    "SampledTokens": "tokens",
    "Step": "report",
    "diagnose": "diagnosis",
    "diagnose_file": "from_files",
    "recommend": "advice",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opdtheory.monitoring' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"opdtheory.monitoring.{_HOMES[name]}"), name)
