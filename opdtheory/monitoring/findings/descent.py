"""Findings on what the estimator descends: where its weight falls, what a clip makes of it, whether noise drowns it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from opdtheory.estimators import estimator
from opdtheory.monitoring.findings.finding import CONFIDENCE, Finding, Setting, share
from opdtheory.monitoring.measures import measured, moment
from opdtheory.monitoring.sums import COLUMNS, Number, number_of
from opdtheory.monitoring.weights import weight_of

__all__ = ["clipping", "collapse", "collapsed", "gauge", "no_pull", "no_signal", "noise"]

# Below this signal to noise of a whole batch, with every token pulling the same way, its step is noise.
_LOUD = 5.0

# A clip that changes more than this share of the step, on more than a hundredth of the tokens, is no safeguard.
_CHANGED, _OFTEN = 0.5, 0.01

# A student that is this certain, and this far from the teacher in nats per token, has collapsed.
_CERTAIN, _FAR = 0.02, 1.0

_LENGTH, _SQUARE = COLUMNS.index("length"), COLUMNS.index("square")


def collapse(s: Setting) -> Iterator[Finding]:
    """The weight falls where the tokens are: on average over the scores, or on most tokens without a pull at u = 1."""
    falls, slope, pull = s.measured.falls, s.measured.slope, s.measured.pull
    repels = slope.high is not None and slope.high < 0
    mostly = falls.low is not None and falls.low > 0.5 and pull <= 0
    if not (repels or mostly):
        return
    at_teacher = "and even at the teacher it repels"
    if pull >= 0:
        at_teacher = "although it attracts near the teacher" if pull > 0 else "and at the teacher nothing pulls back"
    yield Finding(
        "collapse",
        "warning",
        f"The weight of {s.label} falls on {share(falls)} of the tokens (T4), {at_teacher} (T5): a collapse "
        "is to be expected.",
        slope,
        "mean slope of the weight over log u, by squared score",
        "T4, T5",
        _instead(s),
    )


def _instead(s: Setting) -> str:
    """The corrected weight of the same divergence, unless its noise would drown the same tokens."""
    loss = estimator("opd_plus", s.loss.claim.divergence)
    weight = weight_of(loss)
    found = replace(s, loss=loss, weight=weight, measured=measured(weight, s.evidence.own, CONFIDENCE))
    if next(noise(found), None) is None:
        return f"Use opd_plus with {s.divergence}: its weight rises everywhere."
    return (
        f"opd_plus with {s.divergence} has a weight that rises everywhere, but its noise would drown a batch of these "
        "tokens: use opd_plus with jsd or hellinger."
    )


def collapsed(s: Setting) -> Iterator[Finding]:
    """The student is certain of what the teacher would not write: no token has a gradient any more."""
    points, tables = s.evidence.own.occupied()
    open_minded = number_of(tables[:, _LENGTH].sum(-1) / tables[:, 0].sum(-1))
    distance = number_of(moment(torch.neg)(points, tables))
    if open_minded.value < _CERTAIN and distance.value > _FAR:
        yield Finding(
            "collapsed",
            "warning",
            f"The student gives its tokens a mean probability of {1 - open_minded.value:.3g} and is "
            f"{distance.value:.2g} nats a token from the teacher: it has collapsed onto answers of its own, where "
            "the score, and with it every gradient of a sampled token, vanishes (T5).",
            distance,
            "KL(p|q), nats per token",
            "T5",
            "Start again from a checkpoint before the collapse; no estimator of the sampled token leads out of it.",
        )


def noise(s: Setting) -> Iterator[Finding]:
    """The gradient of a token has no finite variance, and a batch is louder than any step its tokens could make."""
    signal, index, root = s.measured.signal, s.measured.tail, math.sqrt(s.batch_tokens)
    if s.measured.slope.value <= 0 or index is None or index.high is None or index.high >= 2:
        return
    at_best = signal.value * root
    if at_best >= _LOUD:
        return
    yield Finding(
        "noise",
        "warning",
        f"The weight of {s.label} points to the teacher, but its noise has no finite variance here (tail index "
        f"{index}, below 2) and an effective {share(s.measured.carried)} of the tokens carry the step: even if all "
        f"{s.batch_tokens:,.0f} tokens of a batch pulled together, signal to noise would be {at_best:.2g} (T7d).",
        index,
        "tail index of the length of a token's gradient",
        "T7d",
        "Use a divergence whose weight grows slowly (reverse_kl, jsd, hellinger), sum over the teacher's top tokens "
        "(topk_tail_sampled, T13), or take far more tokens a step.",
    )


def no_signal(s: Setting) -> Iterator[Finding]:
    """The weight is a constant, so its expected gradient is zero."""
    if s.measured.is_constant:
        yield Finding(
            "no_signal",
            "warning",
            f"The weight of {s.label} is the same for all tokens: its expected gradient is zero, and the run learns "
            "nothing (T18).",
            s.measured.slope,
            "mean slope of the weight over log u, by squared score",
            "T18",
            f"Use opd_plus with {s.divergence}.",
        )


def no_pull(s: Setting) -> Iterator[Finding]:
    """The teacher does not attract to first order."""
    pull = s.measured.pull
    if pull > 0 or s.measured.is_constant:
        return
    how = (
        "falls, so that a student at the teacher leaves it" if pull < 0 else "is level, so that nothing holds a student"
    )
    yield Finding(
        "no_pull",
        "note",
        f"At u = 1 the weight of {s.label} {how} (T5).",
        Number(pull),
        "slope of the weight at u = 1",
        "T5",
    )


def gauge(s: Setting) -> Iterator[Finding]:
    """Cut importance weights, and a weight that is not zero at the teacher."""
    at_one = s.measured.at_one
    if s.importance in ("tis", "mask", "sequence_mask") and abs(at_one) > 1e-9:
        yield Finding(
            "gauge",
            "warning",
            f"The weight is {at_one:.3g} at u = 1, so with importance={s.importance!r} the teacher is no fixed point "
            f"(T14).",
            Number(at_one),
            "weight at u = 1",
            "T14",
            "Use opd_plus_centred, whose weight is zero there.",
        )


def clipping(s: Setting) -> Iterator[Finding]:
    """A clip of the log-ratio or of the advantage: how often it holds, and how much of the step it changes."""
    weight = s.weight
    if weight.clip is None and weight.bounds is None:
        return
    often = s.sums.number(moment(lambda x: weight.is_clipped(x).to(x.dtype)))

    def changed(points: Tensor, tables: Tensor) -> Tensor:
        length, square = tables[:, _LENGTH], tables[:, _SQUARE]
        free = weight.unclipped(points)
        lost = free - weight(points)
        # A constant changes no expected gradient.
        sides = [(x - ((square * x).sum(-1) / square.sum(-1)).unsqueeze(-1)).abs() for x in (lost, free)]
        above, below = ((length * side).sum(-1) for side in sides)
        return above / below.clamp_min(1e-300)

    number = s.sums.number(changed)
    much = number.value > _CHANGED and often.value > _OFTEN
    yield Finding(
        "clipping",
        "warning" if much else "note",
        f"A clip holds the weight on {share(often)} of the tokens and changes {share(number)} of the step"
        + (f": what is descended is another divergence than {s.divergence} (T4)." if much else " (T4)."),
        number,
        "share of the step, by length of the score, that the clip changes",
        "T4",
        "Widen the clip, or claim the divergence that the clipped weight descends." if much else "",
    )
