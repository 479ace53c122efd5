"""Findings on what variance could be saved, and what lengths and tails do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opdtheory.monitoring.evidence import LIKELY, leave_one_out
from opdtheory.monitoring.findings.finding import Finding, Setting, share
from opdtheory.monitoring.measures import tail_index
from opdtheory.monitoring.sums import COLUMNS, Sums, number_of

__all__ = ["baseline", "length", "tail", "top_k"]

# A mean weight below this pushes too little to speak of centring.
_PUSHES = 0.1

_SQUARE = COLUMNS.index("square")


def length(s: Setting) -> Iterator[Finding]:
    """A constant in the weight, which a division by lengths turns into a push on lengths."""
    reduction = s.loss.reduction
    rollouts, lengths, squared, weights = leave_one_out(s.evidence.lengths).unbind(-1)
    mean = lengths / rollouts
    varies = float(squared[0] / rollouts[0] - mean[0].square()) > 1e-9 * float(mean[0].square())
    if reduction == "token_sum" or not varies:
        return
    constant = number_of(weights / lengths)
    whole = reduction == "sequence_mean"
    by = "its own length" if whole else "the number of tokens in the batch"
    size = "" if whole else f", at about 1/{max(1.0, s.batch_tokens / float(mean[0])):.0f} of its size"
    way = "longer" if constant.value < 0 else "shorter"
    yield Finding(
        "length",
        "note",
        f"Each rollout is divided by {by} and the mean weight is {constant}, which pushes answers to be {way}{size} "
        "(T11, T18).",
        constant,
        "mean weight of a token",
        "T11, T18",
        "Centre the weight: opd_plus_centred, or a baseline." if abs(constant.value) > _PUSHES else "",
    )


def baseline(s: Setting) -> Iterator[Finding]:
    """What the best constant baseline saves."""
    m = s.measured
    if m.noise.value > 0 and not s.loss.settings.get("baseline"):
        yield Finding(
            "baseline",
            "note",
            f"A constant baseline of {m.best_constant.value:.3g} would save {share(m.saving)} of the second moment "
            "of a token's gradient (T7a).",
            m.saving,
            "share of the second moment that the best constant saves",
            "T7a",
        )


def top_k(s: Setting) -> Iterator[Finding]:
    """What an exact sum over the teacher's likeliest tokens saves at least."""
    if s.measured.noise.value <= 0 or s.loss.name.startswith("topk") or s.loss.name == "full_vocab":
        return
    parts = [_noise_by_group(s, sums) for sums in (s.evidence.sampled, s.evidence.likely)]
    totals = leave_one_out(torch.stack(parts, -1))
    number = number_of(totals[:, 1] / totals[:, 0]).within(0.0, 1.0)
    yield Finding(
        "top_k",
        "note",
        f"At least {share(number)} of the second moment comes from tokens among the teacher's {LIKELY} likeliest; an "
        "exact sum over these takes it away (T13).",
        number,
        f"least share of the second moment on the teacher's {LIKELY} likeliest tokens",
        "T13",
    )


def _noise_by_group(s: Setting, sums: Sums) -> Tensor:
    """The sum of (A - c)^2 |s|^2 in each group of rollouts."""
    tokens, log_u = sums.total[:2]
    some = tokens > 0
    centred = s.weight(log_u[some] / tokens[some]) - s.measured.best_constant.value
    return (sums.table[_SQUARE][:, some] * centred.square()).sum(-1)


def tail(s: Setting) -> Iterator[Finding]:
    """How heavy the upper tail of u is."""
    points, tables = s.evidence.own.occupied()
    index = tail_index(points.exp(), tables[:, 0])
    if index is not None:
        heavy = (index.value if index.low is None else index.low) < 2
        follows = ", so a weight that grows like u may have no finite variance" if heavy else ""
        yield Finding(
            "tail",
            "note",
            f"P(u > t) falls like t to the power -{index.value:.2g} in the upper tail{follows} (T7d).",
            index,
            "Hill's index of the largest hundredth of u",
            "T7d",
        )
