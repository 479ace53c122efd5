"""Checks of a loss beyond the direction of its gradient: a wrong loss may reach a high cosine on any one pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from opdtheory.auditing.black_box import ZERO
from opdtheory.auditing.checks.batch_checks import BATCH_CHECKS
from opdtheory.auditing.checks.subject import Check, Subject, norm
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import Enumeration, GradientMoments, Loss, TabularPolicy
from opdtheory.exact.threads import one_thread
from opdtheory.objective import Objective

__all__ = ["CHECKS", "Check", "soundness"]

# Evaluations of a coupled loss that one expectation of these checks may take.
_BUDGET = 2_000

# Noise on the logits of a policy that samples in the student's place.
_OTHER_POLICY = 0.5


def soundness(
    loss: Loss,
    cases: list[Case],
    moments: list[GradientMoments],
    objective: Objective | None,
    scenario: Scenario,
    tolerance: float = 1e-9,
) -> list[Check]:
    r"""Look at what a sound loss has and the direction of its gradient does not show.

    Stationarity ($E\nabla L = 0$ at $p = q$), one common scale over the pairs, the teacher's part, the sampling
    policy, padding, shift invariance ($\sum_a \partial L/\partial z_a = 0$), backward against central differences,
    the batch, and finiteness at rare tokens. An exception that the loss raises in a check fails that check, except
    `InvalidArgumentError`, which is a refusal.

    Args:
        loss: a function of rollouts that returns a scalar, deterministic and without state.
        cases: the audit's panel.
        moments: the moments of the loss's gradient, one per case.
        objective: the claimed one, or None if none is claimed.
        scenario: what the rollouts look like.
        tolerance: relative error that is rounding.

    Returns:
        One `Check` for each name in `CHECKS`, in that order.
    """
    subject = Subject(loss, cases, moments, objective, scenario, tolerance)
    with one_thread():
        return [_guarded(name, check, subject) for name, check in _CHECKS.items()]


def _guarded(name: str, check: Callable[[Subject], Check], subject: Subject) -> Check:
    """The check's result; an exception from the loss counts against it."""
    try:
        return check(subject)
    except BudgetExceededError as error:
        return Check(name, None, None, None, f"Not looked at: {error}.")
    except InvalidArgumentError as error:  # an estimator or adapter of this library that says what it does not take
        return Check(name, None, None, None, f"The loss refuses such a batch: {error}.")
    except Exception as error:  # whatever a stranger's loss raises is the finding
        reason = str(error).strip().splitlines() or [""]
        return Check(name, False, None, None, f"The loss raises {type(error).__name__} here: {reason[0]}")


def _stationary(s: Subject) -> Check:
    name = "stationary at the teacher"
    typical = sorted(norm(m) for m in s.moments)[len(s.moments) // 2]
    if typical <= ZERO * max(m.second_moment for m in s.moments) ** 0.5:
        return Check(name, None, 0.0, s.tolerance, "The expected gradient is zero everywhere, at the teacher too.")
    student = s.case.student
    found = _moments(s, student, student.perturbed(0.0), s.case.behavior)
    value = norm(found) / typical
    if value <= s.tolerance:
        return Check(name, True, value, s.tolerance, "At p = q the expected gradient vanishes.")
    detail = f"At p = q the expected gradient does not vanish: it has {value:.2g} times the typical length"
    if s.objective is None:
        return Check(name, None, value, s.tolerance, f"{detail}; no divergence is claimed.")
    return Check(name, False, value, s.tolerance, f"{detail}, so a student that equals the teacher leaves it.")


def _common_scale(s: Subject) -> Check:
    name = "one common scale"
    if s.against_claim is None:
        return Check(name, None, None, s.tolerance, "No divergence is claimed.")
    scales = [float(a @ e) / float(e @ e) for a, e in zip(*s.against_claim, strict=True)]
    largest = max(abs(c) for c in scales)
    noise = max(m.second_moment for m in s.moments) ** 0.5
    if largest <= ZERO * noise:
        return Check(name, None, None, s.tolerance, "The expected gradient is zero on every pair.")
    value = (max(scales) - min(scales)) / largest
    if value <= s.tolerance:
        detail = f"Along the claimed gradient it is {scales[0]:.6g} times as long on every pair."
        return Check(name, True, value, s.tolerance, detail)
    detail = (
        f"Along the claimed gradient it is {min(scales):.4g} times as long on one pair, {max(scales):.4g} on another."
    )
    return Check(name, False, value, s.tolerance, detail)


def _best_scale(s: Subject) -> Check:
    name = "error at the best scale"
    if s.against_claim is None:
        return Check(name, None, None, s.tolerance, "No divergence is claimed.")
    fit = fit_scale(*s.against_claim)
    value = max(fit.errors)
    if fit.scale <= 0:
        return Check(name, False, value, s.tolerance, "No positive multiple of the claimed gradient comes near it.")
    if value <= s.tolerance:
        detail = f"At one scale for all pairs it misses the claimed gradient by {value:.1e} of its length."
        return Check(name, True, value, s.tolerance, detail)
    detail = (
        f"At the best scale for all pairs it misses the claimed gradient by up to {value:.2g} of its length, "
        f"with a cosine from {min(fit.cosine):.4f} to {max(fit.cosine):.4f}."
    )
    return Check(name, False, value, s.tolerance, detail)


def _teacher(s: Subject) -> Check:
    name = "depends on the teacher"
    other = s.case.teacher.perturbed(1.0, seed=1000 * s.scenario.seed + 902)
    tables = Enumeration.build(s.case.student, other, s.case.behavior).teacher_tables
    after = s.evaluate(replace(s.live, teacher_tables=tables), s.everyone(s.live))
    moved = s.gradient_moved(s.base[1], after[1])
    if moved > s.tolerance:
        return Check(name, True, moved, s.tolerance, "Another teacher gives another gradient.")
    also = "though the value does" if s.moved(s.base, after) > s.tolerance else "nor does the value"
    return Check(name, False, moved, s.tolerance, f"The gradient does not depend on the teacher, {also}.")


def _other_policy(s: Subject) -> Check:
    name, case, claimed = "holds under another sampling policy", s.case, s.scenario.off_policy > 0
    behavior = None if claimed else case.student.perturbed(_OTHER_POLICY, seed=1000 * s.scenario.seed + 903)
    found = _moments(s, case.student, case.teacher, behavior)
    before = s.moments[s.middle]
    here, there = flat(before.mean), flat(found.mean)
    floor = ZERO * max(before.second_moment, found.second_moment) ** 0.5
    value = float((here - there).norm()) / max(float(here.norm()), float(there.norm()), floor, 1e-300)
    if value <= s.tolerance:
        detail = "The expected gradient is the same whichever of two policies samples the rollouts."
        return Check(name, True, value, s.tolerance, detail)
    detail = f"The expected gradient changes by {value:.2g} of its length when another policy samples the rollouts"
    if claimed:
        return Check(name, False, value, s.tolerance, f"{detail}.")
    return Check(name, None, value, s.tolerance, f"{detail}: what is found on-policy holds on-policy.")


def _moments(
    s: Subject, student: TabularPolicy, teacher: TabularPolicy, behavior: TabularPolicy | None
) -> GradientMoments:
    return s.scenario.moments(s.loss, Case(student, teacher, behavior, ""), _BUDGET)


_CHECKS: dict[str, Callable[[Subject], Check]] = {
    "stationary at the teacher": _stationary,
    "one common scale": _common_scale,
    "error at the best scale": _best_scale,
    "depends on the teacher": _teacher,
    "holds under another sampling policy": _other_policy,
    **BATCH_CHECKS,
}

CHECKS = tuple(_CHECKS)
