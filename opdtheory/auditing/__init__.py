"""The audit of a loss: from a black box to the divergence that it really minimises."""

from opdtheory.auditing.auditor import audit, quick_verdict
from opdtheory.auditing.report import Audit, PairResult
from opdtheory.choices import VERDICTS

__all__ = ["VERDICTS", "Audit", "PairResult", "audit", "quick_verdict"]
