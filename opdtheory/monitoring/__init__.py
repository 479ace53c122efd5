"""Real runs: what their logged log-probabilities say."""

from __future__ import annotations

from opdtheory.monitoring.advice import Advice, Choice, recommend
from opdtheory.monitoring.diagnosis import diagnose
from opdtheory.monitoring.findings import Finding
from opdtheory.monitoring.from_files import diagnose_file
from opdtheory.monitoring.monitor import CollapseWarning, Monitor
from opdtheory.monitoring.report import Diagnosis, Step
from opdtheory.monitoring.tokens import SampledTokens

__all__ = [
    "Advice",
    "Choice",
    "CollapseWarning",
    "Diagnosis",
    "Finding",
    "Monitor",
    "SampledTokens",
    "Step",
    "diagnose",
    "diagnose_file",
    "recommend",
]
