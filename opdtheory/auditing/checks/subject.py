"""What the checks of an audit work on: a loss, its panel, and batches for a closer look."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.exact import Enumeration, GradientMoments, Loss, random_pair
from opdtheory.objective import Objective

__all__ = ["Check", "Finding", "Subject", "norm", "ratio"]

# The batch size of checks that need several rollouts, if the audit's batches hold one.
_SEVERAL = 6

# Machine epsilon of the dtype that a tolerance belongs to: float64, float32, or a narrower one.
_ROUNDING = ((1e-8, 2.3e-16), (1e-3, 1.2e-7), (float("inf"), 7.9e-3))


@dataclass(frozen=True)
class Check:
    """One property that a loss has or lacks.

    Attributes:
        name: one of `CHECKS`.
        passed: whether the loss has it; None if that is information and not a verdict, or could not be determined.
        value: what was measured, if it is a number.
        limit: the largest value that passes.
        detail: one sentence.
    """

    name: str
    passed: bool | None
    value: float | None
    limit: float | None
    detail: str


# A check without its name: whether it passed, the value, the limit and the detail.
Finding: TypeAlias = tuple[bool | None, float | None, float | None, str]


@dataclass(frozen=True)
class Subject:
    """A loss under audit with its settings; see `soundness` for the fields."""

    loss: Loss
    cases: list[Case]
    moments: list[GradientMoments]
    objective: Objective | None
    scenario: Scenario
    tolerance: float

    @property
    def middle(self) -> int:
        """The index of the pair for a closer look."""
        return len(self.cases) // 2

    @property
    def case(self) -> Case:
        """The pair for a closer look."""
        return self.cases[self.middle]

    @cached_property
    def live(self) -> Enumeration:
        """All sequences of that pair."""
        return Enumeration.build(self.case.student, self.case.teacher, self.case.behavior)

    @cached_property
    def padded(self) -> Enumeration:
        """All sequences of a similar pair whose rollouts may end early, by token 0."""
        like = self.case.student
        student, teacher = random_pair(
            like.vocab_size,
            max(like.horizon, 2),
            eos=0,
            seed=1000 * self.scenario.seed + 900,
            environment=like.environment,
        )
        behavior = self.scenario.behavior(student, 1000 * self.scenario.seed + 901)
        return Enumeration.build(student, teacher, behavior)

    @cached_property
    def base(self) -> tuple[Tensor, Tensor]:
        """Value and gradient on all sequences of the pair."""
        return self.evaluate(self.live, self.everyone(self.live))

    @cached_property
    def padded_base(self) -> tuple[Tensor, Tensor]:
        """Value and gradient on all sequences that may end early."""
        return self.evaluate(self.padded, self.everyone(self.padded))

    def everyone(self, everything: Enumeration) -> Tensor:
        """Indices of all sequences that can share a batch, the first ones repeated to fill whole batches."""
        pool = self._pool(everything)
        count = -(-len(pool) // self.scenario.batch_size) * self.scenario.batch_size
        return pool[torch.arange(count) % len(pool)]

    def some(self) -> Tensor:
        """Indices of one batch of different sequences."""
        pool = self._pool(self.live)
        count = self.scenario.batch_size if self.scenario.batch_size > 1 else _SEVERAL
        return pool[torch.linspace(0, len(pool) - 1, count).round().long()]

    def _pool(self, everything: Enumeration) -> Tensor:
        if self.scenario.shared_prompt:
            return (everything.prompts == everything.prompts[0]).nonzero().squeeze(-1)
        return torch.arange(len(everything))

    def rows(self, everything: Enumeration, index: Tensor) -> Float[Tensor, "B T V"]:
        """The student's logits that a batch reads, detached."""
        return everything.gather_logits([t.detach() for t in everything.student_tables], index)

    def evaluate(self, everything: Enumeration, index: Tensor, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its gradient in the student's logits, finite or not."""
        rows = self.rows(everything, index) if logits is None else logits
        leaf = rows.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = self.loss(everything.rollouts(index, leaf))
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return value.detach(), torch.zeros_like(leaf) if gradient is None else gradient

    def moved(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
        """The change of value and gradient, relative to the larger of them; inf if anything is not finite."""
        change = float((after[0].double() - before[0].double()).abs())
        size = max(float(before[1].abs().max()), float(before[0].abs()), self._floor(before[1]))
        if not math.isfinite(change):
            return math.inf
        return max(change / size, self.gradient_moved(before[1], after[1]))

    def gradient_moved(self, before: Tensor, after: Tensor) -> float:
        """The largest change of an entry, relative to the largest entry; inf if anything is not finite."""
        change = float((after - before).abs().max()) / max(float(before.abs().max()), self._floor(before))
        return change if math.isfinite(change) else math.inf

    def held(self, value: float, holds: str, fails: str, failed: bool | None = False) -> Finding:
        """The finding that a value is within the tolerance, or that it is not."""
        within = value <= self.tolerance
        return (True if within else failed), value, self.tolerance, holds if within else fails

    def _floor(self, gradient: Tensor) -> float:
        """The size of an entry of a batch's gradient whose rounding would count as a change."""
        rounding = next(eps for limit, eps in _ROUNDING if self.tolerance <= limit) / self.tolerance
        return rounding * max(m.terms for m in self.moments) / len(gradient)

    @cached_property
    def against_claim(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """The expected gradients of the loss and those of the claimed objective, flat, pair by pair."""
        if self.objective is None:
            return None
        return [flat(m.mean) for m in self.moments], [flat(case.exact(self.objective)) for case in self.cases]


def norm(moments: GradientMoments) -> float:
    """The length of the expected gradient."""
    return float(flat(moments.mean).norm())


def ratio(part: Tensor, whole: Tensor) -> float:
    """A quotient where 0/0 is 0."""
    return float(part) / max(float(whole), 1e-300)
