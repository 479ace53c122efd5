"""Rollouts of random length: what the student's own choice of a length does to a mean over tokens."""

from __future__ import annotations

import sympy
from torch import Tensor

from opdtheory.exact import Enumeration, TabularPolicy

__all__ = ["inverse_length", "score_of_length"]


def inverse_length(student: TabularPolicy, teacher: TabularPolicy, batch_size: int) -> Tensor:
    r"""$E[1/\sum_b L_b]$ over batches, by enumeration, differentiable in the student."""
    rollouts = Enumeration.build(student, teacher).rollouts()
    chance = (rollouts.mask * rollouts.student_logprobs).sum(-1).exp()
    total, lengths = chance, rollouts.mask.sum(-1)
    for _ in range(batch_size - 1):
        total = (total.unsqueeze(-1) * chance).flatten()
        lengths = (lengths.unsqueeze(-1) + rollouts.mask.sum(-1)).flatten()
    return (total / lengths).sum()


def score_of_length() -> bool:
    r"""$E[S/L] = \nabla E[1/L]$ for any length that does not depend on θ."""
    theta = sympy.Symbol("theta")
    distributions = [sympy.Function(f"p{i}", positive=True)(theta) for i in range(3)]
    lengths = sympy.symbols("l0:3", positive=True)
    left = sum(p * sympy.diff(sympy.log(p), theta) / k for p, k in zip(distributions, lengths, strict=True))
    return (
        sympy.simplify(left - sympy.diff(sum(p / k for p, k in zip(distributions, lengths, strict=True)), theta)) == 0
    )
