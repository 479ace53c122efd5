"""The result of an audit: a verdict, the numbers behind it, and both in words."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from opdtheory.auditing.accompanied import RewardPart
from opdtheory.auditing.checks.numerics import DtypeResult
from opdtheory.auditing.checks.subject import Check
from opdtheory.auditing.effects.dependence import Dependence
from opdtheory.auditing.limits import limits
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.naming.weight_form import WeightForm
from opdtheory.auditing.records import Count, Finite, Identified, VariableLengths, plain
from opdtheory.auditing.reductions import WORDS, AgainstSum
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult
from opdtheory.auditing.scenario import Scenario
from opdtheory.auditing.worlds import World
from opdtheory.choices import FAITHFUL, Reduction, Verdict
from opdtheory.exact.expectation import Sampled
from opdtheory.objective import Objective
from opdtheory.rendering import text
from opdtheory.rendering.table import Table

__all__ = ["COMPUTED", "NOT_JSON", "PAIR_COLUMNS", "SCHEMA_VERSION", "Audit", "PairResult", "Remedy"]

SCHEMA_VERSION = 1

# Fields of an audit that JSON splits into objective, granularity and settings.
NOT_JSON = ("claim", "scenario")

# Properties that JSON holds beside the fields.
COMPUTED = ("objective", "granularity", "passes", "faithful", "limits", "descends", "settings")

PAIR_COLUMNS = ("pair", "relative bias", "cosine", "variance", "full-vocab variance")

# A slope at the teacher this small, relative to the weight's range, may be the error of a finite difference.
_FLAT = 1e-6

# An objective this far off is not the nearest but one of many that are not near.
_NONE_NEAR = 0.98

# Checks that repeat the verdict, and checks of extreme numbers, which are about range and not about the claim.
_OF_THE_VERDICT = ("stationary at the teacher", "one common scale", "error at the best scale")
_OF_THE_RANGE = ("finite at probability 1e-30", "finite where the teacher gives zero", "extreme padding is ignored")

# The check that fails where the teacher is absent from the gradient.
_TEACHER = "depends on the teacher"


@dataclass(frozen=True)
class PairResult:
    """One row of an audit's table.

    Attributes:
        label: name of the student-teacher pair.
        relative_bias: `|E g - exact| / |exact|`.
        cosine: cosine between the expected and the exact gradient.
        variance: trace of the covariance of one batch's gradient.
        full_vocabulary_variance: the same for the whole-vocabulary estimator of the claimed divergence, whose only
            randomness is the prefix.
    """

    label: str
    relative_bias: float
    cosine: float
    variance: float
    full_vocabulary_variance: float

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, by `PAIR_COLUMNS`."""
        variances = (f"{value:.3e}" for value in (self.variance, self.full_vocabulary_variance))
        return self.label, f"{self.relative_bias:.2e}", f"{self.cosine:+.6f}", *variances


@dataclass(frozen=True)
class Remedy:
    """A change to a loss that is not faithful to its claim.

    Attributes:
        kind: `sign scale position reduction padding importance slope advantage granularity clip mask detach temperature
            shift differentiate k2 tail vocabulary baseline reward`, two of them joined by a comma, `claim`, `gauge` or
            `replace`.
        text: the change as an imperative sentence, with the formula and the theorem.
        verdict: verdict on the changed loss against the claim; for `claim`, against the other claim.
        relative_bias: relative bias of the changed loss, at scale one.
        verified: whether an audit of the changed loss found it faithful.
        cause: what is wrong by name, in a sentence; empty if the change alone says it.
    """

    kind: str
    text: str
    verdict: str
    relative_bias: float
    verified: bool
    cause: str = ""


@dataclass(frozen=True)
class Audit:
    """What a loss really does, by exact expectation over a panel of enumerated policies.

    Attributes:
        name: name of the loss.
        claim: the claimed objective.
        scenario: what the rollouts looked like.
        verdict: how the expected gradient relates to the claimed one, a key of `VERDICTS`.
        relative_bias: worst over the panel, against the claimed objective at scale one.
        cosine: worst over the panel.
        scale: best common multiple of the claimed gradient.
        tolerance: relative error that counts as rounding.
        identified: the catalogue objective that matches best over all granularities; None if none points the same way.
        weight: the weight that the loss puts on a token, as a function of the ratio.
        pairs: one row per pair of the panel.
        variable_lengths: whether the finding holds when rollouts may end early; None if not examined.
        reduction: the reduction as which the loss is exact where lengths vary; None if as none, or if not examined.
        against_sum: what that reduction costs against the sum over tokens; empty for the sum itself.
        worlds: whether the finding holds beside the panel: other lengths, batches, vocabularies, steps, ratios, dtypes.
        sampled: what a sample of batches had to judge, because there are too many to enumerate: `company`, `order`, or
            nothing, an empty string.
        form: the recovered weight as a formula, with the divergence it implies and its behaviour (T4, T5, T7d); None
            if not examined.
        dependence: what else a token's weight depends on besides its own ratio; None if not examined.
        checks: further properties of a sound loss, such as no gradient on padding.
        numerics: the same loss in lower precision.
        remedies: changes that would make the loss do what it claims, each with its verdict.
        monte_carlo: intervals and sample sizes if the expectation was estimated; None if it is exact.
        reward: the policy gradient of a task's reward, set apart; None without `reward=True`.
        evaluations: number of calls of the loss.
        seconds: duration of the audit.
    """

    name: str
    claim: Objective
    scenario: Scenario
    verdict: Verdict
    relative_bias: float
    cosine: float
    scale: float
    tolerance: Finite
    identified: Identified | None
    weight: RecoveredWeight
    pairs: list[PairResult]
    variable_lengths: VariableLengths | None = None
    reduction: Reduction | None = None
    against_sum: list[AgainstSum] = field(default_factory=list)
    worlds: list[World] = field(default_factory=list)
    sampled: Sampled = ""
    form: WeightForm | None = None
    dependence: Dependence | None = None
    checks: list[Check] = field(default_factory=list)
    numerics: list[DtypeResult] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    monte_carlo: MonteCarloResult | None = None
    reward: RewardPart | None = None
    evaluations: Count = 0
    seconds: Finite = 0.0

    @property
    def objective(self) -> str:
        """The label of the claimed divergence."""
        return self.claim.label

    @property
    def granularity(self) -> str:
        """The claimed granularity: `token_local`, `token_return` or `sequence`."""
        return self.claim.granularity

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `audit`: the fields of the scenario, `gamma`, `reduction`, and `alpha` if it was sampled."""
        found = {**self.scenario.to_dict(), "gamma": self.claim.gamma, "reduction": self.claim.reduction}
        return found if self.monte_carlo is None else {**found, "alpha": self.monte_carlo.alpha}

    @property
    def passes(self) -> bool:
        """Whether the loss does what it claims, up to a constant factor, in every world asked, and is sound."""
        unsound = [check for check in self._failed() if check.name not in _OF_THE_RANGE]
        return self.verdict in FAITHFUL and not unsound and not self._fails_in()

    @property
    def faithful(self) -> bool:
        """Another name of `passes`."""
        return self.passes

    @property
    def limits(self) -> tuple[str, ...]:
        """What was not asked, and which setting asks it, in sentences."""
        return limits(self.scenario, self.worlds, self.sampled, self.monte_carlo is not None)

    def _fails_in(self) -> list[World]:
        return [world for world in self.worlds if world.holds is False]

    def _failed(self) -> list[Check]:
        """The failed checks that say more than the verdict."""
        return [check for check in self.checks if check.passed is False and check.name not in _OF_THE_VERDICT]

    @property
    def descends(self) -> str | None:
        """The label of the catalogue objective whose exact gradient the loss follows; None if there is none."""
        found = self._followed
        # A signed sum of objectives is not in the catalogue.
        return None if found is None or found.terms is not None else found.label

    @property
    def _followed(self) -> Identified | None:
        """The identified objective, if its gradient is that of the loss, to rounding."""
        found = self.identified
        return None if found is None or found.error > self.tolerance or self.verdict == "zero" else found

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that `json.dumps` takes; infinite numbers and NaN become None."""
        computed = {key: getattr(self, key) for key in COMPUTED}
        measured = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NOT_JSON}
        record: dict[str, Any] = plain({"schema_version": SCHEMA_VERSION, **computed, **measured})
        return record

    def summary(self) -> str:
        """The findings in a few sentences."""
        if self.monte_carlo is not None:
            return " ".join(part for part in (self.monte_carlo.words, self._elsewhere()) if part)
        sentences = (
            self._as_mean(),
            "" if self.reward is None else self.reward.words,
            self._claim(),
            self._cause(),
            self._follows(),
            self._shape(),
            self._depends(),
            self._elsewhere(),
            *(check.detail for check in self._failed()),
            self._noise(),
        )
        return " ".join(sentence for sentence in sentences if sentence)

    def __str__(self) -> str:
        rule = f"{self.name}: {self.headline}"
        parts = [rule, "", text.paragraph(self.summary())]
        if self.pairs:
            parts += ["", *Table((PAIR_COLUMNS, *(pair.cells for pair in self.pairs)), "lr").lines()]
        if self.remedies:
            parts += ["", "What would make it right:", *(text.item(_told(remedy)) for remedy in self.remedies)]
        narrow = [f"{r.dtype}: {r.words}" for r in self.numerics if r.regime == "realistic" and _matters(r)]
        if narrow:
            parts += ["", "On realistic logits in narrow dtypes:", *map(text.item, narrow)]
        if self.limits:
            parts += ["", "What was not asked:", *map(text.item, self.limits)]
        return "\n".join(parts)

    @property
    def headline(self) -> str:
        """The verdict in capitals, and that the loss fails beyond the panel if it does."""
        words = self.verdict.replace("_", " ").upper()
        if self.verdict not in FAITHFUL or self.passes:
            return words
        return f"FAILS ({words} ON THE PANEL)"

    def _as_mean(self) -> str:
        """As which mean a loss is exact, and what that costs against the sum over tokens (T11)."""
        if self.reduction not in ("token_mean", "sequence_mean") or not self.against_sum:
            return ""
        how = "rollouts weigh by 1/N within a batch" if self.reduction == "token_mean" else "short rollouts weigh more"
        exact = "Exact" if self.verdict in FAITHFUL or self._follows_claim else "Exact for what it follows"
        costs = _listed([f"{_percent(row.error)} at batches of {row.batch_size}" for row in self.against_sum])
        if self.reduction == "sequence_mean":
            costs = f"{_percent(self.against_sum[0].error)} at every batch size"
        least = min(row.cosine for row in self.against_sum)
        return (
            f"{exact}, as {WORDS[self.reduction]}: {how} (T11). Against the sum over tokens, at the best scale, it is "
            f"off by {costs}, with a cosine of at least {least:.4g}."
        )

    @property
    def _follows_claim(self) -> bool:
        """Whether the loss follows the claimed objective as some reduction, if not as the claimed one."""
        return self.verdict == "biased" and self.reduction is not None

    def _claim(self) -> str:
        claim = f"{self.objective} ({self.granularity}{self.scenario.about})"
        if self.verdict == "exact":
            return f"The expected gradient is exactly that of {claim}."
        if self.verdict == "exact_up_to_scale":
            subject = "At fixed length the" if self._as_mean() and self.scenario.eos is None else "The"
            return f"{subject} expected gradient is exactly that of {claim}, times {self.scale:.6g}."
        if self.verdict == "zero":
            return (
                f"The expected gradient is zero: in expectation this loss descends neither {claim} nor anything else."
            )
        if self.verdict == "other_objective":
            return f"The loss does not descend {claim}."
        if self._follows_claim:
            return ""
        uphill = sum(pair.cosine < 0 for pair in self.pairs)
        turn = f", uphill on {uphill} of {len(self.pairs)} pairs" if uphill else ""
        return (
            f"The expected gradient is not that of {claim}: it is off by up to {_percent(self.relative_bias)} "
            f"of the exact gradient's length, with a cosine down to {self.cosine:.4f}{turn}."
        )

    def _cause(self) -> str:
        """What is wrong by name, if a remedy names it."""
        return next((remedy.cause for remedy in self.remedies if remedy.cause), "")

    def _follows(self) -> str:
        found = self.identified
        if found is None or self.verdict in ("zero", *FAITHFUL) or self._follows_claim:
            return ""
        where = f"{found.label} ({found.granularity})"
        if found.error > self.tolerance:
            # What is wrong by name says more than what is near.
            if self._cause():
                return ""
            if found.error >= _NONE_NEAR:
                return "No catalogue objective is near."
            near = "" if found.error < 0.5 else " and far from it"
            return f"The nearest catalogue objective is {where}, off by {_percent(found.error)} at best scale{near}."
        times = "" if abs(found.scale - 1.0) <= self.tolerance else f" times {found.scale:.6g}"
        return f"Its expected gradient is that of {where}{times}, to {found.error:.0e}."

    def _shape(self) -> str:
        if self.verdict == "zero" or self._follows_claim or not len(self.weight.log_u):
            return ""
        if not self.weight.depends_on_ratio_only and not self.scenario.one_teacher:
            return ""
        # A gradient without the teacher is no function of a ratio to it, whatever it is on a grid of tokens.
        if any(check.name == _TEACHER and check.passed is False for check in self.checks):
            return ""
        if not self.weight.depends_on_ratio_only:
            return "The weight on a token is not a function of the ratio u = teacher/student alone."
        if self.descends is None and not self.weight.explains_panel:
            return (
                "On one-step policies the weight on a token is a function of the ratio u = teacher/student; over "
                "several tokens it depends on more than the token's own ratio."
            )
        sentences = []
        if self.form is not None and self.form.expr is not None and self.descends is None:
            sentences.append(f"The weight on a token is {self.form.expr}, up to a scale and a constant.")
        if not self.weight.non_decreasing:
            sentences.append(f"The weight falls {_intervals(self.weight)}, so no f-divergence is minimised (T4).")
        elif self.form is not None and self.form.expr is not None and not self.form.genuine:
            far = f"|log u| > {float(self.weight.log_u[-1]):.3g}"
            sentences.append(f"The weight falls where {far}, so no f-divergence is minimised there (T4).")
        elif self.descends is None:
            sentences.append("The weight never falls as u grows, so some f-divergence is minimised (T4).")
        slope, span = self.weight.slope_at_teacher, float(self.weight.weight.abs().max())
        if slope < -_FLAT * span:
            sentences.append("The teacher is a repelling fixed point (T5).")
        elif slope <= _FLAT * span:
            sentences.append("The teacher does not attract to first order (T5).")
        return " ".join(sentences)

    def _depends(self) -> str:
        """What else the weight depends on besides the token's own ratio."""
        if self.dependence is None or self.dependence.ratio_only:
            return ""
        return " ".join(self.dependence.words)

    def _elsewhere(self) -> str:
        """The worlds in which the finding does not hold, but for those that differ by the reduction alone."""
        fails = [w for w in self._fails_in() if not (self._as_mean() and w.varies)]
        if not fails:
            return ""
        where = _listed([w.name if w.error is None else f"{w.name} (off by {_percent(w.error)})" for w in fails])
        return f"Beyond the panel it does not hold, even at the best scale, with {where}."

    def _noise(self) -> str:
        """The variance relative to the whole-vocabulary estimator's, if both estimate the same vector up to a scale."""
        if not self.faithful or self.granularity != "token_local":
            return ""
        pairs = [pair for pair in self.pairs if pair.full_vocabulary_variance > 0]
        ratios = [pair.variance / (self.scale**2 * pair.full_vocabulary_variance) for pair in pairs]
        if not ratios or min(ratios) <= 0:
            return ""
        middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if abs(middle - 1.0) < 1e-6:
            return "Its variance is that of the whole-vocabulary estimator."
        return f"At equal scale its variance is {middle:.3g} times that of the whole-vocabulary estimator."


def _listed(parts: list[str]) -> str:
    """The parts with commas, and the last one after `and`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _told(remedy: Remedy) -> str:
    return remedy.text if remedy.verified else f"{remedy.text} (Not verified.)"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g}%" if math.isfinite(ratio) else "any amount"


def _intervals(weight: RecoveredWeight) -> str:
    """Where the weight falls, in words."""
    log_u, falls = weight.log_u, (weight.weight.diff() < 0).tolist()
    starts = [i for i, f in enumerate(falls) if f and (i == 0 or not falls[i - 1])]
    ends = [i + 1 for i, f in enumerate(falls) if f and (i + 1 == len(falls) or not falls[i + 1])]
    spans = [f"[{float(log_u[a]):.3g}, {float(log_u[b]):.3g}]" for a, b in zip(starts, ends, strict=True)]
    return "for log u in " + " and ".join(spans)


def _matters(result: DtypeResult) -> bool:
    """Whether a narrow dtype does worse than round the gradient."""
    return bool(result.overflow or result.lost_gradient or result.sign_changed)
