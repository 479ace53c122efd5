"""The findings of a Monte Carlo audit, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opdtheory.auditing.records import Count, Finite, Identified, Interval, Keyed
from opdtheory.choices import Verdict

__all__ = ["MonteCarloResult", "worded"]


@dataclass(frozen=True, eq=False)
class MonteCarloResult(Keyed):
    """What sampling says about a loss's expected gradient.

    Attributes:
        verdict: `exact`, `exact_up_to_scale`, `zero`, `biased` or `undecided`.
        relative_bias: interval of `|E g - exact| / |exact|` at scale one on the worst pair: the low end from the
            directions, the high end from the squared length of the whole vector.
        cosine: interval of the smallest cosine over the pairs.
        scale: interval of the common multiples of the claimed gradient that no direction excludes; None if all are
            excluded.
        follows: the objective that the loss is certified to follow instead, whose `error` is an upper bound in all
            directions, relative to it; None if there is none.
        directions: number of directions along which the gradient was measured, over all pairs.
        identical: whether the loss's gradient was that of one combination of library estimators on all rollouts.
        hidden: nonasymptotic upper bound on the probability that an observation (a call, or a few batches of a loss
            that couples its rollouts) differs from that combination, averaged over the pairs.
        batches: number of calls of the loss over all pairs, without those of the pilot.
        rollouts: number of rollouts in these calls.
        separable: whether the loss is the mean of the losses of its batches, so that many were drawn at once.
        confidence: joint level over pairs, directions and all times.
        margin: bias, relative to the exact gradient, below which a verdict counts as certain.
        seed: seed of all draws.
        seconds: wall-clock time.
        words: the findings in sentences.
    """

    verdict: Verdict
    relative_bias: Interval
    cosine: Interval
    scale: Interval | None
    follows: Identified | None
    directions: Count
    identical: bool
    hidden: Finite
    batches: Count
    rollouts: Count
    separable: bool
    confidence: Finite
    margin: Finite
    seed: int
    seconds: Finite
    words: str


def worded(result: MonteCarloResult, claim: str, pairs: int) -> MonteCarloResult:
    """The result with its findings in sentences, which say no more than was certified on so many pairs."""
    sure, margin = f"{100 * result.confidence:g}%", f"{100 * result.margin:g}%"
    low, high = result.relative_bias
    where = f"{result.directions} directions on {pairs} pair{'s' if pairs > 1 else ''}"
    looked = f"{result.rollouts:,} rollouts in {result.batches:,} calls"
    sentences = []
    if result.verdict == "exact":
        sentences.append(f"No bias against {claim} was found: it is below {margin} of the exact gradient in {where}.")
    elif result.verdict == "exact_up_to_scale" and result.scale is not None:
        sentences.append(
            f"Up to a factor between {result.scale[0]:.4g} and {result.scale[1]:.4g}, no bias against {claim} was "
            f"found: it is below {margin} of that multiple in {where}."
        )
    elif result.verdict == "zero":
        sentences.append(
            f"The expected gradient is zero or nearly so: below {margin} of the length of {claim}'s in {where}."
        )
    elif result.verdict == "biased":
        sentences.append(
            f"The expected gradient is not that of {claim} at any scale: it is off by at least {100 * low:.3g}%."
        )
        if result.follows is not None:
            sentences.append(_followed(result.follows))
    else:
        found = f" It is off by at least {100 * low:.3g}% at scale one, perhaps only by a factor." if low > 0 else ""
        sentences.append(f"The budget ended before a verdict on {claim} was certain.{found}")
    if math.isfinite(high) and result.verdict in ("exact", "undecided"):
        sentences.append(f"The bias as a whole vector is below {100 * high:.2g}% of the exact gradient.")
    sentences.append(
        f"Confidence {sure}, jointly over all intervals and at all times, by asymptotic confidence sequences "
        f"on {looked}."
    )
    if result.identical:
        sentences.append(
            "On all of them the gradient was that of a fixed combination of estimators of known expectation; a "
            f"difference that shows in fewer than {100 * result.hidden:.2g}% of observations may have gone unseen."
        )
    return replace(result, words=" ".join(sentences))


def _followed(f: Identified) -> str:
    """What the loss follows, with the evidence."""
    text = f"It follows {f.label} ({f.where}) times {f.scale:.4g}, to within {100 * f.error:.2g}% in "
    if f.evidence is None:
        return f"{text}the same directions."
    text = f"{text}the directions looked at ({f.evidence})."
    if f.fitted_range is not None:
        low, high = f.fitted_range
        text += f" The values of {f.fitted} around it that are not excluded span {high - low:.2g}."
    return text
