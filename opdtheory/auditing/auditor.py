"""`audit`: from a loss function to the objective whose gradient it follows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from opdtheory.auditing.accompanied import RewardPart, accompanied, reward_part, without_reward
from opdtheory.auditing.black_box import INSISTS, ZERO, BlackBox, name_of
from opdtheory.auditing.checks.numerics import numerics
from opdtheory.auditing.checks.soundness import soundness
from opdtheory.auditing.effects.dependence import dependence
from opdtheory.auditing.fixes.remedies import remedies
from opdtheory.auditing.naming.bandits import is_expensive
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.fit import Fit, fit_scale, flat
from opdtheory.auditing.naming.identify import ExactGradients, Match, best_match
from opdtheory.auditing.naming.recover import RecoveredWeight, explains_panel, recover_weight
from opdtheory.auditing.naming.weight_form import describe
from opdtheory.auditing.records import Identified, VariableLengths
from opdtheory.auditing.report import Audit, PairResult
from opdtheory.auditing.sampling.whole import sampled
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.choices import FAITHFUL, Accumulation, Histories, Verdict
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import GradientMoments, Loss
from opdtheory.exact.threads import one_thread
from opdtheory.objective import Objective

__all__ = ["METHODS", "audit", "quick_verdict"]

METHODS = ("auto", "exact", "monte_carlo")

# Only to learn that rollouts are coupled, no more batches than this are enumerated.
_FEW_BATCHES = 300


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
    method: str = "auto",
    details: bool = True,
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
    verdict is certain.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`, deterministic and stateless.
        objective: the divergence that it claims to minimise: an object, a catalogue name, or a weighted sum of these
            such as `"9*reverse_kl + forward_kl"`.
        granularity: `token_local`, `token_return` or `sequence`.
        batch_size: number of rollouts that the loss sees at once; at least 2 for losses that compare rollouts.
        eos: the token, one of the panel's vocabulary, that ends a rollout early; None for a fixed length, where two
            more pairs with an end-of-sequence token show whether the finding holds at variable lengths too.
        off_policy: standard deviation of the noise on the logits of the sampling policy.
        gamma: discount of `token_return`.
        seed: seed of the panel.
        name: name in the report (default: the function's own).
        prompts: number of prompts; from 2 on, position 0 of every rollout holds one of them, masked.
        environment: positions of the response, from 0 to 2, that an environment writes, such as a tool's result.
        shared_prompt: whether the rollouts of a batch answer one prompt, as a group of GRPO does.
        method: `exact`, `monte_carlo`, or `auto`: exact where batches can be enumerated.
        details: whether to report more than verdict and name: the weight as a formula, what it depends on, soundness
            checks, narrow dtypes, remedies.
        student_temperature: the claim is about the student softened by it, $D_f(q_\sigma\|p_\tau)$ with
            $p_\tau = \mathrm{softmax}(z_p/\tau)$; the gradient is the one in $z_p$ and carries $1/\tau$ (T16). The
            claim is then token-local, at the histories that `histories` names.
        teacher_temperature: $\sigma$, the same for the teacher.
        sampling_temperature: the temperature of the student's logits at which rollouts are sampled.
        histories: whose prefixes a token-local claim is about: the `student`'s at the sampling temperature, or those of
            the `sampler`, which differ if it is off-policy (T15).
        teachers: number of teachers; `r.teachers[k]` has their `.logits` and `.logprobs`. The claim is the weighted sum
            of the divergences to each of them (T16).
        teacher_weights: the weights of that sum (default: equal, with sum one).
        base: whether rollouts hold a third, frozen policy, as `r.base_logits` and `r.base_logprobs`.
        extrapolation: with `base=True`, $\lambda$ of the extrapolated teacher $m \propto q^\lambda b^{1-\lambda}$ that
            takes the place of the teacher in the claim (T16).
        microbatches: number of equal parts of a batch on which the loss is called, one after the other (T17). They
            are independent of each other; with `shared_prompt`, each is a group of its own prompt.
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
    claim = Objective.of(as_divergence(objective), granularity, gamma)
    if method not in METHODS:
        raise InvalidArgumentError("method", f"must be one of {', '.join(METHODS)}, got {method!r}")
    scenario = Scenario.of(
        batch_size,
        microbatches,
        eos=eos,
        off_policy=off_policy,
        seed=seed,
        prompts=prompts,
        environment=tuple(environment),
        shared_prompt=shared_prompt,
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
        _check_sampled(scenario)
    counted, name, start = BlackBox(accompanied(loss, scenario)), name or name_of(loss), time.perf_counter()
    with one_thread():
        cases = None if method == "monte_carlo" else _cases(counted, scenario, method)
        part: RewardPart | None = None
        if scenario.reward and cases is not None:
            part = reward_part(loss, scenario, cases, counted.tolerance)
            counted = without_reward(counted, scenario, part)
        if cases is None:
            report = _by_sampling(counted, claim, scenario, name, details)
        else:
            report = replace(_exactly(counted, claim, scenario, cases, name, details), reward=part)
        if details and report.monte_carlo is None:
            report = replace(report, remedies=remedies(counted, report=report))
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
    with one_thread():
        claim, cases = Objective.of(as_divergence(objective), granularity, gamma), scenario.pairs()
        counted = BlackBox(accompanied(loss, scenario))
        if scenario.reward:
            counted = without_reward(counted, scenario, reward_part(loss, scenario, cases, counted.tolerance))
        return _compare(counted, claim, scenario, cases).verdict


@dataclass(frozen=True)
class _Comparison:
    """The loss's expected gradients on the panel beside the claimed objective's."""

    cases: list[Case]
    moments: list[GradientMoments]
    gradients: list[Tensor]
    fit: Fit
    tolerance: float
    verdict: Verdict


def _compare(loss: BlackBox, claim: Objective, scenario: Scenario, cases: list[Case]) -> _Comparison:
    exact = [flat(case.exact(claim)) for case in cases]
    if any(float(g.norm()) == 0.0 for g in exact):
        raise InvalidArgumentError("objective", f"must have a nonzero gradient somewhere, got {claim.label}")
    moments = [scenario.moments(loss, case) for case in cases]
    gradients = [flat(m.mean) for m in moments]
    fit = fit_scale(gradients, exact)
    tolerance = loss.tolerance
    zero = all(float(g.norm()) <= ZERO * m.second_moment**0.5 for g, m in zip(gradients, moments, strict=True))
    return _Comparison(cases, moments, gradients, fit, tolerance, "zero" if zero else fit.verdict(tolerance))


def _cases(loss: Loss, scenario: Scenario, method: str) -> list[Case] | None:
    """Pairs whose batches can be enumerated in seconds; None if batches are better sampled."""
    try:
        cases = scenario.pairs()
    except BudgetExceededError:
        if _is_separable(loss, scenario):
            return scenario.single.pairs()
        if method == "exact" or scenario.exact_only is not None:
            raise
        return None
    if scenario.exact_only is not None:
        return cases
    if method == "auto" and is_expensive(scenario.batch_size) and not _is_separable(loss, scenario, cases[:1]):
        return None
    return cases


def _check_sampled(scenario: Scenario) -> None:
    """Raise if a setting needs batches that can be enumerated."""
    if scenario.exact_only is not None:
        name = scenario.exact_only.partition("=")[0]
        raise InvalidArgumentError(
            name, f"must be left out of a sampled audit, got {scenario.exact_only}; take method='exact'"
        )


def _is_separable(loss: Loss, scenario: Scenario, cases: list[Case] | None = None) -> bool:
    """Whether each rollout's gradient is independent of the others in its batch, so that one at a time suffices."""
    try:
        cases = replace(scenario, batch_size=2).pairs()[1:2] if cases is None else cases
        return all(scenario.moments(loss, case, _FEW_BATCHES).separable for case in cases)
    except BudgetExceededError:
        return False
    except LossError:
        raise
    except INSISTS:
        return False


def _exactly(
    loss: BlackBox, claim: Objective, scenario: Scenario, cases: list[Case], name: str, details: bool
) -> Audit:
    found = _compare(loss, claim, scenario, cases)
    fit, tolerance, verdict = found.fit, found.tolerance, found.verdict
    weight = recover_weight(loss, scenario, tolerance)
    match: Match | None = None
    identified: Identified | None = None
    if verdict in FAITHFUL:
        match = Match(claim, fit)
    elif verdict == "biased":
        catalogue = ExactGradients(cases)
        match = best_match(found.gradients, catalogue, weight, claim.granularity, tolerance)
        if match is not None and match.fit.worst_error <= tolerance:
            verdict = "other_objective"
        else:
            combination = best_combination(found.gradients, catalogue, claim.granularity, tolerance)
            if combination is not None:
                identified = Identified.of(combination.objective, 1.0, combination.error)
    if match is not None and identified is None:
        identified = Identified.of(match.objective, match.fit.scale, match.error(tolerance))

    lengths = None
    if scenario.eos is None and not scenario.coupled and match is not None and match.fit.worst_error <= tolerance:
        lengths = _with_lengths(loss, match.objective, scenario, tolerance)
    cosine = [0.0] * len(cases) if verdict == "zero" else fit.cosine
    return Audit(
        name=name,
        claim=claim,
        scenario=scenario,
        verdict=verdict,
        relative_bias=max(fit.relative_bias),
        cosine=min(cosine),
        scale=fit.scale,
        tolerance=tolerance,
        identified=identified,
        weight=replace(weight, explains_panel=explains_panel(weight, found.gradients, cases)),
        pairs=[
            PairResult(
                label=case.label,
                relative_bias=bias,
                cosine=cos,
                variance=moments.variance / scenario.microbatches,
                full_vocabulary_variance=case.full_vocabulary_variance(claim.divergence)
                / (scenario.batch_size * scenario.microbatches),
            )
            for case, bias, cos, moments in zip(cases, fit.relative_bias, cosine, found.moments, strict=True)
        ],
        variable_lengths=lengths,
        **(_details(loss, weight, found, claim, scenario) if details else {}),
    )


def _details(
    loss: BlackBox, weight: RecoveredWeight, found: _Comparison, claim: Objective, scenario: Scenario
) -> dict[str, Any]:
    """What an audit reports beyond verdict and name, as fields of `Audit`."""
    return {
        "form": describe(weight, found.tolerance) if weight.depends_on_ratio_only else None,
        "dependence": dependence(loss, weight, scenario, found.tolerance) if scenario.one_teacher else None,
        "checks": soundness(loss, found.cases, found.moments, claim, scenario, found.tolerance),
        "numerics": numerics(loss, batch_size=scenario.batch_size, seed=scenario.seed),
    }


def _by_sampling(loss: BlackBox, claim: Objective, scenario: Scenario, name: str, details: bool) -> Audit:
    """The audit where batches are too many to enumerate."""
    result, weight = sampled(loss, claim, scenario, weigh=details)
    # Only a biased loss is found to follow another objective.
    verdict: Verdict = result.verdict if result.follows is None else "other_objective"
    low, high = result.relative_bias
    scale = result.scale or (float("nan"), float("nan"))
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
