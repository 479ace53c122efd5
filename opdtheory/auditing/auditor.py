"""`audit`: from a loss function to the objective whose gradient it follows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdtheory.auditing.identify import Fit, Match, best_match, explains_panel, fit_scale, flat, recover_weight
from opdtheory.auditing.panel import Case, panel
from opdtheory.auditing.report import Audit, PairResult
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import GradientMoments, Loss, exact_gradient, gradient_moments
from opdtheory.exact.oracle import check_objective, full_vocabulary_variance
from opdtheory.exact.threads import one_thread
from opdtheory.rollouts import Rollouts

__all__ = ["audit", "quick_verdict"]

# Relative error that rounding can leave in an exact expectation, by the dtype the loss returns.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 2e-2

# A gradient this much smaller than its own noise is zero.
_ZERO = 1e-12


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
) -> Audit:
    """Find out what a loss really minimises, by exact expectation over enumerated policies.

    The loss is run on every batch of rollouts that small random policies can produce; its expected
    gradient is compared with the exact gradient of the claimed objective and of every catalogue
    entry, and the weight that it puts on a token is recovered as a function of `u = teacher/student`.

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

    Returns:
        An `Audit`; `print` it, or take `.verdict`, `.identified`, `.weight` and `.to_dict()`.

    Raises:
        InvalidArgumentError: an unknown objective or granularity, or a setting out of range.
        LossError: the loss is no scalar, has no gradient, differs between identical calls, or gives NaN.
        BudgetExceededError: the batch size is too large to enumerate.

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
    with one_thread():
        settings = _Settings(batch_size, eos, off_policy, gamma, seed)
        return _audit(_Counted(loss), divergence, granularity, settings, name or _name(loss))


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
        return _compare(_Counted(loss), as_divergence(objective), granularity, settings).verdict


@dataclass(frozen=True)
class _Settings:
    """How the panel is drawn; the arguments of `audit` of the same names."""

    batch_size: int
    eos: int | None
    off_policy: float
    gamma: float
    seed: int


@dataclass(frozen=True)
class _Comparison:
    """The loss's expected gradients on the panel beside the claimed objective's."""

    cases: list[Case]
    moments: list[GradientMoments]
    gradients: list[Tensor]
    fit: Fit
    tolerance: float
    verdict: str


def _compare(loss: _Counted, divergence: Divergence, granularity: str, settings: _Settings) -> _Comparison:
    cases = panel(settings.batch_size, settings.eos, settings.off_policy, settings.seed)
    exact = [
        flat(exact_gradient(case.student, case.teacher, divergence, granularity, gamma=settings.gamma))
        for case in cases
    ]
    if any(float(g.norm()) == 0.0 for g in exact):
        raise InvalidArgumentError("objective", f"{divergence.label} has a zero gradient everywhere; nothing to audit")
    moments = _moments(loss, cases, settings.batch_size)
    gradients = [flat(m.mean) for m in moments]
    fit = fit_scale(gradients, exact)
    tolerance = _TOLERANCE.get(loss.dtype, _COARSE)
    zero = all(float(g.norm()) <= _ZERO * m.second_moment**0.5 for g, m in zip(gradients, moments, strict=True))
    return _Comparison(cases, moments, gradients, fit, tolerance, "zero" if zero else _verdict(fit, tolerance))


def _audit(loss: _Counted, divergence: Divergence, granularity: str, settings: _Settings, name: str) -> Audit:
    start = time.perf_counter()
    found = _compare(loss, divergence, granularity, settings)
    batch_size, fit, tolerance, verdict = settings.batch_size, found.fit, found.tolerance, found.verdict
    weight = recover_weight(loss, batch_size, settings.off_policy, settings.seed, tolerance)
    match: Match | None = None
    if verdict in ("exact", "exact_up_to_scale"):
        match = Match(divergence, granularity, fit)
    elif verdict == "biased":
        match = best_match(found.gradients, found.cases, weight, granularity, tolerance)
        if match is not None and match.fit.worst_error <= tolerance:
            verdict = "other_objective"

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
        identified=None if match is None else _record(match, tolerance),
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
        settings=dict(vars(settings)),
        evaluations=loss.calls,
        seconds=time.perf_counter() - start,
    )


class _Counted:
    """A loss that counts its calls and remembers the dtype of its value."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.calls = 0
        self.dtype = torch.float64

    def __call__(self, rollouts: Rollouts) -> Tensor:
        self.calls += 1
        value = self.loss(rollouts)
        if isinstance(value, Tensor):
            self.dtype = value.dtype
        return value


def _moments(loss: Loss, cases: list[Case], batch_size: int) -> list[GradientMoments]:
    return [gradient_moments(loss, case.student, case.teacher, batch_size, case.behavior) for case in cases]


def _verdict(fit: Fit, tolerance: float) -> str:
    if max(fit.relative_bias) <= tolerance:
        return "exact"
    return "exact_up_to_scale" if fit.worst_error <= tolerance else "biased"


def _with_lengths(loss: Loss, match: Match, settings: _Settings, tolerance: float) -> dict[str, Any]:
    """The verdict against the objective found, on two pairs whose rollouts may end early."""
    cases = panel(1, 0, settings.off_policy, settings.seed)[1:4:2]
    discount = settings.gamma if match.granularity == "token_return" else 1.0
    exact = [
        flat(exact_gradient(case.student, case.teacher, match.divergence, match.granularity, gamma=discount))
        for case in cases
    ]
    fit = fit_scale([flat(m.mean) for m in _moments(loss, cases, 1)], exact)
    return {"verdict": _verdict(fit, tolerance), "relative_bias": max(fit.errors)}


def _record(match: Match, tolerance: float) -> dict[str, Any]:
    return {
        "objective": match.divergence.name,
        "granularity": match.granularity,
        "parameters": dict(match.divergence.parameters),
        "scale": match.fit.scale,
        "error": match.fit.worst_error if match.fit.worst_error <= tolerance else match.fit.typical_error,
    }


def _name(loss: Loss) -> str:
    return str(getattr(loss, "name", None) or getattr(loss, "__name__", None) or repr(loss))
