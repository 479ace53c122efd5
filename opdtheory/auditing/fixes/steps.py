"""Logits and tokens out of step by one position, on either side, found by moving one against the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from opdtheory.auditing.fixes.facts import Candidate, Facts
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts

__all__ = ["moved", "steps"]

# How far the rows of student and teacher are moved, the likeliest mistakes first, and how many of these are likely.
_MOVES = ((1, 1), (-1, -1), (0, 1), (1, 0), (0, -1), (-1, 0), (1, -1), (-1, 1))
_LIKELIEST = 4

_STUDENT = ("student_logits", "student_logprobs")
_TEACHER = ("teacher_logits", "teacher_logprobs")


def moved(loss: Loss, student: int, teacher: int) -> Loss:
    """The loss on rollouts whose rows of student and teacher are moved by -1, 0 or 1 positions against the tokens.

    A masked position is added at either end, so that no row and no token is lost.
    """
    by_name = dict.fromkeys(_STUDENT, student) | dict.fromkeys(_TEACHER, teacher)

    def changed(rollouts: Rollouts) -> Tensor:
        length = rollouts.mask.shape[1]
        moved_fields: dict[str, Any] = {}
        for each in fields(rollouts):
            value = getattr(rollouts, each.name)
            if not isinstance(value, Tensor) or value.shape[:2] != rollouts.mask.shape:
                continue
            # Rows repeat beyond the ends, so that a loss which reads them there is caught.
            source = (torch.arange(length + 2) - 1 - by_name.get(each.name, 0)).clamp(0, length - 1)
            moved_fields[each.name] = value[:, source]
        mask = torch.zeros_like(moved_fields["mask"])
        mask[:, 1:-1] = rollouts.mask
        return loss(replace(rollouts, **moved_fields | {"mask": mask}))

    return changed


def steps(facts: Facts) -> Iterator[Candidate]:
    """The loss with its rows moved into step with the tokens, and with each other."""
    # On one step nothing is out of step; a loss that treats each token alike has no step to be out of.
    if facts.local:
        return
    # A trial of coupled rollouts is expensive.
    for student, teacher in _MOVES[: _LIKELIEST if facts.scenario.coupled else None]:
        loss = moved(facts.loss, student, teacher)
        if student == teacher:
            row, slices = _words(student)
            text = f"Pair each token with the logits that predict it, {slices}"
            cause = f"Logits and labels are out of step: the loss scores each token with the row {row}"
        elif 0 in (student, teacher):
            who, other = ("teacher", "student") if student == 0 else ("student", "teacher")
            row, slices = _words(student or teacher)
            text = f"Read the {who}'s logits at the position of the {other}'s, {slices}"
            cause = f"The {who} is out of step: each token meets the {who}'s row {row}, and the {other}'s own"
        else:
            text = "Pair each token with the logits that predict it, the same slice for student and teacher"
            cause = f"Student and teacher are out of step: rows {_words(student)[0]} and {_words(teacher)[0]} meet"
        yield Candidate("shift", f"{text}.", loss, f"{cause}.")


def _words(step: int) -> tuple[str, str]:
    """Which row the loss reads, and what to read in its place."""
    if step > 0:
        return "after its own", "one row earlier: logits[:, :-1] with labels[:, 1:] where row n predicts token n + 1"
    return "before its own", "one row later: rows that are aligned with the tokens are not to be shifted again"
