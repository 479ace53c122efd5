"""The words that arguments choose from, each list once."""

from __future__ import annotations

from typing import Literal

__all__ = ["Control", "Granularity", "Reduction", "Verdict"]

Control = Literal["constant_advantage", "supervised", "exact_opd"]

Granularity = Literal["token_local", "token_return", "sequence"]

Verdict = Literal["exact", "exact_up_to_scale", "other_objective", "zero", "biased"]

Reduction = Literal["token_sum", "token_mean", "sequence_mean"]
