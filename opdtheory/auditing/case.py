"""One pair of an audit's panel, and the exact gradients of what a loss may claim on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.choices import GRANULARITIES
from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import TabularPolicy, exact_gradient
from opdtheory.exact.histories import local_gradient, local_tree
from opdtheory.exact.oracle import full_vocabulary_variance
from opdtheory.exact.tree import Tree
from opdtheory.objective import Objective

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    r"""One pair of the panel, with the objective's policies: $\sum_k \lambda_k D_f(q_k\|p)$ at given histories.

    Attributes:
        student: the policy that is trained.
        teacher: the policy that scores, the first one if there are several.
        behavior: the policy that samples, or None for the student.
        label: what distinguishes the pair, for tables.
        targets: weights and policies that the claim brings the student to; empty: the teacher.
        histories: the policy whose prefixes the claim is about, or None for the student.
        student_temperature: the claim is about the student softened by it.
        teacher_temperature: the claim is about targets softened by it.
    """

    student: TabularPolicy
    teacher: TabularPolicy
    behavior: TabularPolicy | None
    label: str
    targets: tuple[tuple[float, TabularPolicy], ...] = ()
    histories: TabularPolicy | None = None
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0

    @property
    def local_only(self) -> bool:
        """Whether only token-local objectives are defined: other histories than the student's, or temperatures."""
        return self.histories is not None or self.student_temperature != 1.0 or self.teacher_temperature != 1.0

    @property
    def plain(self) -> bool:
        """Whether the claim is about student and teacher as they are."""
        return not self.targets and not self.local_only

    @property
    def granularities(self) -> tuple[str, ...]:
        """The granularities that are defined here."""
        return ("token_local",) if self.local_only else GRANULARITIES

    def exact(self, objective: Objective) -> list[Tensor]:
        """The exact gradient of an objective, by level.

        Raises:
            InvalidArgumentError: the gradient is infinite on this pair, or the granularity is not defined here.
        """
        parts = [
            [c * level for level in self.gradient(divergence, objective.granularity, objective.gamma)]
            for c, divergence in objective.terms
        ]
        return _sum(parts)

    def gradient(self, divergence: Divergence, granularity: str, gamma: float = 1.0) -> list[Tensor]:
        """The exact gradient of one divergence, by level.

        Raises:
            InvalidArgumentError: as `exact`.
        """
        if granularity not in self.granularities:
            raise InvalidArgumentError(
                "granularity",
                f"must be token_local with a temperature or with histories='sampler', got {granularity!r}",
            )
        parts = []
        for weight, target in self._followed:
            if self.local_only:
                temperatures = self.student_temperature, self.teacher_temperature
                levels = local_gradient(self.student, target, divergence, self.histories, *temperatures)
            else:
                levels = exact_gradient(self.student, target, divergence, granularity, gamma=gamma)
            parts.append([weight * level for level in levels] if self.targets else levels)
        return _sum(parts)

    def trees(self) -> list[tuple[float, Tree]]:
        """Factors and trees whose gradients add up to the claim's: what `gradient` builds anew for each divergence."""
        if not self.local_only:
            return [(weight, Tree.build(self.student, target)) for weight, target in self._followed]
        temperatures = self.student_temperature, self.teacher_temperature
        return [
            (weight / self.student_temperature, local_tree(self.student, target, self.histories, *temperatures))
            for weight, target in self._followed
        ]

    @property
    def _followed(self) -> tuple[tuple[float, TabularPolicy], ...]:
        """The policies that the claim brings the student to, with their weights."""
        return self.targets or ((1.0, self.teacher),)

    def full_vocabulary_variance(self, divergence: Divergence) -> float:
        r"""Trace of the covariance of one rollout's whole-vocabulary gradient of the token-local claim (T7c).

        Only the prefix is random there, with a probability $\nu(h)$ under the histories of the claim. The gradient of
        a row is then $G_h/\nu(h)$, and the trace is $\sum_h (1/\nu(h) - 1)|G_h|^2$.
        """
        if self.plain:
            return full_vocabulary_variance(self.student, self.teacher, divergence)
        tree, total = local_tree(self.student, self.teacher, self.histories), 0.0
        for n, level in enumerate(self.gradient(divergence, "token_local")):
            reach = tree.reach(n)
            spread = torch.where(reach > 0, (1.0 / reach - 1.0) * level.square().sum(-1), 0.0)
            total += float(spread.clamp_min(0.0).sum())
        return total


def _sum(parts: list[list[Tensor]]) -> list[Tensor]:
    return [sum(levels[1:], levels[0]) for levels in zip(*parts, strict=True)]
