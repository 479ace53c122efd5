"""Assertions about losses: that one is unbiased, and that an estimator keeps its claim. They need no test framework."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opdtheory.auditing import VERDICTS, Audit, audit
from opdtheory.auditing.panel import panel
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Claim, Estimator
from opdtheory.estimators.base import FIXED_LENGTH, ON_POLICY, ON_POLICY_OR_ONE_STEP
from opdtheory.exact import Loss, TabularPolicy

__all__ = ["assert_claim", "assert_unbiased", "claim_settings", "gradient_gap"]

# Noise on the sampling policy's logits where a claim does not ask for on-policy rollouts.
_OFF_POLICY = 0.3

_BATCH = re.compile(r"batch of at least (\d+)")
_BEYOND = re.compile(r"log-ratios beyond (\S+) occur")
_ABOVE = re.compile(r"vocabulary above (\d+)")


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
        objective: the divergence it should minimise, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        up_to_scale: whether a constant positive factor is allowed.
        **audit_settings: as of `opdtheory.audit`: `batch_size`, `eos`, `off_policy`, `gamma`, `seed`, `name`. With
            `eos=0` rollouts may end early; the default asks about fixed lengths.

    Returns:
        The audit that found it so.

    Raises:
        AssertionError: it is not; the message is the audit.
        InvalidArgumentError: as `opdtheory.audit`.
        LossError: as `opdtheory.audit`.

    Example:
        >>> def k2(rollouts):
        ...     return rollouts.token_sum(rollouts.log_u.square() / 2)
        >>> assert_unbiased(k2, "reverse_kl").verdict
        'exact'
    """
    report = audit(loss, objective, granularity, **audit_settings)
    if report.verdict != "exact" and not (up_to_scale and report.verdict == "exact_up_to_scale"):
        wanted = "unbiased up to scale" if up_to_scale else "unbiased"
        raise AssertionError(
            f"{report.name} is not {wanted} for {report.objective} ({report.granularity}): {VERDICTS[report.verdict]}."
            f"\n\n{report}"
        )
    return report


def assert_claim(estimator: Estimator, *, seed: int = 0) -> Audit:
    """Assert that an audit finds what an estimator claims: the verdict, and the divergence that it descends instead.

    The audit's settings are the widest that the claim's assumptions leave (`claim_settings`), so a declared bias
    must be there, and an exactness must survive what the claim does not exclude.

    Args:
        estimator: a loss with a claim.
        seed: of the audit's panel.

    Returns:
        The audit.

    Raises:
        AssertionError: claim and audit differ; the message is the audit.
        InvalidArgumentError: an assumption that the audit's policies do not meet, such as a larger vocabulary.

    Example:
        >>> from opdtheory.estimators import estimator
        >>> assert_claim(estimator("k3_loss")).descends
        'forward_kl'
    """
    claim, settings = estimator.claim, claim_settings(estimator.claim)
    _check_met(claim, settings, seed)
    report = audit(estimator, claim.divergence, claim.granularity, seed=seed, name=repr(estimator), **settings)
    if report.verdict != claim.verdict:
        raise AssertionError(
            f"{estimator!r} claims {claim.verdict!r}, the audit finds {report.verdict!r}. The claim: {claim}."
            f"\n\n{report}"
        )
    other = _catalogue_entry(claim.descends) if claim.verdict == "other_objective" else None
    if other is not None and not _descends(report, other):
        raise AssertionError(
            f"{estimator!r} claims to descend {other.label}, the audit finds {report.descends}.\n\n{report}"
        )
    return report


def claim_settings(claim: Claim) -> dict[str, Any]:
    """The settings of an audit under which a claim's assumptions hold, and as little else as possible.

    Rollouts vary in length unless the claim asks for a fixed one, and come from another policy than the student
    unless it asks for on-policy ones.
    """
    batches = [int(found[1]) for text in claim.assumptions if (found := _BATCH.fullmatch(text))]
    on_policy = ON_POLICY in claim.assumptions or ON_POLICY_OR_ONE_STEP in claim.assumptions
    return {
        "batch_size": max(batches, default=1),
        "eos": None if FIXED_LENGTH in claim.assumptions else 0,
        "off_policy": 0.0 if on_policy else _OFF_POLICY,
        "gamma": claim.gamma if claim.granularity == "token_return" else 1.0,
    }


def gradient_gap(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    r"""The largest difference of two lists of tensors, $\max|a - e| / \max(1, \max|e|)$; NaN counts as infinite.

    Args:
        actual: tensors of any shapes, such as a gradient by level.
        expected: the same number of tensors of the same shapes.

    Raises:
        InvalidArgumentError: the lists differ in length or in a shape.
    """
    shapes = [[tuple(level.shape) for level in levels] for levels in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise InvalidArgumentError("actual", f"has shapes {shapes[0]}, expected has {shapes[1]}")
    if not shapes[0]:
        return 0.0
    size = max(1.0, *(float(e.detach().abs().max()) for e in expected))
    gaps = [float((a.detach() - e.detach()).abs().max()) / size for a, e in zip(actual, expected, strict=True)]
    return max(gap if gap == gap else float("inf") for gap in gaps)


def _check_met(claim: Claim, settings: dict[str, Any], seed: int) -> None:
    """Refuse a claim that the audit's policies say nothing about."""
    cases = panel(settings["batch_size"], settings["eos"], settings["off_policy"], seed)
    largest_ratio = max(_largest_log_ratio(case.student, case.teacher) for case in cases)
    vocabulary = max(case.student.vocab_size for case in cases)
    for text in claim.assumptions:
        beyond, above = _BEYOND.fullmatch(text), _ABOVE.fullmatch(text)
        if beyond and float(beyond[1]) >= largest_ratio:
            raise InvalidArgumentError(
                "estimator", f"claims something given that {text}; the audit's log-ratios end at {largest_ratio:.3g}"
            )
        if above and int(above[1]) >= vocabulary:
            raise InvalidArgumentError(
                "estimator", f"claims something given a {text}; the audit's policies have {vocabulary} tokens"
            )


def _largest_log_ratio(student: TabularPolicy, teacher: TabularPolicy) -> float:
    log_p = [torch.log_softmax(level, -1) for level in student.logits]
    log_q = [torch.log_softmax(level, -1) for level in teacher.logits]
    return max(float((q - p).abs().max()) for p, q in zip(log_p, log_q, strict=True))


def _catalogue_entry(label: str | None) -> Divergence | None:
    """The divergence of a label such as `skew_jsd(beta=0.1)`; None for words."""
    try:
        return None if label is None else as_divergence(label)
    except ValueError:
        return None


def _descends(report: Audit, divergence: Divergence) -> bool:
    if report.identified is None or report.identified["error"] > report.tolerance:
        return False
    found = report.identified["parameters"]
    return report.identified["objective"] == divergence.name and all(
        abs(found[key] - value) < 1e-6 for key, value in divergence.parameters.items()
    )
