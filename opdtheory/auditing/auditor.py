"""`audit`: from a loss function to the objective whose gradient it follows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from opdtheory.auditing.accompanied import accompanied, set_apart
from opdtheory.auditing.advice import advised
from opdtheory.auditing.black_box import INSISTS, BlackBox, name_of
from opdtheory.auditing.checks.numerics import numerics
from opdtheory.auditing.checks.soundness import soundness
from opdtheory.auditing.effects.both_probabilities import likeliest_kept
from opdtheory.auditing.effects.dependence import Dependence, dependence
from opdtheory.auditing.fixes.candidates import SUMMED
from opdtheory.auditing.fixes.remedies import remedies
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.fit import Fit, fit_scale, flat
from opdtheory.auditing.naming.identify import ExactGradients, Match, best_match
from opdtheory.auditing.naming.recover import RecoveredWeight, explains_panel, interpolates, recover_weight
from opdtheory.auditing.naming.weight_form import WeightForm, describe
from opdtheory.auditing.panel import Panel, panel_of, wider_panel
from opdtheory.auditing.records import Identified, VariableLengths
from opdtheory.auditing.reductions import against_sum, undone
from opdtheory.auditing.report import Audit, PairResult, Remedy
from opdtheory.auditing.sampling.montecarlo import ALPHA
from opdtheory.auditing.sampling.whole import sampled
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.auditing.worlds import Asked, ask
from opdtheory.choices import FAITHFUL, METHODS, REDUCTIONS, Accumulation, Histories, Reduction, Verdict
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError, LossError, check_between
from opdtheory.exact import GradientMoments, Loss
from opdtheory.exact.modes import plain_modes
from opdtheory.exact.token_mean import token_mean_moments
from opdtheory.objective import Objective

__all__ = ["audit", "quick_verdict"]


def audit(
    loss: Loss,
    objective: str | Divergence = "reverse_kl",
    granularity: str = "token_local",
    *,
    batch_size: int = 1,
    eos: int | None = None,
    off_policy: float = 0.0,
    gamma: float = 1.0,
    seed: int = 0,
    name: str | None = None,
    prompts: int = 1,
    environment: Iterable[int] = (),
    shared_prompt: bool = False,
    reduction: str = "token_sum",
    lengths: str = "both",
    vocabulary: int | None = None,
    tolerance: float | None = None,
    method: str = "auto",
    details: bool = True,
    alpha: float = ALPHA,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    sampling_temperature: float = 1.0,
    histories: Histories = "student",
    teachers: int = 1,
    teacher_weights: Iterable[float] = (),
    base: bool = False,
    extrapolation: float | None = None,
    microbatches: int = 1,
    accumulate: Accumulation = "mean",
    reward: bool = False,
) -> Audit:
    r"""Find out what a loss really minimises, by exact expectation over enumerated policies.

    The loss is run on every batch of rollouts that small random policies can produce. Its expected gradient is
    compared with the exact gradients of the claimed objective and of every catalogue entry, and the weight that it puts
    on a token is recovered as a function of `u = teacher/student`. Batches too large to enumerate are sampled until the
    verdict is certain. A loss that follows an objective there is then asked whether it does so in other worlds: where
    rollouts end early, after a prompt, in batches of other sizes, over a larger vocabulary, more steps, larger
    log-ratios, in float32. `report.passes` is true only if it does; `report.limits` says what was not asked.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`, deterministic and stateless.
        objective: the divergence that it claims to minimise: an object, a catalogue name, or a weighted sum of these
            such as `"9*reverse_kl + forward_kl"`.
        granularity: `token_local`, `token_return` or `sequence`.
        batch_size: number of rollouts that the loss sees at once; at least 2 for losses that compare rollouts.
        eos: the token, one of the panel's vocabulary, that ends a rollout early; None for a panel of fixed length,
            beside which `lengths` says what else is asked.
        off_policy: standard deviation of the noise on the logits of the sampling policy.
        gamma: discount of `token_return`.
        seed: seed of the panel.
        name: name in the report (default: the function's own).
        prompts: number of prompts; from 2 on, position 0 of every rollout holds one of them, masked.
        environment: positions of the response, from 0 to 2, that an environment writes, such as a tool's result.
        shared_prompt: whether the rollouts of a batch answer one prompt, as a group of GRPO does.
        reduction: the claimed reduction (T11): `token_sum` (sum over tokens, mean over rollouts), `token_mean`,
            `sequence_mean`, or `any`. A loss is exact as a mean if it is exact once the mean is made a sum.
        lengths: `both`, `fixed` or `variable`: the lengths of rollouts that the claim is about.
        vocabulary: number of the panel's tokens (default: 4, or as many as batches allow, and more for a loss that
            keeps only the k likeliest).
        tolerance: relative error that counts as rounding (default: 1e-9, 1e-4 for a loss in float32, 2e-2 for narrower
            dtypes).
        method: `exact`, `monte_carlo`, or `auto`: exact where batches can be enumerated.
        details: whether to report more than verdict and name: the weight as a formula, what it depends on, soundness
            checks, narrow dtypes, remedies.
        alpha: where batches are sampled, the probability that any statement of the audit is wrong, between 0 and 1/2.
        student_temperature: the claim is about the student softened by it, $D_f(q_\sigma\|p_\tau)$ with
            $p_\tau = \mathrm{softmax}(z_p/\tau)$; the gradient is the one in $z_p$ and carries $1/\tau$ (T16). The
            claim is then token-local, at the histories that `histories` names.
        teacher_temperature: $\sigma$, the same for the teacher.
        sampling_temperature: the temperature of the student's logits at which rollouts are sampled.
        histories: whose prefixes a token-local claim is about: the `student`'s at the sampling temperature, or those of
            the `sampler`, which differ if it is off-policy (T15).
        teachers: number of teachers, `r.teachers`; the claim is the weighted sum of the divergences to them (T16).
        teacher_weights: the weights of that sum (default: equal, with sum one).
        base: whether rollouts hold a third, frozen policy, as `r.base_logits` and `r.base_logprobs`.
        extrapolation: with `base=True`, $\lambda$ of the extrapolated teacher $m \propto q^\lambda b^{1-\lambda}$ that
            takes the place of the teacher in the claim (T16).
        microbatches: number of equal and independent parts of a batch on which the loss is called in turn (T17).
        accumulate: whether the parts' gradients are averaged (`mean`) or added up (`sum`).
        reward: whether rollouts hold a task's reward of each rollout, `r.rewards`. Its policy gradient, at the multiple
            at which the loss holds it, is set apart, and the claim is about the rest.

    Returns:
        An `Audit`; `print` it, or take `.verdict`, `.identified`, `.weight`, `.remedies` and `.to_dict()`.

    Raises:
        InvalidArgumentError: the objective or granularity is unknown, or a setting is out of range.
        LossError: the loss is not a scalar, has no gradient, differs between identical calls, or is NaN.
        BudgetExceededError: `method="exact"`, and batches of this size are too many to enumerate.

    Example:
        >>> def k3(r):
        ...     return r.token_sum(r.log_u.expm1() - r.log_u)
        >>> audit(k3, "reverse_kl").descends
        'forward_kl'
    """
    claim = Objective.of(as_divergence(objective), granularity, gamma, reduction)
    if method not in METHODS:
        raise InvalidArgumentError("method", f"must be one of {', '.join(METHODS)}, got {method!r}")
    if tolerance is not None:
        check_between("tolerance", tolerance, 0.0, 1.0)
    check_between("alpha", alpha, 0.0, 0.5)
    scenario = Scenario.of(
        batch_size,
        microbatches,
        eos=eos,
        off_policy=off_policy,
        seed=seed,
        prompts=prompts,
        environment=tuple(environment),
        shared_prompt=shared_prompt,
        lengths=lengths,
        vocabulary=vocabulary,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        sampling_temperature=sampling_temperature,
        histories=histories,
        teachers=teachers,
        teacher_weights=tuple(teacher_weights),
        base=base,
        extrapolation=extrapolation,
        accumulate=accumulate,
        reward=reward,
    )
    if method == "monte_carlo":
        scenario.check_sampled()
    counted, name, start = BlackBox(accompanied(loss, scenario), tolerance), name or name_of(loss), time.perf_counter()
    with plain_modes(), advised(loss):
        panel = None if method == "monte_carlo" else panel_of(counted, scenario, method)
        if panel is None:
            report = _by_sampling(counted, claim, scenario, name, details, alpha)
        else:
            counted, part = set_apart(loss, scenario, panel.cases, counted)
            report = _exactly(counted, claim, scenario, panel, name, details)
            kept = _kept_of_a_larger_vocabulary(counted, report)
            wider = None if kept is None else wider_panel(scenario, kept)
            if wider is not None:
                scenario, panel = wider
                report = _exactly(counted, claim, scenario, panel, name, details)
            report = replace(report, reward=part)
        if panel is not None and panel.mean_of:
            report = replace(report, remedies=_as_sum(counted, claim, scenario, panel, report))
        elif details and panel is not None:
            # Where each rollout is treated alone, one at a time is enough to try a change.
            tried = replace(report, scenario=scenario.single) if panel.single else report
            report = replace(report, remedies=remedies(counted, report=tried))
        return replace(report, evaluations=counted.calls, seconds=time.perf_counter() - start)


def quick_verdict(
    loss: Loss,
    objective: str | Divergence,
    granularity: str = "token_local",
    *,
    batch_size: int = 1,
    eos: int | None = None,
    off_policy: float = 0.0,
    gamma: float = 1.0,
    seed: int = 0,
    **settings: Any,
) -> str:
    """The verdict of `audit`, without a search for what else the loss might descend.

    The arguments are those of `audit`; `settings` are further fields of `Scenario`, such as `teachers` or `histories`.

    Returns:
        `exact`, `exact_up_to_scale`, `zero` or `biased`; `other_objective` counts as `biased`.

    Raises:
        InvalidArgumentError: as `audit`.
        LossError: as `audit`.
    """
    scenario = Scenario.of(batch_size, eos=eos, off_policy=off_policy, seed=seed, **settings)
    with plain_modes():
        claim, cases = Objective.of(as_divergence(objective), granularity, gamma), scenario.pairs()
        counted, _ = set_apart(loss, scenario, cases, BlackBox(accompanied(loss, scenario)))
        return _compare(counted, claim, scenario, Panel(cases)).verdict


@dataclass(frozen=True)
class _Comparison:
    """The loss's expected gradients on the panel beside the claimed objective's."""

    cases: list[Case]
    moments: list[GradientMoments]
    gradients: list[Tensor]
    fit: Fit
    tolerance: float
    verdict: Verdict


def _compare(
    loss: BlackBox, claim: Objective, scenario: Scenario, panel: Panel, reduction: Reduction = "token_sum"
) -> _Comparison:
    """The loss with a reduction undone, compared with the exact gradients of the claim."""
    exact = [flat(case.exact(claim)) for case in panel.cases]
    if any(float(g.norm()) == 0.0 for g in exact):
        raise InvalidArgumentError("objective", f"must have a nonzero gradient somewhere, got {claim.label}")
    if panel.mean_of and reduction == "token_sum":
        summed = undone(loss, "token_mean")
        moments = [
            token_mean_moments(summed, case.student, case.teacher, scenario.batch_size, case.behavior)
            for case in panel.cases
        ]
    else:
        changed = undone(loss, reduction)
        moments = [scenario.moments(changed, case, thorough=True) for case in panel.cases]
    return _compared(panel.cases, moments, exact, loss.tolerance)


def _compared(cases: list[Case], moments: list[GradientMoments], exact: list[Tensor], tolerance: float) -> _Comparison:
    gradients = [flat(m.mean) for m in moments]
    fit = fit_scale(gradients, exact)
    zero = all(m.is_zero for m in moments)
    return _Comparison(cases, moments, gradients, fit, tolerance, "zero" if zero else fit.verdict(tolerance))


def _of_equal_lengths(looked: _Comparison, claim: Objective) -> _Comparison:
    """A comparison with a mean undone where no rollout is shorter: either mean divides by the number of steps."""
    moments = [m.times(case.student.horizon) for m, case in zip(looked.moments, looked.cases, strict=True)]
    return _compared(looked.cases, moments, [flat(case.exact(claim)) for case in looked.cases], looked.tolerance)


@dataclass(frozen=True)
class _Seen:
    """What the panel shows of a loss: numbers, verdict and name, with one reduction undone."""

    found: _Comparison
    verdict: Verdict
    match: Match | None
    identified: Identified | None

    @property
    def follows(self) -> Objective | None:
        """The objective whose gradient is that of the loss, to rounding."""
        exact = self.match is not None and self.match.fit.worst_error <= self.found.tolerance
        return self.match.objective if exact and self.match is not None else None


def _exactly(loss: BlackBox, claim: Objective, scenario: Scenario, panel: Panel, name: str, details: bool) -> Audit:
    first: Reduction = next((r for r in REDUCTIONS if r == claim.reduction), "token_sum")
    looked = _compare(loss, claim, scenario, panel, first)
    # Where a token mean couples its rollouts, single ones show the same weight.
    alike, alone = (undone(loss, "token_mean"), scenario.single) if panel.mean_of else (loss, scenario)
    weight = _recovered(alike, alone, loss)
    seen = _see(looked, claim, weight)
    reduction: Reduction | None = first if scenario.eos is not None and seen.follows is not None else None
    follows = seen.follows
    if scenario.eos is not None and follows is None and seen.verdict != "zero":
        for other in (r for r in REDUCTIONS if r != first):
            again = _see(_compare(loss, claim, scenario, panel, other), claim, weight)
            if again.follows is not None:
                reduction, follows = other, again.follows
                seen = again if claim.reduction == "any" else seen
                break
    asked = Asked()
    if follows is not None:
        scale = seen.match.fit.scale if seen.match is not None else 1.0
        asked = ask(loss, follows, scenario, claim.reduction, scale, seen.found.tolerance, everything=details)
        # One rollout of varying length cannot tell the two means apart; other batch sizes can.
        if claim.reduction == "any" and asked.reduction and asked.reduction != (reduction or "token_sum"):
            equal = first == "token_sum" and not scenario.masks and not panel.mean_of
            held = (
                _of_equal_lengths(looked, claim) if equal else _compare(loss, claim, scenario, panel, asked.reduction)
            )
            seen = _see(held, claim, weight)
        reduction = asked.reduction or reduction
    found, fit, verdict = seen.found, seen.found.fit, seen.verdict
    # A loss that follows an objective by name is known over several tokens too.
    if verdict == "biased":
        explained = explains_panel(alike, weight, found.gradients, panel.cases, alone)
    else:
        explained = interpolates(weight, found.gradients, panel.cases)
    weight = replace(weight, explains_panel=explained)
    cosine = [0.0] * len(panel.cases) if verdict == "zero" else fit.cosine
    mean = follows is not None and reduction in ("token_mean", "sequence_mean")
    lengths = None
    if scenario.eos is None and scenario.lengths != "fixed" and not scenario.coupled and follows is not None:
        lengths = attempt(lambda: _with_lengths(loss, follows, scenario, found.tolerance))
    return Audit(
        name=name,
        claim=claim,
        scenario=scenario,
        verdict=verdict,
        relative_bias=max(fit.relative_bias),
        cosine=min(cosine),
        scale=fit.scale,
        tolerance=found.tolerance,
        identified=seen.identified,
        weight=weight,
        pairs=[
            PairResult(
                label=case.label,
                relative_bias=bias,
                cosine=cos,
                variance=moments.variance / scenario.microbatches,
                full_vocabulary_variance=case.full_vocabulary_variance(claim.divergence)
                / (scenario.batch_size * scenario.microbatches),
            )
            for case, bias, cos, moments in zip(panel.cases, fit.relative_bias, cosine, found.moments, strict=True)
        ],
        variable_lengths=lengths,
        reduction=reduction,
        against_sum=against_sum(loss, reduction, follows, scenario) if mean and reduction and follows else [],
        worlds=asked.worlds,
        sampled=next((m.sampled for m in found.moments if m.sampled), ""),
        **(_details(loss, alike, alone, weight, found, claim, scenario) if details else {}),
    )


def _as_sum(loss: BlackBox, claim: Objective, scenario: Scenario, panel: Panel, report: Audit) -> list[Remedy]:
    """The sum over tokens in place of a token mean of batches too large to enumerate, if that is what is wrong."""
    if report.passes:
        return []
    changed = _compare(loss, claim, scenario, panel, "token_mean")
    if changed.verdict not in FAITHFUL:
        return []
    return [Remedy("reduction", SUMMED, changed.verdict, max(changed.fit.relative_bias), verified=True)]


def _see(found: _Comparison, claim: Objective, weight: RecoveredWeight) -> _Seen:
    """A comparison with the claim, and if the loss does not follow that, with the catalogue."""
    if found.verdict in FAITHFUL:
        match = Match(claim, found.fit)
        named = Identified.of(claim, found.fit.scale, match.error(found.tolerance))
        return _Seen(found, found.verdict, match, named)
    if found.verdict == "zero":
        return _Seen(found, "zero", None, None)
    catalogue = ExactGradients(found.cases)
    nearest = best_match(found.gradients, catalogue, weight, claim.granularity, found.tolerance)
    if nearest is not None and nearest.fit.worst_error <= found.tolerance:
        named = Identified.of(nearest.objective, nearest.fit.scale, nearest.error(found.tolerance))
        return _Seen(found, "other_objective", nearest, named)
    combination = best_combination(found.gradients, catalogue, claim.granularity, found.tolerance)
    if combination is not None:
        return _Seen(found, "biased", nearest, Identified.of(combination.objective, 1.0, combination.error))
    if nearest is None:
        return _Seen(found, "biased", None, None)
    named = Identified.of(nearest.objective, nearest.fit.scale, nearest.error(found.tolerance))
    return _Seen(found, "biased", nearest, named)


def _recovered(loss: Loss, scenario: Scenario, box: BlackBox) -> RecoveredWeight:
    """The recovered weight, unknown for a loss that insists on its panel."""
    try:
        return recover_weight(loss, scenario, box.tolerance)
    except LossError:
        raise
    except INSISTS:
        return RecoveredWeight.unknown()


def _kept_of_a_larger_vocabulary(loss: Loss, report: Audit) -> int | None:
    """The number of likeliest tokens that a loss keeps, if the panel has too few to show it."""
    fails = any(world.name.endswith(" tokens") and world.holds is False for world in report.worlds)
    if report.scenario.vocabulary is not None or not fails:
        return None
    scenario, limit = report.scenario, max(1e-6, 10 * report.tolerance)
    kept = attempt(lambda: likeliest_kept(loss, scenario.batch_size, scenario.seed, limit))
    return None if kept is None else kept[0]


def _details(
    loss: BlackBox,
    alike: Loss,
    alone: Scenario,
    weight: RecoveredWeight,
    found: _Comparison,
    claim: Objective,
    scenario: Scenario,
) -> dict[str, Any]:
    """What an audit reports beyond verdict and name, as fields of `Audit`."""
    form: WeightForm | None = describe(weight, found.tolerance) if weight.depends_on_ratio_only else None
    depends: Dependence | None = None
    if len(weight.log_u) and scenario.one_teacher:
        depends = dependence(alike, weight, alone, found.tolerance)
    return {
        "form": form,
        "dependence": depends,
        "checks": soundness(loss, found.cases, found.moments, claim, scenario, found.tolerance),
        "numerics": numerics(loss, batch_size=scenario.batch_size, seed=scenario.seed),
    }


def _by_sampling(loss: BlackBox, claim: Objective, scenario: Scenario, name: str, details: bool, alpha: float) -> Audit:
    """The audit where batches are too many to enumerate."""
    result, weight = sampled(loss, claim, scenario, weigh=details, alpha=alpha)
    # Only a biased loss is found to follow another objective.
    verdict: Verdict = result.verdict if result.follows is None else "other_objective"
    low, high = result.relative_bias
    scale = result.scale or (float("nan"), float("nan"))
    asked = Asked()
    if details and verdict in FAITHFUL:
        # What no sample of the panel shows, smaller batches do.
        multiple = 1.0 if verdict == "exact" else sum(scale) / 2
        asked = ask(loss, claim, scenario, claim.reduction, multiple, loss.tolerance)
    return Audit(
        name=name,
        claim=claim,
        scenario=scenario,
        verdict=verdict,
        relative_bias=high if verdict in FAITHFUL else low,
        cosine=result.cosine[0],
        scale=sum(scale) / 2,
        tolerance=result.margin,
        identified=result.follows,
        weight=weight,
        pairs=[],
        monte_carlo=result,
        reduction=asked.reduction,
        worlds=asked.worlds,
        numerics=numerics(loss, batch_size=scenario.batch_size, seed=scenario.seed) if details else [],
    )


def _with_lengths(loss: Loss, objective: Objective, scenario: Scenario, tolerance: float) -> VariableLengths:
    """The verdict against the objective found, on two pairs whose rollouts may end early."""
    ending = replace(scenario, batch_size=1, eos=0)
    cases = ending.pairs()[1:4:2]
    fit = fit_scale(
        [flat(ending.moments(loss, case).mean) for case in cases], [flat(case.exact(objective)) for case in cases]
    )
    return VariableLengths(fit.verdict(tolerance), max(fit.errors))
