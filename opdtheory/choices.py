"""The words that arguments and results choose from, each list once. No torch here: the command line imports them."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = [
    "ACCUMULATIONS",
    "FAITHFUL",
    "CLAIMED_REDUCTIONS",
    "GRANULARITIES",
    "HISTORIES",
    "LENGTHS",
    "METHODS",
    "REDUCTIONS",
    "VERDICTS",
    "Accumulation",
    "Baseline",
    "ClaimedReduction",
    "Control",
    "Granularity",
    "Histories",
    "Importance",
    "Lengths",
    "Reduction",
    "Support",
    "Verdict",
]

# The three objectives that are often confused (T6).
Granularity = Literal["token_local", "token_return", "sequence"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

# How the losses of tokens become one number (T11).
Reduction = Literal["token_sum", "token_mean", "sequence_mean"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

# Whose histories an objective is about: the student's, or those of the policy that sampled (T15).
Histories = Literal["student", "sampler"]
HISTORIES: tuple[Histories, ...] = get_args(Histories)

# How the gradients of micro-batches become one (T17).
Accumulation = Literal["mean", "sum"]
ACCUMULATIONS: tuple[Accumulation, ...] = get_args(Accumulation)
# What a claim may say of the reduction: one of them, or that any of them will do.
ClaimedReduction = Literal["token_sum", "token_mean", "sequence_mean", "any"]
CLAIMED_REDUCTIONS: tuple[ClaimedReduction, ...] = get_args(ClaimedReduction)

# Whether rollouts of a fixed length are asked about, of lengths that vary, or both.
Lengths = Literal["both", "fixed", "variable"]
LENGTHS: tuple[Lengths, ...] = get_args(Lengths)

# How an audit computes expectations: all batches, draws of them, or whichever serves.
METHODS = ("auto", "exact", "monte_carlo")

# How an expected gradient relates to that of an objective; `undecided`: sampling ran out of budget.
Verdict = Literal["exact", "exact_up_to_scale", "other_objective", "zero", "biased", "undecided"]
VERDICTS: dict[Verdict, str] = {
    "exact": "its expected gradient is the exact one",
    "exact_up_to_scale": "its expected gradient is the exact one times a constant",
    "other_objective": "it descends another objective than the one claimed",
    "zero": "its expected gradient is zero",
    "biased": "its expected gradient is biased",
    "undecided": "the budget ended before a verdict was certain",
}
FAITHFUL: tuple[Verdict, ...] = ("exact", "exact_up_to_scale")

# What is subtracted from an advantage before it multiplies the score (T7); `rest` is the weight of all tokens that a
# top-k loss does not sum, taken as one (T19b).
Baseline = Literal["constant", "group_mean", "leave_one_out", "vocabulary", "optimal", "rest"]

# Which ratios p/mu weight the rollouts of another policy (T8).
Importance = Literal["token", "prefix", "sequence", "ppo", "tis", "mask", "sequence_mask", "gspo"]

# Whose likeliest tokens a top-k loss keeps (T9).
Support = Literal["teacher", "student"]

# What a training run may descend instead of an estimator.
Control = Literal["constant_advantage", "supervised", "exact_opd"]
