"""From a loss function to the divergence it really minimises."""

from opdtheory.auditing.auditor import audit
from opdtheory.auditing.report import VERDICTS, Audit, PairResult

__all__ = ["VERDICTS", "Audit", "PairResult", "audit"]
