"""What the evidence of a run says: one module for each kind of question."""

from __future__ import annotations

from opdtheory.monitoring.findings.everything import FORESEES, findings, foresights, setting_of
from opdtheory.monitoring.findings.finding import ALPHA, CONFIDENCE, Finding, Level, Setting

__all__ = ["ALPHA", "CONFIDENCE", "FORESEES", "Finding", "Level", "Setting", "findings", "foresights", "setting_of"]
