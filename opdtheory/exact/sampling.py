r"""I.i.d. rollouts of policies with too many sequences to enumerate, with the table row that each position reads.

The rollouts have the form of an enumeration: padded positions read rows that no live position reads, so that a loss
which leaks over padding puts a gradient where the exact one is zero.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import BudgetExceededError, InvalidArgumentError, check_integer
from opdtheory.exact.enumeration import shown_tables
from opdtheory.exact.finite_state import MarkovPolicy
from opdtheory.exact.policies import Policy
from opdtheory.exact.tree import LEAF_BUDGET, check_pair
from opdtheory.rollouts import Rollouts, gather_logprobs

__all__ = ["Sample", "Sampler", "sample_rollouts"]


@dataclass(frozen=True)
class Sample:
    """Drawn rollouts, and the rows of the student's stacked table that their logits come from.

    Attributes:
        rollouts: the rollouts; `student_logits` is a leaf that requires grad.
        rows: `(B, T)`, the row of the stacked table that each position reads, padded positions included.
    """

    rollouts: Rollouts
    rows: Int64[Tensor, "B T"]

    def select(self, index: Int64[Tensor, " b"]) -> Sample:
        """Some of the rollouts, as a batch with its own leaf."""
        r = self.rollouts
        rollouts = _rollouts(
            r.tokens[index],
            r.mask[index],
            r.student_logits.detach()[index],
            r.teacher_logits[index],
            r.teacher_logprobs[index],
            r.behavior_logprobs[index],
        )
        return Sample(rollouts, self.rows[index])


@dataclass(frozen=True)
class Sampler:
    r"""Draws from the behaviour distribution of a triple of policies, level by level for all rollouts at once.

    Tables are stacked into one, `(R, V)`. If all policies are `MarkovPolicy`, row 0 is the first token's and row
    `1 + a` follows the token `a`, so that any horizon fits. Otherwise the levels of `Policy.tables` follow each other.

    Attributes:
        student: the stacked logits of the policy that is trained, `(R, V)`, detached, as rollouts show them.
        teacher: those of the policy that scores.
        behavior: those of the policy that samples; on-policy the same object as `student`.
        horizon: the length cap `T`.
        eos: the token that ends a rollout, or None.
        environment: the positions whose tokens an environment writes; they are masked and end nothing (T6f).
        chain: whether the rows are those of a Markov chain.
        sizes: the number of rows of each tensor of the student's parameters (chain) or tables (otherwise).
        cumulative: the cumulative probabilities of the behaviour policy by row.
    """

    student: Float[Tensor, "R V"]
    teacher: Float[Tensor, "R V"]
    behavior: Float[Tensor, "R V"]
    horizon: int
    eos: int | None
    environment: tuple[int, ...]
    chain: bool
    sizes: tuple[int, ...]
    cumulative: Float[Tensor, "R V"]

    @classmethod
    def build(
        cls, student: Policy, teacher: Policy, behavior: Policy | None = None, budget: int = LEAF_BUDGET
    ) -> Sampler:
        """Stack the tables of `student`, `teacher` and `behavior` (default: the student).

        Raises:
            InvalidArgumentError: the policies do not match.
            BudgetExceededError: the table would hold more than `budget` logits.
        """
        check_pair(student, teacher)
        behavior = student if behavior is None else behavior
        check_pair(student, behavior, "behavior")
        chain = all(isinstance(policy, MarkovPolicy) for policy in (student, teacher, behavior))
        if not chain and student.vocab_size**student.horizon > budget:
            raise BudgetExceededError(
                f"tabulating V={student.vocab_size}, T={student.horizon} row by row",
                student.vocab_size**student.horizon,
                budget,
                "lower the horizon or the vocabulary, or take MarkovPolicy for all policies",
            )
        levels = _shown(student, "student", chain)
        stacked = torch.cat(levels)
        cumulative = torch.softmax(torch.cat(_levels(behavior, chain)), -1).cumsum(-1)
        return cls(
            student=stacked,
            teacher=torch.cat(_shown(teacher, "teacher", chain)),
            behavior=stacked if behavior is student else torch.cat(_shown(behavior, "behavior", chain)),
            horizon=student.horizon,
            eos=student.eos,
            environment=tuple(student.environment),
            chain=chain,
            sizes=tuple(len(level) for level in levels),
            # Exactly 1 from the last possible token on, so that a uniform number below 1 never lands beyond it.
            cumulative=cumulative / cumulative[:, -1:],
        )

    def draw(self, count: int, generator: torch.Generator, group: int = 1) -> Sample:
        """Draw `count` rollouts, independent given their prompts.

        Args:
            count: the number of rollouts.
            generator: the source of random numbers.
            group: how many consecutive rollouts share a prompt: what an environment writes before the student's first
                token.

        Raises:
            InvalidArgumentError: `count` is below one or not a multiple of `group`.
        """
        check_integer("count", count)
        check_integer("group", group)
        if count % group:
            raise InvalidArgumentError("group", f"must divide count={count}, got {group}")
        vocab_size = self.student.shape[-1]
        row, live = torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
        uniform = torch.rand(self.horizon, count, 1, generator=generator, dtype=torch.float64)
        prompt = next((n for n in range(self.horizon) if n not in self.environment), self.horizon)
        uniform[:prompt] = uniform[:prompt, ::group].repeat_interleave(group, 1)
        tokens, rows, mask = [], [], []
        first = 0
        for n in range(self.horizon):
            stacked_row = first + row
            token = torch.searchsorted(self.cumulative[stacked_row], uniform[n], right=True).squeeze(-1)
            if self.eos is not None:
                token = torch.where(live, token, self.eos)
            tokens.append(token)
            rows.append(stacked_row)
            written = n not in self.environment
            mask.append(live if written else torch.zeros_like(live))
            if self.eos is not None and written:
                live = live & (token != self.eos)
            if self.chain:
                first, row = 1, token
            else:
                first, row = first + self.sizes[n], row * vocab_size + token
        return self._sample(torch.stack(tokens, 1), torch.stack(rows, 1), torch.stack(mask, 1).to(self.student.dtype))

    def scatter(self, rows: Int64[Tensor, "B T"], sensitivity: Float[Tensor, "B T V"]) -> Float[Tensor, "R V"]:
        """The gradient in the stacked table: the sum of the gradients in the drawn logits, by row."""
        table = torch.zeros_like(self.student)
        return table.index_add_(0, rows.flatten(), sensitivity.flatten(0, 1).to(table.dtype))

    def stack(self, gradient: list[Tensor]) -> Float[Tensor, "R V"]:
        """A gradient as `exact_gradient` returns it for tabular or Markov policies, as one table."""
        return torch.cat([level.reshape(size, -1) for size, level in zip(self.sizes, gradient, strict=True)])

    def unstack(self, table: Float[Tensor, "R V"]) -> list[Tensor]:
        """The inverse of `stack`: a list like the parameters of a `TabularPolicy` or `MarkovPolicy`."""
        levels = list(table.split(self.sizes))
        return [levels[0][0], levels[1]] if self.chain else levels

    def _sample(self, tokens: Tensor, rows: Tensor, mask: Tensor) -> Sample:
        behavior_logprobs = None if self.behavior is self.student else self._logprobs("behavior", rows, tokens, mask)
        return Sample(
            _rollouts(
                tokens,
                mask,
                self.student[rows],
                self.teacher[rows],
                self._logprobs("teacher", rows, tokens, mask),
                behavior_logprobs,
            ),
            rows,
        )

    def _logprobs(self, whose: str, rows: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """`gather_logprobs` of the rows, with each row of the table normalised once for all rollouts."""
        logprobs = self._normalised[whose][rows, tokens]
        return torch.where((mask == 0) & torch.isneginf(logprobs), 0.0, logprobs)

    @functools.cached_property
    def _normalised(self) -> dict[str, Tensor]:
        return {whose: torch.log_softmax(getattr(self, whose), -1) for whose in ("teacher", "behavior")}


def sample_rollouts(
    student: Policy,
    teacher: Policy,
    count: int,
    behavior: Policy | None = None,
    generator: torch.Generator | None = None,
) -> Sample:
    r"""Draw i.i.d. rollouts $y \sim \mu$, for policies with too many sequences to enumerate; see `Sampler`.

    Args:
        student: the policy `p`, whose gathered logits become the leaf.
        teacher: the policy `q`.
        count: the number of rollouts `B`.
        behavior: the policy that samples (default: the student).
        generator: the source of random numbers (default: one with seed 0).

    Raises:
        InvalidArgumentError: the policies do not match, or `count` is below one.
        BudgetExceededError: the tables are too large.

    Example:
        >>> from opdtheory.exact import MarkovPolicy
        >>> student, teacher = (MarkovPolicy.random(32, 16, seed=s) for s in (0, 1))
        >>> sample_rollouts(student, teacher, 8).rollouts.student_logits.shape
        torch.Size([8, 16, 32])
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    return Sampler.build(student, teacher, behavior).draw(count, generator)


def _levels(policy: Policy, chain: bool) -> list[Tensor]:
    if chain and isinstance(policy, MarkovPolicy):
        return [policy.initial.detach().unsqueeze(0), policy.transition.detach()]
    return [table.detach() for table in policy.tables()]


def _shown(policy: Policy, role: str, chain: bool) -> list[Tensor]:
    return _levels(policy, chain) if chain else [table.detach() for table in shown_tables(policy, role)]


def _rollouts(
    tokens: Tensor,
    mask: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    teacher_logprobs: Tensor,
    behavior_logprobs: Tensor | None,
) -> Rollouts:
    """Rollouts from checked policies with `logits` as their leaf; on-policy without `behavior_logprobs`."""
    leaf = logits.requires_grad_()
    with torch.enable_grad():
        student_logprobs = gather_logprobs(leaf, tokens, mask)
    return Rollouts.unchecked(
        tokens=tokens,
        mask=mask,
        student_logits=leaf,
        teacher_logits=teacher_logits,
        student_logprobs=student_logprobs,
        teacher_logprobs=teacher_logprobs,
        behavior_logprobs=student_logprobs.detach() if behavior_logprobs is None else behavior_logprobs,
    )
