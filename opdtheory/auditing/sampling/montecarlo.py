"""The comparison of an audit by sampling, if batches are too many to enumerate: a verdict as soon as it is certain."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.auditing.records import Identified
from opdtheory.auditing.sampling.bounds import (
    Bounds,
    OnPair,
    Target,
    best_scale,
    certified,
    certified_scale,
    certified_whole,
    excluded,
    least_bias,
    relative_bias,
    scale_range,
)
from opdtheory.auditing.sampling.confidence import bounded_interval, first_count, interval, share_of_look
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult, worded
from opdtheory.auditing.sampling.projections import (
    TABLE_BUDGET,
    Look,
    Residuals,
    controls,
    directions,
    fit_controls,
    pilot,
    splits_into_batches,
)
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.choices import GRANULARITIES, Granularity, Verdict
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, check_between, check_integer
from opdtheory.exact import Loss
from opdtheory.exact.modes import plain_modes
from opdtheory.exact.sampling import Sample, Sampler
from opdtheory.objective import Objective

__all__ = ["ALPHA", "MonteCarloResult", "Search", "monte_carlo_compare"]

# The default error rate of an audit.
ALPHA = 1e-6

# The fewest observations of a pair at its first look, and the growth of their number from look to look.
_FEWEST = 40
_GROWTH = 1.25

# The most logits, and rollouts, in one call of a loss that can take many batches at once.
_LOGITS_AT_ONCE = 2**15
_ROLLOUTS_AT_ONCE = 256

# The number of rollouts for the test whether a loss of one rollout takes many as their mean. Larger batches are always
# drawn apart: rollouts that are coupled in few batches, such as groups of equal returns, would pass any such test.
_TRIED = 64

# If each batch needs its own call, one observation is the mean of this many, which is closer to normal, but of no more
# than this many rollouts, as the mean of a large batch is close to normal already.
_BATCHES_APART = 8
_ROLLOUTS_APART = 64

# No loss is called exact unless its bias in all dimensions is below this share of the exact gradient: few directions
# miss most of a bias that is spread over many.
_WHOLE = 0.5

# A pair whose intervals are narrower than this share of the margin waits for the others.
_PRECISE = 0.2

# The search for a name, and for the scale by pair, may take this many times the batches of the verdict.
_NAMING = 2.0

# Rounding of a gradient, relative to its size, by the dtype of the loss.
_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
_COARSE = 2e-2

# The largest table for which all granularities are tried for a name; above, only the claimed one is.
_SMALL_TABLE = 2**14


@dataclass
class _Pair:
    """One pair, its stream of observations, and what was certain at the latest look at it."""

    stream: Residuals
    basis: Tensor
    claimed: Target
    others: dict[tuple[str, Granularity], Target]
    rounding: float
    looks: int
    bounds: Bounds


def monte_carlo_compare(
    loss: Loss,
    cases: Sequence[Case],
    objective: Objective,
    scenario: Scenario,
    *,
    margin: float = 0.05,
    alpha: float = ALPHA,
    max_batches: int = 20_000,
    seconds: float = 30.0,
    naming: bool = True,
) -> MonteCarloResult:
    r"""Compare a loss's expected gradient with the exact one by sampling, until the verdict is certain.

    Library estimators of known expectation on the same rollouts are subtracted from the gradient $g$ of each batch, and
    the rest is projected on fixed directions. At each of a fixed sequence of counts, the mean of each projection has an
    interval (`interval`). By a union bound over pairs, directions and looks, all of them hold jointly with probability
    `1 - alpha`, so the search may stop at any look. Projections without variance are compared to rounding.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`.
        cases: the pairs; their tables must fit, but their sequences need not be enumerable (`MarkovPolicy` at any
            length).
        objective: the claimed objective.
        scenario: batch size, whether a batch shares its prompt, and the seed of all draws; equal seeds give equal
            results unless `seconds` ends the search.
        margin: relative bias in every direction below which a loss may be called exact; its bias as a whole vector must
            also be certified to be below half of the exact gradient.
        alpha: error rate: the probability that any interval, and so any statement, is wrong.
        max_batches: budget of calls of the loss, over all pairs.
        seconds: wall-clock budget.
        naming: whether to search for the objective that a biased loss follows.

    Raises:
        InvalidArgumentError: a setting is out of range, or the claimed objective has no usable gradient.
        BudgetExceededError: a table is too large.
        LossError: the loss does not return a deterministic, differentiable, finite scalar.
    """
    _check_settings(cases, margin, alpha, max_batches, seconds)
    search = Search(loss, cases, objective, scenario, alpha, max_batches, seconds)
    verdict = search.run(margin)
    if verdict == "biased":
        search.settle(margin)
    name = search.plain_name(margin) if verdict == "biased" and naming else None
    return search.result(verdict, name, margin)


class Search:
    """The streams of all pairs, and what they say about one objective so far.

    Attributes:
        cases: the pairs.
        objective: the objective that the verdict is about.
        pairs: their streams.
        alpha: probability that any of the intervals misses at any look.
        each: the share of `alpha` of each stream.
        first: number of observations of a pair at its first look.
        batches: number of calls of the loss so far.
        rollouts: number of rollouts so far.
        verdict: the latest verdict.
    """

    @plain_modes()
    @torch.no_grad()
    def __init__(
        self,
        loss: Loss,
        cases: Sequence[Case],
        objective: Objective,
        scenario: Scenario,
        alpha: float,
        max_batches: int,
        seconds: float,
    ) -> None:
        self._start = time.perf_counter()
        self._most, self._seconds, self.seed = max_batches, seconds, scenario.seed
        self.generator = torch.Generator().manual_seed(self.seed)
        samplers = [Sampler.build(c.student, c.teacher, c.behavior, TABLE_BUDGET) for c in cases]
        for sampler in samplers:
            if sampler.student.numel() > TABLE_BUDGET:
                raise BudgetExceededError(
                    "a Monte Carlo audit's table", sampler.student.numel(), TABLE_BUDGET, "lower the vocabulary"
                )
        self.same = _ROUNDING.get(_value_dtype(loss, samplers[0].draw(scenario.batch_size, self.generator)), _COARSE)
        few = _TRIED if scenario.batch_size == 1 else 2
        looks = [Look(loss, sampler, scenario.batch_size, few, False, scenario.shared_prompt) for sampler in samplers]
        splits = [splits_into_batches(look, self.generator, self.same) for look in looks]
        self.separable = scenario.batch_size == 1 and all(splits)
        self.objective, self.cases = objective, list(cases)
        self.pairs = [self._pair(case, _sized(look, self.separable)) for case, look in zip(cases, looks, strict=True)]
        self.alpha = alpha
        # A stream for each direction and for the length of each pair, and two that count what differs or is not seen.
        self.each = alpha / (sum(len(pair.basis) + 1 for pair in self.pairs) + 2)
        # Products of successive observations are half as many.
        self.first = max(_FEWEST, 2 * first_count(self.each))
        self.batches = self.rollouts = 0
        self.verdict: Verdict = "undecided"
        self._decisive: list[Bounds] = []

    @plain_modes()
    @torch.no_grad()
    def run(self, margin: float) -> Verdict:
        """Draw until the verdict on the objective is certain or the budget ends, and return the verdict."""
        while self.batches < self._most and not self._late():
            self.advance(margin, self._most)
            self.verdict = self.judge(margin)
            if self.verdict != "undecided":
                self._decisive = self.all_bounds()
                break
        return self.verdict

    @plain_modes()
    @torch.no_grad()
    def plain_name(self, margin: float) -> Identified | None:
        """The catalogue objective without a parameter that the loss follows, after further draws if they may help."""
        last = min(self._most, int(_NAMING * self.batches))
        while (name := self.follows(margin)) is None and self.nameable():
            if self.batches >= last or self._late():
                break
            self.advance(margin, last)
        return name

    @plain_modes()
    @torch.no_grad()
    def settle(self, margin: float) -> None:
        """After a verdict of bias, draw on while each pair may follow a multiple of its own that is not certain yet."""
        last = min(self._most, math.ceil((1.0 + _NAMING) * self.batches))
        while self._open(margin) and self.batches < last and not self._late():
            self.advance(margin, last)

    def _open(self, margin: float) -> bool:
        found = self._by_pair(self.all_bounds(), self.claimed)
        if any(pair.scale[1] <= 0.0 or pair.error[0] > margin for pair in found):
            return False
        return any(pair.seen > margin for pair in found)

    def _by_pair(self, bounds: list[Bounds], targets: list[Target]) -> list[OnPair]:
        return [OnPair.of(c.label, b, t) for c, b, t in zip(self.cases, bounds, targets, strict=True)]

    def _late(self) -> bool:
        return time.perf_counter() - self._start >= self._seconds

    def _pair(self, case: Case, look: Look) -> _Pair:
        objective, sampler = self.objective, look.sampler
        found = controls(case, sampler, objective.terms[0][1], objective.granularity, objective.gamma, look.batch_size)
        exact = objective.terms[0][0] * found[0].mean
        for coefficient, divergence in objective.terms[1:]:
            more = controls(case, sampler, divergence, objective.granularity, objective.gamma, look.batch_size)
            exact = exact + coefficient * more[0].mean
            found += more
        if float(exact.norm()) == 0.0:
            raise InvalidArgumentError("objective", f"must have a nonzero gradient, got {objective.label}")
        tables = _catalogue(case, sampler, objective.granularity)
        mine = {divergence.name for _, divergence in objective.terms}
        others = [t for (name, where), t in tables.items() if name in mine or where == objective.granularity]
        basis = directions(sampler, exact, others, self.generator)
        observed, known, _ = pilot(look, basis, found, self.generator)
        size = float(observed.square().sum(-1).mean().sqrt())
        factors = fit_controls(observed, known, self.same)
        rounding = self.same * max(size, 1e-300)
        return _Pair(
            Residuals(look, basis, found, factors, rounding),
            basis,
            Target.of(exact, basis),
            {key: Target.of(table, basis) for key, table in tables.items()},
            rounding,
            0,
            Bounds.unknown(exact, basis),
        )

    def advance(self, margin: float, limit: int) -> None:
        """Draw until every pair that is not precise enough has a quarter more observations, and look at it."""
        precise = [self._precise(pair, margin) for pair in self.pairs]
        for pair, skip in zip(self.pairs, precise, strict=True):
            if skip and not all(precise):
                continue
            seen = pair.stream.projections.count
            for _ in range(max(self.first, math.ceil(_GROWTH * seen)) - seen):
                if self.batches >= limit:
                    return  # Without a look, as its count would depend on the draws.
                pair.stream.observe(self.generator)
                self.batches += pair.stream.look.calls
                self.rollouts += pair.stream.look.rollouts
            self._look_at(pair)

    def _precise(self, pair: _Pair, margin: float) -> bool:
        bounds = pair.bounds
        widest = float((bounds.high - bounds.low).max()) / 2.0
        unit = abs(float(bounds.low[0] + bounds.high[0])) / 2.0 if math.isfinite(widest) else 0.0
        return widest <= _PRECISE * margin * min(unit, pair.claimed.size)

    def _look_at(self, pair: _Pair) -> None:
        """Update what is certain about the expected gradient on one pair."""
        pair.looks += 1
        stream, level = pair.stream, self.each * share_of_look(pair.looks)
        low, high = interval(stream.projections, level)
        at = pair.basis @ stream.known
        _, squared = interval(stream.products, level)
        unseen = math.sqrt(max(float(squared[0]), 0.0)) + pair.rounding
        pair.bounds = Bounds(at + low - pair.rounding, at + high + pair.rounding, stream.known, at, unseen)

    def judge(self, margin: float) -> Verdict:
        """A verdict that is certain at the joint level, or `undecided`."""
        bounds, targets = self.all_bounds(), self.claimed
        allowed = scale_range(bounds, targets)
        if allowed is None or allowed[1] < 0.0:
            return "biased"
        if all(b.largest() <= margin * t.size for b, t in zip(bounds, targets, strict=True)):
            if allowed[0] <= 0.0:
                return "zero"
        as_claimed, scale = allowed[0] <= 1.0 <= allowed[1], best_scale(allowed)
        if not math.isfinite(scale) or scale <= 0.0:
            return "undecided"
        if certified(bounds, targets, scale) > margin or certified_whole(bounds, targets, scale) > _WHOLE:
            return "undecided"
        return "exact" if as_claimed else "exact_up_to_scale"

    def follows(self, margin: float) -> Identified | None:
        """The catalogue objective that is certified to within the margin; the nearest if several are."""
        bounds = self.all_bounds()
        best: Identified | None = None
        for name, where in self._others():
            found = certified_scale(bounds, [pair.others[name, where] for pair in self.pairs])
            if found is not None and found[1] <= margin and (best is None or found[1] < best.error):
                best = Identified(name, where, {}, *found)
        return best

    def nameable(self) -> bool:
        """Whether some catalogue objective is not excluded yet."""
        bounds, keys = self.all_bounds(), self._others()
        return not all(excluded(bounds, [pair.others[key] for pair in self.pairs]) for key in keys)

    def _others(self) -> list[tuple[str, Granularity]]:
        """The catalogue objectives that have a gradient on every pair."""
        return [key for key in self.pairs[0].others if all(key in pair.others for pair in self.pairs)]

    def excludes(self, objective: Objective) -> bool:
        """Whether some direction on some pair excludes every positive multiple of an objective."""
        return excluded(self.all_bounds(), self.targets(objective))

    def all_bounds(self) -> list[Bounds]:
        """What is certain about the expected gradient on each pair."""
        return [pair.bounds for pair in self.pairs]

    @property
    def claimed(self) -> list[Target]:
        """The exact gradients of the objective, one per pair."""
        return [pair.claimed for pair in self.pairs]

    def targets(self, objective: Objective) -> list[Target]:
        """The exact gradients of any objective, one per pair."""
        return [
            Target.of(pair.stream.look.sampler.stack(case.exact(objective)).flatten(), pair.basis)
            for pair, case in zip(self.pairs, self.cases, strict=True)
        ]

    def certify(self) -> tuple[float, float] | None:
        """The scale of the objective and the bias certified in all directions, relative to that multiple."""
        return certified_scale(self.all_bounds(), self.claimed)

    @property
    def hidden(self) -> float | None:
        """The largest probability of a difference, if the loss was one combination of controls on all rollouts."""
        different, most = self._hidden()
        return most if different == 0 else None

    def _hidden(self) -> tuple[int, float]:
        different = sum(pair.stream.different for pair in self.pairs)
        observations = sum(pair.stream.projections.count for pair in self.pairs)
        return different, bounded_interval(different, observations, self.each)[1]

    @property
    def unseen(self) -> float:
        """The largest probability per call of any one event that no call showed."""
        return bounded_interval(0, self.batches, self.each)[1]

    def result(
        self, verdict: Verdict, follows: Identified | None, margin: float, alpha: float | None = None
    ) -> MonteCarloResult:
        """The findings, also in words, with the error rate of the whole audit that this search is a part of."""
        alpha = self.alpha if alpha is None else alpha
        bounds, targets = self.all_bounds(), self.claimed
        # Later looks are more precise, but may exclude a little less; the words should fit the verdict.
        if verdict == "biased" and self._decisive and not excluded(bounds, targets):
            bounds = self._decisive
        biases = [relative_bias(b, t) for b, t in zip(bounds, targets, strict=True)]
        cosines = [b.cosine(t) for b, t in zip(bounds, targets, strict=True)]
        bias = (max(low for low, _ in biases), max(high for _, high in biases))
        cosine = (min(low for low, _ in cosines), min(high for _, high in cosines))
        result = MonteCarloResult(
            verdict=verdict,
            relative_bias=bias,
            least_bias=least_bias(bounds, targets),
            cosine=cosine,
            scale=scale_range(bounds, targets),
            by_pair=self._by_pair(bounds, targets),
            follows=follows,
            directions=sum(len(pair.basis) for pair in self.pairs),
            identical=self.hidden is not None,
            hidden=self._hidden()[1],
            unseen=self.unseen,
            batches=self.batches,
            rollouts=self.rollouts,
            separable=self.separable,
            alpha=alpha,
            confidence=1.0 - alpha,
            margin=margin,
            seed=self.seed,
            seconds=time.perf_counter() - self._start,
            words="",
        )
        return worded(result, f"{self.objective.label} ({self.objective.granularity})")


def _catalogue(case: Case, sampler: Sampler, granularity: str) -> dict[tuple[str, Granularity], Tensor]:
    """Exact gradients of the entries without a parameter, flat, except those that are zero, infinite or intractable."""
    small = sampler.student.numel() <= _SMALL_TABLE
    found = {}
    for where in sorted(GRANULARITIES, key=lambda name: name != granularity):
        if where != granularity and not small:
            continue
        for name in divergences.names():
            try:
                gradient = case.exact(Objective.of(divergences.divergence(name), where))
            except InvalidArgumentError:
                continue
            found[name, where] = sampler.stack(gradient).flatten()
    return {key: table for key, table in found.items() if float(table.norm()) > 0.0}


def _sized(look: Look, separable: bool) -> Look:
    """The look with as many batches in one observation as pay."""
    if not separable:
        return replace(look, batches=min(_BATCHES_APART, math.ceil(_ROLLOUTS_APART / look.batch_size)))
    most = min(_ROLLOUTS_AT_ONCE, _LOGITS_AT_ONCE // (look.sampler.horizon * look.sampler.student.shape[-1]))
    return replace(look, batches=max(1, most // look.batch_size), at_once=True)


def _value_dtype(loss: Loss, sample: Sample) -> torch.dtype:
    with torch.enable_grad():
        value = loss(sample.rollouts)
    return value.dtype if isinstance(value, Tensor) else torch.float64


def _check_settings(cases: Sequence[Case], margin: float, alpha: float, max_batches: int, seconds: float) -> None:
    if not cases:
        raise InvalidArgumentError("cases", "must hold at least one pair, got none")
    check_between("margin", margin, 0.0, 1.0)
    check_between("alpha", alpha, 0.0, 0.5)
    check_integer("max_batches", max_batches)
    check_between("seconds", seconds)
