"""What the rollouts of an audit look like, and the pairs of enumerated policies that produce them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdtheory.auditing.case import Case
from opdtheory.auditing.records import Count, Finite, Positive
from opdtheory.choices import ACCUMULATIONS, HISTORIES, LENGTHS, Accumulation, Histories
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, NotFiniteError, check_between, check_integer
from opdtheory.exact import GradientMoments, Loss, TabularPolicy, gradient_moments, random_pair
from opdtheory.exact.companions import PrefixPolicy, softened
from opdtheory.exact.expectation import BATCH_BUDGET

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
class Scenario:
    """What the rollouts look like on which a loss is audited.

    Attributes:
        batch_size: rollouts that the loss sees at once: those of one micro-batch.
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
        student_temperature: the claim is about the student softened by it, `softmax(z / tau)` (T16).
        teacher_temperature: the same for every teacher.
        sampling_temperature: temperature at which rollouts are sampled.
        histories: whose prefixes a token-local claim is about: those of the student, at the sampling temperature, or
            those of the policy that sampled (T15).
        teachers: number of teachers; the claim is the weighted sum of the divergences to each of them (T16).
        teacher_weights: the weight of each; empty: equal weights that sum to one.
        base: whether rollouts hold a third, frozen policy.
        extrapolation: lambda of the extrapolated teacher `q^lambda b^(1 - lambda)`, up to a factor, with `b` the base,
            which takes the teacher's place in the claim (T16); None: the teacher itself.
        microbatches: number of micro-batches in a batch, on each of which the loss is called. They are independent, so
            that the expected gradient is that of one of them, or `microbatches` times that if they are added up (T17).
        accumulate: whether the parts' gradients are averaged (`mean`) or added up (`sum`).
        reward: whether rollouts hold a task's reward, whose policy gradient is set apart.

    Raises:
        InvalidArgumentError: a value is out of range, or two settings exclude each other.
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
    student_temperature: Finite = 1.0
    teacher_temperature: Finite = 1.0
    sampling_temperature: Finite = 1.0
    histories: Histories = "student"
    teachers: Positive = 1
    teacher_weights: tuple[Finite, ...] = ()
    base: bool = False
    extrapolation: float | None = None
    microbatches: Positive = 1
    accumulate: Accumulation = "mean"
    reward: bool = False

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
        for name in ("student_temperature", "teacher_temperature", "sampling_temperature"):
            check_between(name, getattr(self, name), 0.0, math.inf)
        for name, allowed in (("histories", HISTORIES), ("accumulate", ACCUMULATIONS)):
            if getattr(self, name) not in allowed:
                raise InvalidArgumentError(name, f"must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self._check_teachers()
        check_integer("microbatches", self.microbatches)
        if self.reward and self.student_temperature != 1.0:
            raise InvalidArgumentError(
                "reward", "must be left out with a student_temperature: whose policy gradient is it to set apart?"
            )

    def _check_teachers(self) -> None:
        check_integer("teachers", self.teachers)
        weights = self.teacher_weights
        if weights:
            if len(weights) != self.teachers:
                raise InvalidArgumentError(
                    "teacher_weights", f"must hold one weight for each of {self.teachers} teachers, got {len(weights)}"
                )
            for weight in weights:
                check_between("teacher_weights", weight, 0.0, math.inf)
        if self.extrapolation is None:
            return
        if not self.base or self.teachers > 1:
            raise InvalidArgumentError("extrapolation", "must come with base=True and one teacher")
        if not math.isfinite(self.extrapolation):
            raise InvalidArgumentError("extrapolation", f"must be a finite number, got {self.extrapolation!r}")

    @property
    def rests_at_teacher(self) -> bool:
        """Whether a sound loss has no gradient where the student equals the (first) teacher."""
        return self.one_teacher and self.student_temperature == self.teacher_temperature

    @property
    def one_teacher(self) -> bool:
        """Whether the claim is about the ratio to one teacher, the one of the pair."""
        return self.teachers == 1 and self.extrapolation is None

    @property
    def of_any_sampler(self) -> bool:
        """Whether the claim is about histories that do not depend on the policy that samples."""
        return self.histories == "student" and self.sampling_temperature == 1.0

    @property
    def about(self) -> str:
        """What the claim is about if not student and teacher as they are, in words that follow the granularity."""
        softened = self.student_temperature != 1.0 or self.teacher_temperature != 1.0
        several = f"the sum over {self.teachers} teachers" if self.teachers > 1 else ""
        parts = (
            f"student at temperature {self.student_temperature:g} and teacher at {self.teacher_temperature:g}"
            if softened
            else "",
            several,
            f"teacher extrapolated to {self.extrapolation:g} from the base" if self.extrapolation is not None else "",
            "histories of the sampler" if self.histories == "sampler" else "",
            f"histories at temperature {self.sampling_temperature:g}" if self.sampling_temperature != 1.0 else "",
        )
        return "".join(f"; {part}" for part in parts if part)

    def check_sampled(self) -> None:
        """Raise if a setting needs batches that can be enumerated.

        Raises:
            InvalidArgumentError: the message names the setting.
        """
        if self.exact_only is not None:
            name = self.exact_only.partition("=")[0]
            raise InvalidArgumentError(
                name, f"must be left out of a sampled audit, got {self.exact_only}; take method='exact'"
            )

    @property
    def exact_only(self) -> str | None:
        """A setting that only the enumeration of batches serves, or None."""
        changed = {
            name: value for name, value in vars(self).items() if name in _EXACT_ONLY and value != _DEFAULTS[name]
        }
        return next((f"{name}={value!r}" for name, value in changed.items()), None)

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
        """The fields by name, as arguments of `audit`: the batch size is that of all micro-batches together."""
        return {**vars(self), "batch_size": self.microbatches * self.batch_size}

    @classmethod
    def of(cls, batch_size: int, microbatches: int = 1, **fields: Any) -> Scenario:
        """The scenario of a batch that is cut into equal micro-batches.

        Raises:
            InvalidArgumentError: as the class, or the batch cannot be cut into so many equal parts.
        """
        check_integer("batch_size", batch_size)
        check_integer("microbatches", microbatches)
        if batch_size % microbatches:
            raise InvalidArgumentError(
                "microbatches", f"must divide batch_size={batch_size} into equal parts, got {microbatches}"
            )
        return cls(batch_size // microbatches, microbatches=microbatches, **fields)

    def behavior(self, student: TabularPolicy, seed: int) -> TabularPolicy | None:
        """The policy that samples instead of the student, or None on-policy."""
        if not self.off_policy and self.sampling_temperature == 1.0:
            return None
        return softened(student.perturbed(self.off_policy, seed=seed), self.sampling_temperature)

    def companions(self) -> tuple[tuple[PrefixPolicy, ...], PrefixPolicy | None]:
        """The teachers after the first one, and the base policy or None: the same for every pair of the panel."""
        first = 10 * self.seed
        others = tuple(PrefixPolicy(first + 10_000_019 * k) for k in range(1, self.teachers))
        return others, PrefixPolicy(first + 5) if self.base else None

    def case(self, student: TabularPolicy, teacher: TabularPolicy, behavior: TabularPolicy | None, label: str) -> Case:
        """A pair with the teachers, temperatures and histories that the claim is about."""
        histories = softened(student, self.sampling_temperature) if self.sampling_temperature != 1.0 else None
        if self.histories == "sampler":
            histories = behavior
        others, base = self.companions()
        targets: tuple[tuple[float, TabularPolicy], ...] = ()
        if self.teachers > 1:
            weights = self.teacher_weights or (1.0 / self.teachers,) * self.teachers
            targets = tuple(zip(weights, (teacher, *(other.table(teacher) for other in others)), strict=True))
        elif self.teacher_weights:
            targets = ((self.teacher_weights[0], teacher),)
        elif base is not None and self.extrapolation is not None:
            targets = ((1.0, _extrapolated(teacher, base.table(teacher), self.extrapolation)),)
        return Case(
            student, teacher, behavior, label, targets, histories, self.student_temperature, self.teacher_temperature
        )

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
        return self.case(student, teacher, behavior, f"sharpness {scale:g}, distance {distance:g}")

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


# What a sampled audit refuses, and the values without effect.
_EXACT_ONLY = (
    *("student_temperature", "teacher_temperature", "sampling_temperature", "histories", "teachers"),
    *("teacher_weights", "base", "reward"),
)
_DEFAULTS = vars(Scenario())


def _extrapolated(teacher: TabularPolicy, base: TabularPolicy, extrapolation: float) -> TabularPolicy:
    r"""The policy $m \propto q^\lambda b^{1-\lambda}$ (T16), with the environment's distribution as it is."""
    levels = [
        z if n in teacher.environment else extrapolation * z + (1.0 - extrapolation) * b
        for n, (z, b) in enumerate(zip(teacher.logits, base.logits, strict=True))
    ]
    return TabularPolicy(levels, eos=teacher.eos, environment=teacher.environment)


def count_batches(sequences: int, batch_size: int) -> int:
    """The number of batches drawn from `sequences` sequences, up to the order of the rollouts."""
    return math.comb(sequences + batch_size - 1, batch_size)


def _with_prompts(policy: TabularPolicy, prompts: int) -> TabularPolicy:
    """The policy with only the first `prompts` tokens possible at position 0."""
    first = policy.logits[0].clone()
    first[:, prompts:] = -torch.inf
    return TabularPolicy([first, *policy.logits[1:]], eos=policy.eos, environment=policy.environment)
