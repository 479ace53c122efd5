"""A temperature on the logits of student or teacher, found by the factor that undoes it (T16)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from opdtheory.auditing.fixes.facts import Candidate, Facts
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.naming.fit import fit_scale
from opdtheory.auditing.scenario import Case
from opdtheory.exact import Enumeration, Loss, random_pair
from opdtheory.rollouts import Rollouts

__all__ = ["heated", "temperatures"]

# One-step pairs on which temperatures are fitted: vocabulary, and the distance of each teacher.
_VOCABULARY, _DISTANCES = 4, (0.7, 2.0)

# Temperatures from which the fit starts, on the student's side, the teacher's, or both.
_STARTS = (0.35, 0.6, 1.0, 1.5, 2.5, 5.0)

# A temperature this near to one is none; a fit whose error is larger than this is no explanation.
_ONE, _FITS = 1e-4, 1e-5


def heated(loss: Loss, student: float, teacher: float) -> Loss:
    """The loss with the logits multiplied by a number on each side, which undoes a division by it."""

    def changed(r: Rollouts) -> Tensor:
        return loss(replace(r, student_logits=student * r.student_logits, teacher_logits=teacher * r.teacher_logits))

    return changed


def temperatures(facts: Facts) -> Iterator[Candidate]:
    """The loss without the temperatures that it divides logits by, if there are any."""
    # A function of the ratio alone sees no logits.
    if facts.curve is not None:
        return
    found = attempt(lambda: _fitted(facts))
    if found is None:
        return
    student, teacher, scale = found
    loss = heated(facts.loss, student, teacher)
    claim = facts.claim.label
    if abs(student - teacher) <= _ONE:
        text = f"Do not divide the logits by {student:.6g}, on both sides"
        cause = f"Student and teacher are softened by a temperature of {student:.6g} (T16)."
        follows = (
            f"The loss follows the {claim} of the softened distributions, softmax(logits / {student:.6g}), times "
            f"{scale / student:.6g}."
        )
    elif abs(student - 1.0) <= _ONE:
        text = f"Do not divide the teacher's logits by {teacher:.6g}"
        cause = f"The teacher alone is softened by a temperature of {teacher:.6g} (T16)."
        follows = f"The loss follows the {claim} to softmax(teacher_logits / {teacher:.6g}), not to the teacher."
    elif abs(teacher - 1.0) <= _ONE:
        text = f"Do not divide the student's logits by {student:.6g}"
        cause = f"The student alone is softened by a temperature of {student:.6g} (T16)."
        follows = f"The loss is at rest where softmax(student_logits / {student:.6g}) is the teacher."
    else:
        text = f"Do not divide the student's logits by {student:.6g} and the teacher's by {teacher:.6g}"
        cause = f"The student is softened by a temperature of {student:.6g} and the teacher by {teacher:.6g} (T16)."
        follows = "The loss is at rest where the two softened distributions agree, not at the teacher."
    if abs(scale - 1.0) > _ONE:
        text += f", and drop the factor {scale:.6g}, a convention that belongs to the temperature"
        loss = _times(loss, 1.0 / scale)
    yield Candidate("temperature", f"{text} (T16).", loss, cause, follows)


def _times(loss: Loss, factor: float) -> Loss:
    return lambda rollouts: factor * loss(rollouts)


def _fitted(facts: Facts) -> tuple[float, float, float] | None:
    """The temperatures of student and teacher that explain the gradient, and the scale that is left; None if none."""
    from scipy.optimize import least_squares

    cases, size = _cases(), facts.scenario.batch_size
    exact = [case.exact(facts.claim)[0].flatten() for case in cases]

    def actual(student: float, teacher: float) -> list[Tensor]:
        return [_gradient(heated(facts.original, student, teacher), case, size) for case in cases]

    def residual(logs: np.ndarray) -> np.ndarray:
        found = actual(*np.exp(logs))
        fit = fit_scale(found, exact)
        parts = [(a - fit.scale * g) / a.norm().clamp_min(1e-100) for a, g in zip(found, exact, strict=True)]
        return torch.cat(parts).numpy()

    plain = float(np.linalg.norm(residual(np.zeros(2))))
    if plain <= _FITS or abs(float(np.linalg.norm(residual(np.full(2, 0.7)))) - plain) <= 1e-9:
        return None
    starts = [np.log(t) * np.array(side) for t in _STARTS for side in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)) if t != 1.0]
    for start in sorted(starts, key=lambda logs: float(np.linalg.norm(residual(logs))))[:2]:
        solution = least_squares(residual, start, bounds=(-4.0, 4.0), xtol=1e-13, ftol=1e-13, gtol=1e-13)
        student, teacher = (_short(float(t)) for t in np.exp(solution.x))
        # A side that the loss does not read has any temperature, so none.
        for pair in ((1.0, teacher), (student, 1.0), (teacher, teacher), (student, teacher)):
            if max(abs(t - 1.0) for t in pair) > _ONE and float(np.linalg.norm(residual(np.log(pair)))) <= _FITS:
                scale = fit_scale(actual(*pair), exact).scale
                return (*pair, scale) if scale > 0 else None
    return None


def _short(value: float) -> float:
    """The nearest number of at most four decimals, if the difference is the error of a fit."""
    return round(value, 4) if abs(round(value, 4) - value) <= 1e-5 * value else value


def _cases() -> list[Case]:
    pairs = [random_pair(_VOCABULARY, 1, scale=1.0, distance=d, seed=70 + i) for i, d in enumerate(_DISTANCES)]
    return [Case(student, teacher, None, "one step") for student, teacher in pairs]


def _gradient(loss: Loss, case: Case, size: int) -> Tensor:
    """The expected gradient of one step from batches of equal rollouts."""
    everything = Enumeration.build(case.student, case.teacher)
    total = torch.zeros(_VOCABULARY, dtype=torch.float64)
    for token, share in enumerate(everything.probability.tolist()):
        index = torch.full((size,), token)
        logits = everything.gather_logits(everything.student_tables, index).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(everything.rollouts(index, logits)), logits)
        total += share * gradient.sum((0, 1))
    return total
