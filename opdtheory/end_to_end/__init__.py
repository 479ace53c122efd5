"""Whole trainers, audited: their own sampling is played through, and the gradient that they leave is compared."""

from __future__ import annotations

from opdtheory.end_to_end.auditor import audit_trainer, audit_update
from opdtheory.end_to_end.pair import TrainerPair, trainer_pair
from opdtheory.end_to_end.report import TrainerAudit, Variant

__all__ = ["TrainerAudit", "TrainerPair", "Variant", "audit_trainer", "audit_update", "trainer_pair"]
