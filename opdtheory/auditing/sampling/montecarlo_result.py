"""The findings of a Monte Carlo audit, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opdtheory.auditing.records import Count, Finite, Identified, Interval, Keyed
from opdtheory.auditing.sampling.bounds import OnPair
from opdtheory.choices import Verdict

__all__ = ["MonteCarloResult", "odds", "worded"]


@dataclass(frozen=True, eq=False)
class MonteCarloResult(Keyed):
    """What sampling says about a loss's expected gradient.

    Attributes:
        verdict: `exact`, `exact_up_to_scale`, `zero`, `biased` or `undecided`.
        relative_bias: interval of `|E g - exact| / |exact|` at scale one on the worst pair: the low end from the
            directions, the high end from the squared length of the whole vector.
        least_bias: lower bound on the same distance from the best common positive multiple, relative to that multiple.
        cosine: interval of the smallest cosine over the pairs.
        scale: interval of the common multiples of the claimed gradient that no direction excludes; None if all are
            excluded.
        by_pair: each pair beside the multiple that is nearest on that pair.
        follows: the objective that the loss is certified to follow instead, whose `error` is an upper bound in all
            directions, relative to it; None if there is none.
        directions: number of directions along which the gradient was measured, over all pairs.
        identical: whether the loss's gradient was that of one combination of library estimators on all rollouts.
        hidden: nonasymptotic upper bound on the probability that an observation (a call, or a few batches of a loss
            that couples its rollouts) differs from that combination, averaged over the pairs.
        unseen: nonasymptotic upper bound on the probability per call of any one event that no call showed, such as a
            difference if `identical`, averaged over the pairs.
        batches: number of calls of the loss over all pairs, without those of the pilot.
        rollouts: number of rollouts in these calls.
        separable: whether the loss sees one rollout and takes many as their mean, so that many were drawn at once.
        alpha: error rate: the probability that any statement of the audit is wrong.
        confidence: one minus `alpha`, the joint level over statements, pairs, directions and all times.
        margin: bias, relative to the exact gradient, below which a verdict counts as certain.
        seed: seed of all draws.
        seconds: wall-clock time.
        words: the findings in sentences.
    """

    verdict: Verdict
    relative_bias: Interval
    least_bias: Finite
    cosine: Interval
    scale: Interval | None
    by_pair: list[OnPair]
    follows: Identified | None
    directions: Count
    identical: bool
    hidden: Finite
    unseen: Finite
    batches: Count
    rollouts: Count
    separable: bool
    alpha: Finite
    confidence: Finite
    margin: Finite
    seed: int
    seconds: Finite
    words: str

    @property
    def same_direction(self) -> bool:
        """Whether each pair's gradient is certified, within the margin, to be some multiple of the exact one."""
        return all(pair.seen <= self.margin for pair in self.by_pair)


def worded(result: MonteCarloResult, claim: str) -> MonteCarloResult:
    """The result with its findings in sentences, which say no more than was certified."""
    margin, high, pairs = f"{100 * result.margin:g}%", result.relative_bias[1], len(result.by_pair)
    where = f"{result.directions} directions on {pairs} pair{'s' if pairs > 1 else ''}"
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
        sentences.append(_direction(result, claim, where) if result.same_direction else _biased(result, claim))
        if result.follows is not None:
            sentences.append(_followed(result.follows))
    else:
        low = result.relative_bias[0]
        found = f" It is off by at least {_percent(low)} at scale one, perhaps only by a factor." if low > 0 else ""
        sentences.append(f"The budget ended before a verdict on {claim} was certain.{found}")
    if math.isfinite(high) and result.verdict in ("exact", "undecided"):
        sentences.append(f"The bias as a whole vector is below {100 * high:.2g}% of the exact gradient.")
    sentences.append(
        f"Such an audit is wrong at most {odds(result.alpha)} (alpha={result.alpha:g}): all intervals hold jointly, "
        f"whenever it stops. This one drew {result.rollouts:,} rollouts in {result.batches:,} calls."
    )
    if result.identical:
        sentences.append(
            "On all of them the gradient was that of a fixed combination of estimators of known expectation; a "
            f"difference that shows in fewer than {100 * result.unseen:.2g}% of calls may have gone unseen."
        )
    else:
        sentences.append(f"An event in fewer than {100 * result.unseen:.2g}% of calls may have gone unseen.")
    return replace(result, words=" ".join(sentences))


def odds(alpha: float) -> str:
    """An error rate in words, rounded up: `once in 20 audits`."""
    many = math.floor(1.0 / alpha * (1.0 + 1e-12))
    return f"once in {'a million' if many == 10**6 else f'{many:,}'} audits"


def _biased(result: MonteCarloResult, claim: str) -> str:
    """How far the gradient is from every multiple of the claimed one."""
    if result.cosine[1] <= 0.0:
        at_one = _percent(result.relative_bias[0])
        return f"The expected gradient is not that of {claim} at any scale: it points uphill, off by at least {at_one}."
    text = f"The expected gradient is not that of {claim} at any scale: at the best one it is "
    return (
        f"{text}off by at least {_percent(result.least_bias)}, and at scale one by {_percent(result.relative_bias[0])}."
    )


def _direction(result: MonteCarloResult, claim: str, where: str) -> str:
    """The scale by pair of a gradient whose direction is right."""
    seen = max(pair.seen for pair in result.by_pair)
    low, high = (pick(pair.scale[i] for pair in result.by_pair) for i, pick in ((0, min), (1, max)))
    text = (
        f"The direction is that of {claim} on every pair, to within {_percent(seen)} in {where} (cosine at least "
        f"{_cosine(result.cosine[0])}), "
    )
    apart = max(pair.scale[0] for pair in result.by_pair) > min(pair.scale[1] for pair in result.by_pair)
    if not apart:
        return f"{text}but it is not exactly that of any multiple: it is off by at least {_percent(result.least_bias)}."
    return (
        f"{text}but the scale differs by pair, from {low:.4g} to {high:.4g}: every common multiple is off by at least "
        f"{_percent(result.least_bias)}."
    )


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g}%" if ratio < 10.0 else f"{100 * ratio:,.0f}%"


def _cosine(value: float) -> str:
    """As many digits as tell it from one, rounded down."""
    digits = 4 if value < 0.999 else min(12, 2 + math.ceil(-math.log10(max(1.0 - value, 1e-12))))
    return f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}"


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
