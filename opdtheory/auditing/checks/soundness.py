"""Checks beyond the direction of the gradient: a wrong loss may reach a high cosine on any one pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from opdtheory.auditing.checks.batch_checks import BATCH_CHECKS, PADDING_CHECKS
from opdtheory.auditing.checks.subject import Check, Finding, Subject, norm
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import Enumeration, GradientMoments, Loss, TabularPolicy
from opdtheory.exact.modes import plain_modes
from opdtheory.objective import Objective

__all__ = ["CHECKS", "Check", "soundness"]

# Evaluations of a coupled loss that one expectation may take here.
_BUDGET = 2_000

# Noise on the logits of a policy that samples instead of the student.
_OTHER_POLICY = 0.5

# Teachers that are tried before a loss is found not to depend on its teacher.
_OTHER_TEACHERS = 4


def soundness(
    loss: Loss,
    cases: list[Case],
    moments: list[GradientMoments],
    objective: Objective | None,
    scenario: Scenario,
    tolerance: float = 1e-9,
) -> list[Check]:
    r"""Check properties of a sound loss that the direction of its gradient does not show.

    These are stationarity ($E\nabla L = 0$ at $p = q$), one common scale over the pairs, dependence on the teacher, the
    sampling policy, padding, shift invariance ($\sum_a \partial L/\partial z_a = 0$), backward against central
    differences, the batch, and finiteness at rare tokens. A check fails if the loss raises in it, except for a loss
    that raises on padding and for `InvalidArgumentError`, by which a loss refuses a batch.

    Args:
        loss: a function of rollouts that returns a scalar, deterministic and stateless.
        cases: the audit's panel.
        moments: the moments of the loss's gradient, one per case.
        objective: the claimed objective, or None if none is claimed.
        scenario: what the rollouts look like.
        tolerance: relative error that counts as rounding.

    Returns:
        One `Check` for each name in `CHECKS`, in that order.
    """
    subject = Subject(loss, cases, moments, objective, scenario, tolerance)
    with plain_modes():
        return [_guarded(name, check, subject) for name, check in _CHECKS.items()]


def _guarded(name: str, check: Callable[[Subject], Finding], subject: Subject) -> Check:
    """The result of a check, which fails if the loss raises."""
    try:
        return Check(name, *check(subject))
    except BudgetExceededError as error:
        return Check(name, None, None, None, f"Not looked at: {error}.")
    except InvalidArgumentError as error:  # an estimator or adapter of this library refuses the batch
        return Check(name, None, None, None, f"The loss refuses such a batch: {error}.")
    except Exception as error:  # whatever the loss raises is the finding
        reason = str(error).strip().splitlines() or [""]
        # A loss that refuses rollouts that end early is not silently wrong on them.
        failed = None if name in PADDING_CHECKS else False
        return Check(name, failed, None, None, f"The loss raises {type(error).__name__} here: {reason[0]}")


def _stationary(s: Subject) -> Finding:
    typical = sorted(norm(m) for m in s.moments)[len(s.moments) // 2]
    if all(m.is_zero for m in s.moments):
        return None, 0.0, s.tolerance, "The expected gradient is zero everywhere, at the teacher too."
    student = s.case.student
    found = _moments(s, student, student.perturbed(0.0), s.case.behavior)
    value = norm(found) / typical
    detail = f"At p = q the expected gradient does not vanish: it has {value:.2g} times the typical length"
    claimed = s.objective is not None
    detail += ", so a student that equals the teacher leaves it." if claimed else "; no divergence is claimed."
    return s.held(value, "At p = q the expected gradient vanishes.", detail, failed=False if claimed else None)


def _common_scale(s: Subject) -> Finding:
    if s.against_claim is None:
        return None, None, s.tolerance, "No divergence is claimed."
    scales = [float(a @ e) / float(e @ e) for a, e in zip(*s.against_claim, strict=True)]
    largest = max(abs(c) for c in scales)
    if all(m.is_zero for m in s.moments):
        return None, None, s.tolerance, "The expected gradient is zero on every pair."
    return s.held(
        (max(scales) - min(scales)) / largest,
        f"Along the claimed gradient it is {scales[0]:.6g} times as long on every pair.",
        f"Along the claimed gradient it is {min(scales):.4g} times as long on one pair, {max(scales):.4g} on another.",
    )


def _best_scale(s: Subject) -> Finding:
    if s.against_claim is None:
        return None, None, s.tolerance, "No divergence is claimed."
    fit = fit_scale(*s.against_claim)
    value = max(fit.errors)
    if fit.scale <= 0:
        return False, value, s.tolerance, "No positive multiple of the claimed gradient comes near it."
    return s.held(
        value,
        f"At one scale for all pairs it misses the claimed gradient by {value:.1e} of its length.",
        f"At the best scale for all pairs it misses the claimed gradient by up to {value:.2g} of its length, "
        f"with a cosine from {min(fit.cosine):.4f} to {max(fit.cosine):.4f}.",
    )


def _teacher(s: Subject) -> Finding:
    moved, value_moved = 0.0, 0.0
    for other in range(_OTHER_TEACHERS):
        # A loss that reads the sign of a ratio alone may not notice one other teacher.
        teacher = s.case.teacher.perturbed(1.0 + other, seed=1000 * s.scenario.seed + 902 + 10 * other)
        tables = Enumeration.build(s.case.student, teacher, s.case.behavior).teacher_tables
        after = s.evaluate(replace(s.live, teacher_tables=tables), s.everyone(s.live))
        moved = max(moved, s.gradient_moved(s.base[1], after[1]))
        value_moved = max(value_moved, s.moved(s.base, after))
        if moved > s.tolerance:
            return True, moved, s.tolerance, "Another teacher gives another gradient."
    also = "though the value does" if value_moved > s.tolerance else "nor does the value"
    return False, moved, s.tolerance, f"The gradient does not depend on the teacher, {also}."


def _other_policy(s: Subject) -> Finding:
    case, claimed = s.case, s.scenario.off_policy > 0
    behavior = None if claimed else case.student.perturbed(_OTHER_POLICY, seed=1000 * s.scenario.seed + 903)
    found = _moments(s, case.student, case.teacher, behavior)
    before = s.moments[s.middle]
    here, there = flat(before.mean), flat(found.mean)
    floor = before.rounding * max(before.size, found.size)
    value = float((here - there).norm()) / max(float(here.norm()), float(there.norm()), floor, 1e-300)
    detail = f"The expected gradient changes by {value:.2g} of its length when another policy samples the rollouts"
    detail += "." if claimed else ": what is found on-policy holds on-policy."
    holds = "The expected gradient is the same whichever of two policies samples the rollouts."
    return s.held(value, holds, detail, failed=False if claimed else None)


def _moments(
    s: Subject, student: TabularPolicy, teacher: TabularPolicy, behavior: TabularPolicy | None
) -> GradientMoments:
    return s.scenario.moments(s.loss, Case(student, teacher, behavior, ""), _BUDGET)


_CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "stationary at the teacher": _stationary,
    "one common scale": _common_scale,
    "error at the best scale": _best_scale,
    "depends on the teacher": _teacher,
    "holds under another sampling policy": _other_policy,
    **BATCH_CHECKS,
}

CHECKS = tuple(_CHECKS)
