"""From a loss function to the divergence it really minimises."""

from opdtheory.auditing.auditor import audit, quick_verdict
from opdtheory.auditing.report import Audit, PairResult
from opdtheory.choices import VERDICTS

__all__ = ["VERDICTS", "Audit", "PairResult", "audit", "quick_verdict"]
