"""What the rollouts of an audit look like, and the pairs of enumerated policies that produce them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdtheory.auditing.records import Count, Finite, Positive
from opdtheory.choices import LENGTHS
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, NotFiniteError, check_integer
from opdtheory.exact import GradientMoments, Loss, TabularPolicy, exact_gradient, gradient_moments, random_pair
from opdtheory.exact.expectation import BATCH_BUDGET
from opdtheory.objective import Objective

__all__ = ["Case", "Scenario", "count_batches"]

# (sharpness of the student, distance of the teacher): from nearly equal to far apart.
_PAIRS = ((1.0, 0.03), (1.0, 0.5), (0.3, 1.0), (1.0, 1.5), (2.5, 1.0), (0.5, 2.5))

# Vocabulary and horizon of a pair: for single rollouts, and, largest first, for batches that are enumerated.
_SINGLE = (4, 3)
_BATCHED = ((3, 2), (2, 2))

# Evaluations of a coupled loss that one pair should take, and may take at most.
_PAIR_EVALUATIONS = 1_000
_MOST_EVALUATIONS = 5_000

# The largest vocabulary of a panel, and the most sequences for which it has more than one step.
_LARGEST_VOCABULARY = 512
_MOST_SEQUENCES = 700

# The last position of the response that an environment may write.
_LAST_WRITTEN = 2


@dataclass(frozen=True)
class Case:
    """One pair of the panel.

    Attributes:
        student: the policy that is trained.
        teacher: the policy that scores.
        behavior: the policy that samples, or None for the student.
        label: what distinguishes the pair, for tables.
    """

    student: TabularPolicy
    teacher: TabularPolicy
    behavior: TabularPolicy | None
    label: str

    def exact(self, objective: Objective) -> list[Tensor]:
        """The exact gradient of an objective, by level.

        Raises:
            InvalidArgumentError: the gradient is infinite on this pair.
        """
        parts = [
            [
                c * level
                for level in exact_gradient(
                    self.student, self.teacher, divergence, objective.granularity, gamma=objective.gamma
                )
            ]
            for c, divergence in objective.terms
        ]
        return [sum(levels[1:], levels[0]) for levels in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Scenario:
    """What the rollouts look like on which a loss is audited.

    Attributes:
        batch_size: rollouts that the loss sees at once.
        eos: the token that ends a rollout early; None for a fixed length.
        off_policy: standard deviation of the noise on the logits of the sampling policy; 0: the student samples.
        seed: seed of the panel.
        prompts: number of prompts. From 2 on, a prompt of one token, drawn from its own distribution, precedes the
            response: position 0, written by the environment.
        environment: positions of the response, counted from 0 after the prompt, whose tokens an environment writes.
            The response is lengthened if the student would not write its last token.
        shared_prompt: whether the rollouts of a batch answer one prompt, as a group of GRPO does.
        lengths: which lengths are asked about: `both`, `fixed` or `variable`. With `variable`, rollouts may end early
            everywhere, by token 0 unless `eos` says another.
        vocabulary: number of the panel's tokens; None for 4, or as many as batches allow.

    Raises:
        InvalidArgumentError: a value is out of range.
    """

    batch_size: Positive = 1
    eos: int | None = None
    off_policy: Finite = 0.0
    seed: int = 0
    prompts: Positive = 1
    environment: tuple[Count, ...] = ()
    shared_prompt: bool = False
    lengths: str = "both"
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 1), ("seed", 0), ("prompts", 1)):
            check_integer(name, getattr(self, name), lowest)
        if self.vocabulary is not None:
            check_integer("vocabulary", self.vocabulary, 2, _LARGEST_VOCABULARY)
        if self.lengths not in LENGTHS:
            raise InvalidArgumentError("lengths", f"must be one of {', '.join(LENGTHS)}, got {self.lengths!r}")
        if self.lengths == "fixed" and self.eos is not None:
            raise InvalidArgumentError("lengths", f"must not be fixed where eos={self.eos} ends rollouts early")
        if self.lengths == "variable" and self.eos is None:
            object.__setattr__(self, "eos", 0)
        if not 0.0 <= self.off_policy < float("inf"):
            raise InvalidArgumentError("off_policy", f"must be a finite number of at least 0, got {self.off_policy!r}")
        for n in self.environment:
            check_integer("environment", n, 0, _LAST_WRITTEN)

    @property
    def single(self) -> Scenario:
        """The same scenario, one rollout at a time."""
        return replace(self, batch_size=1)

    @property
    def ending(self) -> Scenario:
        """The same scenario with rollouts that may end early, by token 0 unless another one ends them already."""
        return self if self.eos is not None else replace(self, eos=0, lengths="both")

    @property
    def coupled(self) -> bool:
        """Whether the loss sees several rollouts at once."""
        return self.batch_size > 1

    @property
    def masks(self) -> bool:
        """Whether some positions are masked: after an early end, or written by an environment."""
        return self.eos is not None or self.prompts > 1 or bool(self.environment)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(vars(self))

    def behavior(self, student: TabularPolicy, seed: int) -> TabularPolicy | None:
        """The policy that samples instead of the student, or None on-policy."""
        return student.perturbed(self.off_policy, seed=seed) if self.off_policy else None

    def pairs(self) -> list[Case]:
        """The panel: six pairs, from nearly equal to far apart, small enough for the batch size.

        Raises:
            InvalidArgumentError: there are more prompts than tokens.
            BudgetExceededError: batches of this size cannot be enumerated even on the smallest pair.
        """
        return self.sized(*self._size())

    def sized(self, vocab_size: int, horizon: int, chosen: Sequence[int] = range(len(_PAIRS))) -> list[Case]:
        """Chosen pairs of the panel with another vocabulary and number of steps of the response.

        Raises:
            InvalidArgumentError: there are more prompts than tokens, or `eos` is no token.
        """
        levels = tuple(self.environment)
        if self.prompts > 1:
            levels = (0, *(1 + n for n in levels))
        return [self._pair(i, vocab_size, horizon, levels) for i in chosen]

    def _pair(self, i: int, vocab_size: int, horizon: int, levels: tuple[int, ...]) -> Case:
        scale, distance = _PAIRS[i]
        student, teacher = random_pair(
            vocab_size,
            horizon + (self.prompts > 1),
            eos=self.eos,
            scale=scale,
            distance=distance,
            seed=1000 * self.seed + i,
            environment=levels,
        )
        if self.prompts > 1:
            student, teacher = _with_prompts(student, self.prompts), _with_prompts(teacher, self.prompts)
        behavior = self.behavior(student, 1000 * self.seed + 500 + i)
        return Case(student, teacher, behavior, f"sharpness {scale:g}, distance {distance:g}")

    def _size(self) -> tuple[int, int]:
        """The largest vocabulary and horizon whose batches can be enumerated."""
        longest = 2 + max(self.environment, default=-1)
        usual = _BATCHED if self.coupled else (_SINGLE,)
        if self.vocabulary is not None:
            steps = max((n for n in (2, 3) if self.vocabulary**n <= _MOST_SEQUENCES), default=1)
            usual = ((self.vocabulary, min(steps, usual[0][1])), (self.vocabulary, 1))
        sizes = [(v, max(horizon, longest)) for v, horizon in usual]
        counts = {size: self._batches(*size) for size in sizes}
        size = next((size for size in sizes if counts[size] <= _PAIR_EVALUATIONS), sizes[-1])
        if counts[size] > _MOST_EVALUATIONS:
            raise BudgetExceededError(
                f"auditing batches of {self.batch_size} rollouts",
                counts[size],
                _MOST_EVALUATIONS,
                "audit a smaller batch_size",
            )
        if self.prompts > size[0]:
            raise InvalidArgumentError("prompts", f"must be at most the panel's {size[0]} tokens, got {self.prompts}")
        return size

    def _batches(self, vocab_size: int, horizon: int) -> int:
        """The number of batches of full-length sequences, up to the order of the rollouts."""
        sequences = vocab_size**horizon
        if self.shared_prompt:
            return self.prompts * count_batches(sequences, self.batch_size)
        return count_batches(self.prompts * sequences, self.batch_size)

    def moments(self, loss: Loss, case: Case, budget: int = BATCH_BUDGET, thorough: bool = False) -> GradientMoments:
        """The exact moments of the loss's gradient on a pair; `thorough` as in `gradient_moments`.

        Raises:
            BudgetExceededError: there are more batches than the budget allows.
            LossError: as `gradient_moments`.
        """
        try:
            return gradient_moments(
                loss, case.student, case.teacher, self.batch_size, case.behavior, budget, self.shared_prompt, thorough
            )
        except NotFiniteError as error:
            where = f", on the pair {case.label!r}" if case.label else ""
            raise NotFiniteError(f"{error}{where}", error.shape) from None


def count_batches(sequences: int, batch_size: int) -> int:
    """The number of batches drawn from `sequences` sequences, up to the order of the rollouts."""
    return math.comb(sequences + batch_size - 1, batch_size)


def _with_prompts(policy: TabularPolicy, prompts: int) -> TabularPolicy:
    """The policy with only the first `prompts` tokens possible at position 0."""
    first = policy.logits[0].clone()
    first[:, prompts:] = -torch.inf
    return TabularPolicy([first, *policy.logits[1:]], eos=policy.eos, environment=policy.environment)
