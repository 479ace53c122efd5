"""Assertions about losses: what a loss minimises, whether two agree, whether an estimator keeps its claim.

They need no test framework.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opdtheory.auditing import Audit, audit
from opdtheory.auditing.accompanied import accompanied
from opdtheory.auditing.advice import advised
from opdtheory.auditing.black_box import BlackBox, name_of
from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.scenario import Scenario
from opdtheory.auditing.worlds import Plan, plans
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Claim, Estimator
from opdtheory.exact import GradientMoments, Loss, TabularPolicy
from opdtheory.testing.failures import reason, shortened

__all__ = [
    "assert_claim",
    "assert_minimises",
    "assert_same_gradient",
    "assert_unbiased",
    "claim_settings",
    "gradient_gap",
]

# Noise on the logits of the sampling policy if a claim allows off-policy rollouts.
_OFF_POLICY = 0.3


def assert_unbiased(
    loss: Loss,
    objective: str | Divergence,
    granularity: str = "token_local",
    *,
    up_to_scale: bool = False,
    **audit_settings: Any,
) -> Audit:
    r"""Assert that a loss's expected gradient is the exact one, $E[\nabla\,\mathrm{loss}] = \nabla J$.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`.
        objective: the divergence that it should minimise, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        up_to_scale: whether a constant positive factor is allowed.
        **audit_settings: arguments of `opdtheory.audit`, such as `batch_size`, `off_policy`, `reduction` and `name`.
            Lengths that vary, a prompt and batches of 1, 2, 3 and 5 are asked about unless `lengths="fixed"` narrows
            the claim.

    Returns:
        The audit.

    Raises:
        AssertionError: the audit does not pass; the message includes it.
        InvalidArgumentError: as `opdtheory.audit`.
        LossError: as `opdtheory.audit`.

    Example:
        >>> def k2(rollouts):
        ...     return rollouts.token_sum(rollouts.log_u.square() / 2)
        >>> assert_unbiased(k2, "reverse_kl").verdict
        'exact'
    """
    report = audit(loss, objective, granularity, **audit_settings)
    if not _passes(report) or not (up_to_scale or report.verdict == "exact"):
        wanted = "unbiased up to scale" if up_to_scale else "unbiased"
        raise _failed(
            f"{report.name} is not {wanted} for {report.objective} ({report.granularity}): {reason(report)}.", report
        )
    return report


def assert_minimises(
    loss: Loss, divergence: str | Divergence, granularity: str = "token_local", **audit_settings: Any
) -> Audit:
    r"""Assert that a loss's expected gradient is a positive multiple of the exact one, $E[\nabla\ell] = c\,\nabla J$.

    The multiple $c > 0$ must be the same for every pair of policies. An optimiser with adaptive steps, such as Adam,
    treats such a loss like the exact one. A mean over tokens passes too, unless `reduction` says another: it is exact
    but for the weight of its rollouts (T11), which `report.reduction` names and `report.against_sum` measures.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`.
        divergence: the divergence that it should minimise, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        **audit_settings: as in `assert_unbiased`.

    Returns:
        The audit; its `.scale` is $c$.

    Raises:
        AssertionError: the loss does not minimise it; the message includes the numbers and the audit.
        InvalidArgumentError: as `opdtheory.audit`.
        LossError: as `opdtheory.audit`.

    Example:
        >>> def mean_k2(rollouts):
        ...     return rollouts.token_mean(rollouts.log_u.square() / 2)
        >>> assert_minimises(mean_k2, "reverse_kl").reduction
        'token_mean'
    """
    report = audit(loss, divergence, granularity, **{"reduction": "any", **audit_settings})
    if not _passes(report):
        raise _failed(
            f"{report.name} does not minimise {report.objective} ({report.granularity}): {reason(report)}; "
            f"relative bias {report.relative_bias:.3g}, cosine {report.cosine:.6g}, best scale {report.scale:.6g}.",
            report,
        )
    return report


def assert_same_gradient(
    first: Loss,
    second: Loss,
    *,
    tolerance: float | None = None,
    batch_size: int = 1,
    environment: Iterable[int] = (),
    **settings: Any,
) -> float:
    r"""Assert that two losses have the same expected gradient, $\|E g_1 - E g_2\| \le \epsilon \max_i \|E g_i\|$.

    Their values and variances may differ. Gradients are compared pair by pair on the audit's panel, and where both
    losses can be evaluated there, on rollouts that end early, behind a prompt, over a large vocabulary, over more
    steps, and at log-ratios up to 30. Two that are both rounding, relative to their own noise, count as equal.

    Args:
        first: a function `loss(rollouts) -> scalar tensor`.
        second: another one.
        tolerance: largest relative difference (default: 1e-9, 1e-4 for float32, 2e-2 for narrower dtypes).
        batch_size: number of rollouts that a loss sees at once; other sizes are not compared.
        environment: positions of the response, counted from 0, that an environment writes.
        **settings: what else rollouts look like, as in `opdtheory.audit`: `eos`, `lengths`, `off_policy`, `prompts`,
            `shared_prompt`, `vocabulary`, `teachers`, `base`, `sampling_temperature`, `reward`, `seed`.
            `lengths="fixed"` leaves out rollouts that end early.

    Returns:
        The largest relative difference.

    Raises:
        AssertionError: the gradients differ; the message lists the pairs.
        InvalidArgumentError: the tolerance is negative, or a setting is out of range.
        LossError: as `opdtheory.audit`.
        BudgetExceededError: batches of this size are too many to enumerate.

    Example:
        >>> def k2(rollouts):
        ...     return rollouts.token_sum(rollouts.log_u.square() / 2)
        >>> def reinforce(rollouts):
        ...     return rollouts.token_sum(-rollouts.log_u.detach() * rollouts.student_logprobs)
        >>> assert_same_gradient(k2, reinforce) < 1e-9
        True
    """
    if tolerance is not None and not 0.0 <= tolerance < float("inf"):
        raise InvalidArgumentError("tolerance", f"must be a finite number of at least 0, got {tolerance!r}")
    scenario = _scenario(batch_size=batch_size, environment=tuple(environment), **settings)
    losses = [BlackBox(accompanied(loss, scenario)) for loss in (first, second)]
    rows, worst = [], 0.0
    for case in scenario.pairs():
        moments = []
        for original, loss in zip((first, second), losses, strict=True):
            with advised(original):
                moments.append(scenario.moments(loss, case))
        gap, sizes = _gap(*moments)
        worst = max(worst, gap)
        rows.append(f"  {case.label}: differs by {gap:.3g}; lengths {sizes[0]:.6g} and {sizes[1]:.6g}")
    allowed = tolerance if tolerance is not None else max(loss.tolerance for loss in losses)
    for plan in plans(scenario):
        if plan.scenario.batch_size == scenario.batch_size and (gap := _apart(plan, losses)) > plan.rounding * allowed:
            worst = max(worst, gap)
            rows.append(f"  {plan.name}: differs by {gap:.3g}")
    if not worst <= allowed:
        names = " and ".join(name_of(loss) for loss in (first, second))
        first_line = (
            f"the expected gradients of {names} differ by {worst:.3g} of the longer one, more than {allowed:.3g}"
        )
        raise AssertionError(shortened("\n".join([f"{first_line}:", *rows])))
    return worst


def assert_claim(estimator: Estimator, *, seed: int = 0) -> Audit:
    """Assert that an audit finds what an estimator claims: its verdict, and the divergence that it descends instead.

    The settings of the audit are the widest that the claim's assumptions allow (`claim_settings`), so a declared bias
    must show, and an exact loss must be exact wherever the claim says so.

    Args:
        estimator: a loss with a claim.
        seed: seed of the audit's panel.

    Returns:
        The audit.

    Raises:
        AssertionError: claim and audit differ; the message includes the audit.
        InvalidArgumentError: the audit's policies do not meet an assumption, such as a larger vocabulary.

    Example:
        >>> from opdtheory.estimators import estimator
        >>> assert_claim(estimator("k3_loss")).descends
        'forward_kl'
    """
    claim, settings = estimator.claim, claim_settings(estimator.claim)
    _check_met(claim, _scenario_of(claim, seed))
    report = audit(
        estimator, claim.divergence, claim.granularity, seed=seed, name=repr(estimator), details=False, **settings
    )
    if report.verdict != claim.verdict:
        raise _failed(
            f"{estimator!r} claims {claim.verdict!r}, the audit finds {report.verdict!r}. The claim: {claim}.", report
        )
    other = _catalogue_entry(claim.descends) if claim.verdict == "other_objective" else None
    if other is not None and not _descends(report, other):
        raise _failed(f"{estimator!r} claims to descend {other.label}, the audit finds {report.descends}.", report)
    return report


def claim_settings(claim: Claim) -> dict[str, Any]:
    """The widest settings of an audit under which the assumptions of a claim hold.

    Rollouts vary in length unless the claim assumes a fixed one, and another policy than the student samples unless the
    claim assumes on-policy rollouts.
    """
    scenario = _scenario_of(claim)
    names = ("batch_size", "eos", "off_policy")
    return {**{name: getattr(scenario, name) for name in names}, "gamma": claim.objective.gamma}


def _scenario_of(claim: Claim, seed: int = 0) -> Scenario:
    given = claim.assumptions
    return Scenario(
        batch_size=given.batch_size,
        eos=None if given.fixed_length else 0,
        off_policy=_OFF_POLICY if given.sampler == "any" else 0.0,
        seed=seed,
    )


def gradient_gap(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    r"""The largest difference of two lists of tensors, $\max|a - e| / \max(1, \max|e|)$; NaN counts as infinite.

    Args:
        actual: tensors of any shapes, such as a gradient by level.
        expected: as many tensors of the same shapes.

    Raises:
        InvalidArgumentError: the lists differ in length or in a shape.
    """
    shapes = [[tuple(level.shape) for level in levels] for levels in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise InvalidArgumentError("actual", f"must have shapes {shapes[1]}, got {shapes[0]}")
    if not shapes[0]:
        return 0.0
    size = max(1.0, *(float(e.detach().abs().max()) for e in expected))
    gaps = [float((a.detach() - e.detach()).abs().max()) / size for a, e in zip(actual, expected, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def _scenario(**settings: Any) -> Scenario:
    """The scenario of the settings; one that it does not have is refused by name."""
    unknown = sorted(settings.keys() - {field.name for field in dataclasses.fields(Scenario)})
    if unknown:
        raise InvalidArgumentError(unknown[0], "is no setting of rollouts; opdtheory.audit lists those that are")
    return Scenario.of(**settings)


def _apart(plan: Plan, losses: Sequence[BlackBox]) -> float:
    """The largest difference in another world; zero where one of the losses cannot be evaluated."""
    changed = [plan.change(loss) for loss in losses]
    try:
        return max(_gap(*(plan.scenario.moments(loss, case) for loss in changed))[0] for case in plan.cases)
    except Exception:  # whatever a loss raises on rollouts that it was not written for
        return 0.0


def _passes(report: Audit) -> bool:
    """Whether the loss does what it claims, up to a constant factor."""
    return report.passes


def _failed(problem: str, report: Audit) -> AssertionError:
    """The error with the problem and the audit, at most 40 lines."""
    return AssertionError(shortened(f"{problem}\n\n{report}"))


def _gap(first: GradientMoments, second: GradientMoments) -> tuple[float, tuple[float, float]]:
    """The difference of two mean gradients relative to the longer one, and their lengths."""
    a, b = (flat(moments.mean) for moments in (first, second))
    sizes, apart = (float(a.norm()), float(b.norm())), float((a - b).norm())
    rounding = max(first.rounding * first.size, second.rounding * second.size)
    return (0.0 if apart <= rounding else apart / max(sizes)), sizes


def _check_met(claim: Claim, scenario: Scenario) -> None:
    """Raise if the audit's policies do not meet the assumptions of a claim."""
    cases, given = scenario.pairs(), claim.assumptions
    largest_ratio = max(_largest_log_ratio(case.student, case.teacher) for case in cases)
    vocabulary = max(case.student.vocab_size for case in cases)
    if given.log_ratio_beyond is not None and given.log_ratio_beyond >= largest_ratio:
        raise InvalidArgumentError(
            "estimator",
            f"must not assume that log-ratios beyond {given.log_ratio_beyond:g} occur; the audit's log-ratios end at "
            f"{largest_ratio:.3g}",
        )
    if given.vocabulary_above is not None and given.vocabulary_above >= vocabulary:
        raise InvalidArgumentError(
            "estimator",
            f"must not assume a vocabulary above {given.vocabulary_above}; the audit's policies have "
            f"{vocabulary} tokens",
        )


def _largest_log_ratio(student: TabularPolicy, teacher: TabularPolicy) -> float:
    log_p = [torch.log_softmax(level, -1) for level in student.logits]
    log_q = [torch.log_softmax(level, -1) for level in teacher.logits]
    return max(float((q - p).abs().max()) for p, q in zip(log_p, log_q, strict=True))


def _catalogue_entry(label: str | None) -> Divergence | None:
    """The divergence with a label such as `skew_jsd(beta=0.1)`; None for other words."""
    try:
        return None if label is None else as_divergence(label)
    except ValueError:
        return None


def _descends(report: Audit, divergence: Divergence) -> bool:
    found = report.identified
    if found is None or found.error > report.tolerance:
        return False
    return found.objective == divergence.name and all(
        abs(found.parameters[key] - value) < 1e-6 for key, value in divergence.parameters.items()
    )
