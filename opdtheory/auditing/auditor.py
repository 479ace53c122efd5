"""`audit`: from a loss function to the objective whose gradient it follows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from opdtheory.auditing.black_box import ZERO, BlackBox, name_of
from opdtheory.auditing.checks.numerics import numerics
from opdtheory.auditing.checks.soundness import soundness
from opdtheory.auditing.effects.dependence import dependence
from opdtheory.auditing.fixes.remedies import remedies
from opdtheory.auditing.naming.bandits import is_dear
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.fit import Fit, fit_scale, flat
from opdtheory.auditing.naming.identify import ExactGradients, Match, best_match
from opdtheory.auditing.naming.objective import Aim
from opdtheory.auditing.naming.recover import RecoveredWeight, explains_panel, recover_weight
from opdtheory.auditing.naming.weight_form import describe
from opdtheory.auditing.report import FAITHFUL, Audit, PairResult
from opdtheory.auditing.sampling.whole import sampled
from opdtheory.auditing.scenario import Case, _Settings
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import GradientMoments, Loss, exact_gradient, gradient_moments
from opdtheory.exact.oracle import check_objective, full_vocabulary_variance
from opdtheory.exact.threads import one_thread

__all__ = ["METHODS", "audit", "quick_verdict"]

METHODS = ("auto", "exact", "monte_carlo")

# Coupled batches are not enumerated beyond this only to learn that they are coupled.
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

    The loss is run on every batch of rollouts that small random policies can produce; its expected
    gradient is compared with the exact gradient of the claimed objective and of every catalogue
    entry, and the weight that it puts on a token is recovered as a function of `u = teacher/student`.
    Batches too large to enumerate are sampled until the verdict is certain.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`, deterministic and without state.
        objective: the divergence it is meant to minimise, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        batch_size: number of rollouts the loss sees at once; 2 or more for losses that compare
            rollouts.
        eos: the token, below the panel's vocabulary, that ends a rollout early; None for fixed length.
            At None two extra pairs with an end-of-sequence token tell whether what was found
            survives variable lengths.
        off_policy: standard deviation of the noise on the logits of the policy that samples.
        gamma: discount, for `token_return`.
        seed: of the panel.
        name: for the report; by default the function's own name.
        prompts: from 2 on, position 0 of every rollout holds a prompt, masked, drawn from so many.
        environment: positions of the response, from 0 to 2, that an environment writes, such as a tool's result.
        shared_prompt: whether the rollouts of a batch answer one prompt, as a group of GRPO does.
        method: `exact`, `monte_carlo`, or `auto`: exact where batches can be enumerated.
        details: whether to go beyond verdict and name: the weight as a formula, what it depends on, soundness
            checks, narrow dtypes, remedies.

    Returns:
        An `Audit`; `print` it, or take `.verdict`, `.identified`, `.weight`, `.remedies` and `.to_dict()`.

    Raises:
        InvalidArgumentError: an unknown objective or granularity, or a setting out of range.
        LossError: the loss is no scalar, has no gradient, differs between identical calls, or gives NaN.
        BudgetExceededError: `method="exact"`, and the batch size is too large to enumerate.

    Example:
        >>> def k3(r):
        ...     return r.token_sum(r.log_u.expm1() - r.log_u)
        >>> audit(k3, "reverse_kl").descends
        'forward_kl'
    """
    divergence = as_divergence(objective)
    check_objective(granularity, gamma)
    if not 0.0 <= off_policy < float("inf"):
        raise InvalidArgumentError("off_policy", f"is {off_policy!r}; a finite number of at least 0 is needed")
    if method not in METHODS:
        raise InvalidArgumentError("method", f"is {method!r}; one of {', '.join(METHODS)} is needed")
    for argument, value in (("batch_size", batch_size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (argument == "batch_size"):
            raise InvalidArgumentError(argument, f"is {value!r}; a whole number is needed")
    settings = _Settings(batch_size, eos, off_policy, gamma, seed, prompts, tuple(environment), shared_prompt)
    counted, name, start = BlackBox(loss), name or name_of(loss), time.perf_counter()
    with one_thread():
        plan = None if method == "monte_carlo" else _plan(counted, settings, method)
        if plan is None:
            report = _by_sampling(counted, divergence, granularity, settings, name, details)
        else:
            report = _exactly(counted, divergence, granularity, plan, name, details)
        if details and report.monte_carlo is None:
            report = replace(report, remedies=remedies(counted, divergence, granularity, report=report))
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
    """The verdict of `audit` without looking for what else the loss might descend.

    Returns:
        `exact`, `exact_up_to_scale`, `zero` or `biased`; `other_objective` counts as `biased`.

    Raises:
        InvalidArgumentError: as `audit`.
        LossError: as `audit`.
    """
    with one_thread():
        settings = _Settings(batch_size, eos, off_policy, gamma, seed)
        return _compare(BlackBox(loss), as_divergence(objective), granularity, settings).verdict


@dataclass(frozen=True)
class _Comparison:
    """The loss's expected gradients on the panel beside the claimed objective's."""

    cases: list[Case]
    moments: list[GradientMoments]
    gradients: list[Tensor]
    fit: Fit
    tolerance: float
    verdict: str


def _compare(loss: BlackBox, divergence: Divergence, granularity: str, settings: _Settings) -> _Comparison:
    cases = settings.panel(settings.batch_size, settings.eos)
    exact = [
        flat(exact_gradient(case.student, case.teacher, divergence, granularity, gamma=settings.gamma))
        for case in cases
    ]
    if any(float(g.norm()) == 0.0 for g in exact):
        raise InvalidArgumentError("objective", f"{divergence.label} has a zero gradient everywhere; nothing to audit")
    moments = _moments(loss, cases, settings, settings.batch_size)
    gradients = [flat(m.mean) for m in moments]
    fit = fit_scale(gradients, exact)
    tolerance = loss.tolerance
    zero = all(float(g.norm()) <= ZERO * m.second_moment**0.5 for g, m in zip(gradients, moments, strict=True))
    return _Comparison(cases, moments, gradients, fit, tolerance, "zero" if zero else fit.verdict(tolerance))


def _plan(loss: Loss, settings: _Settings, method: str) -> _Settings | None:
    """The settings under which batches can be enumerated in seconds, or None if they are better sampled."""
    try:
        cases = settings.panel(settings.batch_size, settings.eos)
    except BudgetExceededError:
        if _is_separable(loss, settings):
            return replace(settings, separable=True)
        if method == "exact":
            raise
        return None
    if method == "auto" and is_dear(settings.batch_size):
        if not _is_separable(loss, settings, cases[:1]):
            return None
    return settings


def _is_separable(loss: Loss, settings: _Settings, cases: list[Case] | None = None) -> bool:
    """Whether the rollouts of a batch do not enter each other's gradient, so that one rollout tells all."""
    try:
        cases = settings.panel(2, settings.eos)[1:2] if cases is None else cases
        return all(
            gradient_moments(
                loss, c.student, c.teacher, settings.batch_size, c.behavior, _FEW_BATCHES, settings.shared_prompt
            ).separable
            for c in cases
        )
    except BudgetExceededError:
        return False
    except LossError:
        raise
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return False  # It may insist on its batch size.


def _exactly(
    loss: BlackBox, divergence: Divergence, granularity: str, settings: _Settings, name: str, details: bool
) -> Audit:
    found = _compare(loss, divergence, granularity, settings)
    batch_size, fit, tolerance, verdict = settings.batch_size, found.fit, found.tolerance, found.verdict
    weight = recover_weight(loss, batch_size, settings.off_policy, settings.seed, tolerance)
    match: Match | None = None
    identified: dict[str, Any] | None = None
    if verdict in FAITHFUL:
        match = Match(divergence, granularity, fit, settings.gamma)
    elif verdict == "biased":
        catalogue = ExactGradients(found.cases)
        match = best_match(found.gradients, catalogue, weight, granularity, tolerance)
        if match is not None and match.fit.worst_error <= tolerance:
            verdict = "other_objective"
        else:
            identified = _combination(found.gradients, catalogue, granularity, tolerance)
    if match is not None and identified is None:
        identified = _record(match, tolerance)

    lengths = None
    if settings.eos is None and batch_size == 1 and match is not None and match.fit.worst_error <= tolerance:
        lengths = _with_lengths(loss, match, settings, tolerance)
    cosine = [0.0] * len(found.cases) if verdict == "zero" else fit.cosine
    return Audit(
        name=name,
        objective=divergence.label,
        granularity=granularity,
        verdict=verdict,
        relative_bias=max(fit.relative_bias),
        cosine=min(cosine),
        scale=fit.scale,
        tolerance=tolerance,
        identified=identified,
        weight={**vars(weight), "explains_panel": explains_panel(weight, found.gradients, found.cases)},
        pairs=[
            PairResult(
                label=case.label,
                relative_bias=bias,
                cosine=cos,
                variance=moments.variance,
                full_vocabulary_variance=full_vocabulary_variance(case.student, case.teacher, divergence) / batch_size,
            )
            for case, bias, cos, moments in zip(found.cases, fit.relative_bias, cosine, found.moments, strict=True)
        ],
        variable_lengths=lengths,
        settings=settings.to_dict(),
        **(_details(loss, weight, found, divergence, granularity, settings) if details else {}),
    )


def _details(
    loss: BlackBox,
    weight: RecoveredWeight,
    found: _Comparison,
    divergence: Divergence,
    granularity: str,
    settings: _Settings,
) -> dict[str, Any]:
    """What goes beyond verdict and name, as fields of `Audit`."""
    common: dict[str, Any] = {"batch_size": settings.batch_size, "seed": settings.seed, "tolerance": found.tolerance}
    return {
        "form": describe(weight, found.tolerance) if weight.depends_on_ratio_only else None,
        "dependence": dependence(loss, weight, **common),
        "checks": soundness(
            loss,
            found.cases,
            found.moments,
            divergence,
            granularity,
            off_policy=settings.off_policy,
            gamma=settings.gamma,
            shared_prompt=settings.shared_prompt,
            **common,
        ),
        "numerics": numerics(loss, batch_size=settings.batch_size, seed=settings.seed),
    }


def _by_sampling(
    loss: BlackBox, divergence: Divergence, granularity: str, settings: _Settings, name: str, details: bool
) -> Audit:
    """The audit of batches that are too many to enumerate."""
    # Two pairs, near and far: each needs thousands of rollouts of its own.
    cases, size = settings.panel(1, settings.eos)[1:4:2], settings.batch_size
    found = sampled(
        loss,
        cases,
        Aim.of(divergence, granularity, settings.gamma),
        replace(settings, separable=False).panel,
        batch_size=size,
        eos=settings.eos,
        off_policy=settings.off_policy,
        seed=settings.seed,
        shared_prompt=settings.shared_prompt,
        weigh=details,
    )
    result, weight = found.result, found.weight
    verdict = "other_objective" if result.verdict == "biased" and result.follows is not None else result.verdict
    low, high = result.relative_bias
    scale = result.scale or (float("nan"), float("nan"))
    return Audit(
        name=name,
        objective=divergence.label,
        granularity=granularity,
        verdict=verdict,
        relative_bias=high if verdict in FAITHFUL else low,
        cosine=result.cosine[0],
        scale=sum(scale) / 2,
        tolerance=result.margin,
        identified=result.follows,
        weight=weight,
        pairs=[],
        monte_carlo=asdict(result),
        settings=settings.to_dict(),
        numerics=numerics(loss, batch_size=size, seed=settings.seed) if details else [],
    )


def _moments(loss: Loss, cases: list[Case], settings: _Settings, batch_size: int) -> list[GradientMoments]:
    return [
        gradient_moments(
            loss, case.student, case.teacher, batch_size, case.behavior, shared_prompt=settings.shared_prompt
        )
        for case in cases
    ]


def _with_lengths(loss: Loss, match: Match, settings: _Settings, tolerance: float) -> dict[str, Any]:
    """The verdict against the objective found, on two pairs whose rollouts may end early."""
    cases = settings.panel(1, 0)[1:4:2]
    discount = match.gamma if match.granularity == "token_return" else 1.0
    exact = [
        flat(exact_gradient(case.student, case.teacher, match.divergence, match.granularity, gamma=discount))
        for case in cases
    ]
    fit = fit_scale([flat(m.mean) for m in _moments(loss, cases, settings, 1)], exact)
    return {"verdict": fit.verdict(tolerance), "relative_bias": max(fit.errors)}


def _combination(
    gradients: list[Tensor], catalogue: ExactGradients, granularity: str, tolerance: float
) -> dict[str, Any] | None:
    """The signed sum of a few catalogue objectives that the loss follows, if there is one."""
    combination = best_combination(gradients, catalogue, granularity, tolerance)
    if combination is None:
        return None
    return {
        "objective": combination.label,
        "granularity": combination.granularity,
        "parameters": {},
        "terms": combination.terms,
        "scale": 1.0,
        "error": combination.error,
    }


def _record(match: Match, tolerance: float) -> dict[str, Any]:
    discount = {"gamma": match.gamma} if match.granularity == "token_return" and match.gamma != 1.0 else {}
    return {
        "objective": match.divergence.name,
        "granularity": match.granularity,
        "parameters": {**match.divergence.parameters},
        **discount,
        "scale": match.fit.scale,
        "error": match.fit.worst_error if match.fit.worst_error <= tolerance else match.fit.typical_error,
    }
