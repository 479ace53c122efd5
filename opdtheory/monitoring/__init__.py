"""Real runs: what their logged log-probabilities say."""

from __future__ import annotations

from opdtheory.monitoring.diagnosis import diagnose
from opdtheory.monitoring.findings import Finding
from opdtheory.monitoring.monitor import CollapseWarning, Monitor
from opdtheory.monitoring.report import Diagnosis, Step

__all__ = ["CollapseWarning", "Diagnosis", "Finding", "Monitor", "Step", "diagnose"]
