"""What the rollouts of an audit look like, and the enumerated pairs of policies that give them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import TabularPolicy, random_pair

__all__ = ["Case", "panel"]


@dataclass(frozen=True)
class _Settings:
    """How the panel is drawn: arguments of `audit`, and whether pairs may be as large as for single rollouts."""

    batch_size: int
    eos: int | None
    off_policy: float
    gamma: float
    seed: int
    prompts: int = 1
    environment: tuple[int, ...] = ()
    shared_prompt: bool = False
    separable: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `audit`."""
        return {key: value for key, value in vars(self).items() if key != "separable"}

    def panel(self, batch_size: int, eos: int | None) -> list[Case]:
        """Pairs of policies for batches of this size that end with this token."""
        size = 1 if self.separable else batch_size
        return panel(size, eos, self.off_policy, self.seed, self.prompts, self.environment, self.shared_prompt)


# (sharpness of the student, distance of the teacher): from nearly equal to far apart.
_PAIRS = ((1.0, 0.03), (1.0, 0.5), (0.3, 1.0), (1.0, 1.5), (2.5, 1.0), (0.5, 2.5))

# Vocabulary and horizon of a pair: for single rollouts, and, largest first, for batches that are enumerated.
_SINGLE = (4, 3)

_BATCHED = ((3, 2), (2, 2))

# Evaluations of a coupled loss that one pair, or one bandit, should cost; and the most that one may.
_PAIR_EVALUATIONS = 1_000

_MOST_EVALUATIONS = 5_000

# Position of the response up to which an environment may write.
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


def panel(
    batch_size: int = 1,
    eos: int | None = None,
    off_policy: float = 0.0,
    seed: int = 0,
    prompts: int = 1,
    environment: Iterable[int] = (),
    shared_prompt: bool = False,
) -> list[Case]:
    """Six pairs of one size, from nearly equal to far apart, small enough for the batch size.

    Args:
        batch_size: rollouts that the loss sees at once.
        eos: the token that ends a rollout, or None.
        off_policy: standard deviation of the noise on the sampling policy's logits.
        seed: of everything.
        prompts: number of prompts; from 2 on a prompt of one token, drawn by a distribution of its own, comes before the
            response: position 0, written by the environment.
        environment: positions of the response, counted from 0 after the prompt, whose tokens an environment
            writes. The response is as long as without, or longer where the student would not have the last word.
        shared_prompt: whether the batches to be counted share a prompt, as in `gradient_moments`.

    Raises:
        InvalidArgumentError: `prompts` or `environment` is out of range.
        BudgetExceededError: batches of this size cannot be enumerated even on the smallest pair.
    """
    written = tuple(environment)
    _check_written(prompts, written)
    sizes = [
        (vocab_size, max(horizon, 2 + max(written, default=-1)))
        for vocab_size, horizon in (_BATCHED if batch_size > 1 else (_SINGLE,))
    ]
    counts = {size: _evaluations(size, batch_size, prompts, shared_prompt) for size in sizes}
    vocab_size, horizon = next((size for size in sizes if counts[size] <= _PAIR_EVALUATIONS), sizes[-1])
    if counts[vocab_size, horizon] > _MOST_EVALUATIONS:
        raise BudgetExceededError(
            f"auditing batches of {batch_size} rollouts",
            counts[vocab_size, horizon],
            _MOST_EVALUATIONS,
            "audit a smaller batch_size",
        )
    if prompts > vocab_size:
        raise InvalidArgumentError("prompts", f"is {prompts}; the panel's policies have {vocab_size} tokens")
    cases = []
    for i, (scale, distance) in enumerate(_PAIRS):
        levels = (0, *(1 + n for n in written)) if prompts > 1 else written
        student, teacher = random_pair(
            vocab_size,
            horizon + (prompts > 1),
            eos=eos,
            scale=scale,
            distance=distance,
            seed=1000 * seed + i,
            environment=levels,
        )
        if prompts > 1:
            student, teacher = _with_prompts(student, prompts), _with_prompts(teacher, prompts)
        behavior = student.perturbed(off_policy, seed=1000 * seed + 500 + i) if off_policy else None
        cases.append(Case(student, teacher, behavior, f"sharpness {scale:g}, distance {distance:g}"))
    return cases


def _check_written(prompts: int, environment: tuple[int, ...]) -> None:
    if isinstance(prompts, bool) or not isinstance(prompts, int) or prompts < 1:
        raise InvalidArgumentError("prompts", f"is {prompts!r}; a positive integer is needed")
    for n in environment:
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _LAST_WRITTEN:
            raise InvalidArgumentError("environment", f"holds {n!r}; every position must lie in [0, {_LAST_WRITTEN}]")


def _evaluations(size: tuple[int, int], batch_size: int, prompts: int, shared_prompt: bool) -> int:
    """Batches up to symmetry, of sequences of full length."""
    sequences = size[0] ** size[1]
    if shared_prompt:
        return prompts * _batches(sequences, batch_size)
    return _batches(prompts * sequences, batch_size)


def _with_prompts(policy: TabularPolicy, prompts: int) -> TabularPolicy:
    """The policy with all but the first tokens excluded from position 0."""
    first = policy.logits[0].clone()
    first[:, prompts:] = -torch.inf
    return TabularPolicy([first, *policy.logits[1:]], eos=policy.eos, environment=policy.environment)


def _batches(sequences: int, batch_size: int) -> int:
    return math.comb(sequences + batch_size - 1, batch_size)
