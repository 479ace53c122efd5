"""`audit`: from a loss function to the objective whose gradient it follows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from opdtheory.auditing.black_box import INSISTS, ZERO, BlackBox, name_of
from opdtheory.auditing.checks.numerics import numerics
from opdtheory.auditing.checks.soundness import soundness
from opdtheory.auditing.effects.dependence import dependence
from opdtheory.auditing.fixes.remedies import remedies
from opdtheory.auditing.naming.bandits import is_expensive
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.fit import Fit, fit_scale, flat
from opdtheory.auditing.naming.identify import ExactGradients, Match, best_match
from opdtheory.auditing.naming.recover import RecoveredWeight, explains_panel, interpolates, recover_weight
from opdtheory.auditing.naming.weight_form import describe
from opdtheory.auditing.records import Identified, VariableLengths
from opdtheory.auditing.report import Audit, PairResult
from opdtheory.auditing.sampling.whole import sampled
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.choices import FAITHFUL, Verdict
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import GradientMoments, Loss
from opdtheory.exact.oracle import full_vocabulary_variance
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
) -> Audit:
    """Find out what a loss really minimises, by exact expectation over enumerated policies.

    The loss is run on every batch of rollouts that small random policies can produce. Its expected gradient is
    compared with the exact gradients of the claimed objective and of every catalogue entry, and the weight that it puts
    on a token is recovered as a function of `u = teacher/student`. Batches too large to enumerate are sampled until the
    verdict is certain.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`, deterministic and stateless.
        objective: the divergence that it claims to minimise, an object or a catalogue name.
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
    scenario = Scenario(batch_size, eos, off_policy, seed, prompts, tuple(environment), shared_prompt)
    counted, name, start = BlackBox(loss), name or name_of(loss), time.perf_counter()
    with one_thread():
        cases = None if method == "monte_carlo" else _cases(counted, scenario, method)
        if cases is None:
            report = _by_sampling(counted, claim, scenario, name, details)
        else:
            report = _exactly(counted, claim, scenario, cases, name, details)
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
) -> str:
    """The verdict of `audit`, without a search for what else the loss might descend.

    Returns:
        `exact`, `exact_up_to_scale`, `zero` or `biased`; `other_objective` counts as `biased`.

    Raises:
        InvalidArgumentError: as `audit`.
        LossError: as `audit`.
    """
    scenario = Scenario(batch_size, eos, off_policy, seed)
    with one_thread():
        claim = Objective.of(as_divergence(objective), granularity, gamma)
        return _compare(BlackBox(loss), claim, scenario, scenario.pairs()).verdict


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
        if method == "exact":
            raise
        return None
    if method == "auto" and is_expensive(scenario.batch_size) and not _is_separable(loss, scenario, cases[:1]):
        return None
    return cases


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

    # A loss that follows an objective by name is known over several tokens too.
    if verdict == "biased":
        explained = explains_panel(loss, weight, found.gradients, cases, scenario)
    else:
        explained = interpolates(weight, found.gradients, cases)
    weight = replace(weight, explains_panel=explained)
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
        weight=weight,
        pairs=[
            PairResult(
                label=case.label,
                relative_bias=bias,
                cosine=cos,
                variance=moments.variance,
                full_vocabulary_variance=full_vocabulary_variance(case.student, case.teacher, claim.divergence)
                / scenario.batch_size,
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
        "dependence": dependence(loss, weight, scenario, found.tolerance),
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
