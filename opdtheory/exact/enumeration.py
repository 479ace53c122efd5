"""Every sequence of a pair of policies, and the objectives computed from the sequences by definition.

This is the second route of the oracle: nothing is summed by level, and gradients come from autograd.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact.policies import Policy
from opdtheory.exact.tree import check_pair
from opdtheory.objective import check_objective
from opdtheory.rollouts import Rollouts, gather_logprobs

__all__ = ["SEQUENCE_BUDGET", "Enumeration", "enumerated_value", "shown_tables"]

SEQUENCE_BUDGET = 2**18

# Seeds of the logits that a policy shows for tokens it did not write; None: the environment's distribution.
_OPINIONS = {"student": 11, "teacher": 12, "behavior": None}


@dataclass(frozen=True)
class Enumeration:
    """All sequences that the sampling policy can produce, with their probabilities.

    Attributes:
        tokens: `(N, T)`; a sequence that has ended is padded with its end-of-sequence token.
        mask: `(N, T)` float64, 1 up to and including the end-of-sequence token, except on tokens that an
            environment wrote.
        rows: `(N, T)`, the table row that each position reads: its prefix in base `V`. Padded positions read rows
            of prefixes that have ended, which no live position reads.
        probability: the probability of each sequence under the sampling policy, `(N,)`.
        student_tables: the student's logits by level, as `shown_tables` gives them.
        teacher_tables: the teacher's.
        behavior_tables: the sampling policy's.
        world_logprobs: the log-probability of tokens that an environment wrote, 0 elsewhere, `(N, T)`.
        environment: the positions that the environment writes.
    """

    tokens: Int64[Tensor, "N T"]
    mask: Float[Tensor, "N T"]
    rows: Int64[Tensor, "N T"]
    probability: Float[Tensor, " N"]
    student_tables: list[Tensor]
    teacher_tables: list[Tensor]
    behavior_tables: list[Tensor]
    world_logprobs: Float[Tensor, "N T"]
    environment: tuple[int, ...] = ()

    @classmethod
    def build(
        cls, student: Policy, teacher: Policy, behavior: Policy | None = None, budget: int = SEQUENCE_BUDGET
    ) -> Enumeration:
        """Enumerate the sequences of positive probability under `behavior` (default: the student).

        Raises:
            InvalidArgumentError: the policies do not match.
            BudgetExceededError: more than `budget` sequences.
        """
        check_pair(student, teacher)
        behavior = student if behavior is None else behavior
        check_pair(student, behavior, "behavior")
        environment = student.environment
        count = _count(student.vocab_size, student.horizon, student.eos, environment)
        if count > budget:
            raise BudgetExceededError(
                f"enumerating V={student.vocab_size}, T={student.horizon}",
                count,
                budget,
                "lower the vocabulary or the horizon, or raise budget",
            )
        tokens, alive = _sequences(student.vocab_size, student.horizon, student.eos, environment)
        rows = _prefix_rows(tokens, student.vocab_size)
        log_mu = torch.where(alive > 0, _gather([t.detach() for t in behavior.tables()], rows, tokens), 0.0)
        probability = log_mu.sum(-1).exp()
        possible = probability > 0
        world = torch.zeros(student.horizon, dtype=torch.float64)
        world[list(environment)] = 1.0
        student_tables = shown_tables(student, "student")
        return cls(
            tokens[possible],
            (alive * (1.0 - world))[possible],
            rows[possible],
            probability[possible],
            student_tables,
            shown_tables(teacher, "teacher"),
            student_tables if behavior is student else shown_tables(behavior, "behavior"),
            torch.where(world > 0, log_mu, 0.0)[possible],
            environment,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompts(self) -> Int64[Tensor, " N"]:
        """A number for the prompt of each sequence: what an environment wrote before the student's first token."""
        first = next((n for n in range(self.rows.shape[1]) if n not in self.environment), -1)
        return self.rows[:, first]

    @functools.cached_property
    def teacher_logits(self) -> Float[Tensor, "N T V"]:
        """The teacher's logits at every position of every sequence, detached."""
        return self.gather_logits([t.detach() for t in self.teacher_tables])

    @functools.cached_property
    def teacher_logprobs(self) -> Float[Tensor, "N T"]:
        """The teacher's log-probability of every token, finite where masked."""
        return gather_logprobs(self.teacher_logits, self.tokens, self.mask)

    @functools.cached_property
    def behavior_logprobs(self) -> Float[Tensor, "N T"] | None:
        """The sampling policy's log-probability of every token, finite where masked; None for the student's."""
        if self.behavior_tables is self.student_tables:
            return None
        return gather_logprobs(self.gather_logits([t.detach() for t in self.behavior_tables]), self.tokens, self.mask)

    def gather_logits(self, tables: list[Tensor], index: Tensor | slice = slice(None)) -> Float[Tensor, "B T V"]:
        """The rows of a policy's tables that the selected sequences read."""
        rows = self.rows[index]
        return torch.stack([table[rows[:, n]] for n, table in enumerate(tables)], dim=1)

    def rollouts(self, index: Tensor | slice = slice(None), student_logits: Tensor | None = None) -> Rollouts:
        """The selected sequences as a batch, as a trainer would see them.

        Args:
            index: the sequences, which may repeat.
            student_logits: a leaf `(B, T, V)` to differentiate in place of the student's own rows.
        """
        tokens, mask = self.tokens[index], self.mask[index]
        if student_logits is None:
            student_logits = self.gather_logits(self.student_tables, index)
        elif student_logits.shape[:-1] != tokens.shape:
            raise InvalidArgumentError(
                "student_logits",
                f"must hold rows for tokens of shape {tuple(tokens.shape)}, got shape {tuple(student_logits.shape)}",
            )
        student_logprobs = gather_logprobs(student_logits, tokens, mask)
        behavior = self.behavior_logprobs
        # Everything here comes from checked policies; an audit makes thousands of these.
        return Rollouts.unchecked(
            tokens=tokens,
            mask=mask,
            student_logits=student_logits,
            teacher_logits=self.teacher_logits[index],
            student_logprobs=student_logprobs,
            teacher_logprobs=self.teacher_logprobs[index],
            behavior_logprobs=student_logprobs.detach() if behavior is None else behavior[index],
        )


def shown_tables(policy: Policy, role: str) -> list[Tensor]:
    """A policy's tables as rollouts show them, with the policy's own logits where an environment writes.

    A model has logits at those positions too, finite and unlike the environment's distribution, and gets no gradient
    there. They differ between policies, so that a loss which leaks over such positions shows.

    Args:
        policy: the policy.
        role: `student`, `teacher` or `behavior`; the last shows the environment's own distribution, without its zeros.
    """
    tables, seed = list(policy.tables()), _OPINIONS[role]
    for n in policy.environment:
        table = tables[n].detach()
        table = torch.where(torch.isneginf(table), 0.0, table)
        if seed is not None:
            table = torch.normal(table, 1.0, generator=torch.Generator().manual_seed(1000 * seed + n))
        tables[n] = table
    return tables


def enumerated_value(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    objective: str = "token_local",
    gamma: float = 1.0,
    budget: int = SEQUENCE_BUDGET,
) -> Float[Tensor, ""]:
    """The objective by its definition, as a sum over all sequences, differentiable by autograd.

    Autograd of this value is the independent route to `exact_gradient`. Probabilities must be positive, except those
    of an environment.

    Raises:
        InvalidArgumentError: a wrong name, policies that do not match, or zero probabilities.
        BudgetExceededError: more than `budget` sequences.
    """
    divergence = as_divergence(divergence)
    check_objective(objective, gamma)
    everything = Enumeration.build(student, teacher, budget=budget)
    if any(torch.isneginf(t).any() for t in (*everything.student_tables, *everything.teacher_tables)):
        raise InvalidArgumentError("student", "must have positive probabilities, as must the teacher; got zeros")
    rollouts = everything.rollouts()
    mask, log_u = rollouts.mask, rollouts.log_u
    written = mask * rollouts.student_logprobs + everything.world_logprobs
    log_p = written.sum(-1)
    if objective == "sequence":
        return (log_p.exp() * divergence.generator((mask * log_u).sum(-1))).sum()
    if objective == "token_return":
        discount = gamma ** torch.arange(mask.shape[1], dtype=mask.dtype)
        return (log_p.exp() * (mask * discount * divergence.generator(log_u)).sum(-1)).sum()
    # token_local: the prefixes come from the student but are not differentiated; the token itself is.
    all_log_p = torch.log_softmax(rollouts.student_logits, -1)
    all_log_q = torch.log_softmax(rollouts.teacher_logits, -1)
    per_row = (all_log_p.exp() * divergence.generator(all_log_q - all_log_p)).sum(-1)
    # Each prefix occurs once per sequence that continues it, and their probabilities add up to its own.
    return (mask * log_p.detach().exp().unsqueeze(-1) * per_row).sum()


def _count(vocab_size: int, horizon: int, eos: int | None, environment: tuple[int, ...]) -> int:
    ended, live = 0, 1
    for n in range(horizon):
        ends = eos is not None and n not in environment
        ended += live * ends
        live *= vocab_size - ends
    return ended + live


def _sequences(vocab_size: int, horizon: int, eos: int | None, environment: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """All sequences, and 1 at every position up to and including the token that ends them."""
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    live = torch.ones(1, dtype=torch.bool)
    mask = torch.zeros(1, 0, dtype=torch.float64)
    alphabet = torch.arange(vocab_size)
    for n in range(horizon):
        final = -1 if eos is None or n in environment else eos
        extended = torch.cat(
            [tokens[live].repeat_interleave(vocab_size, 0), alphabet.repeat(int(live.sum())).unsqueeze(1)], 1
        )
        extended_mask = torch.cat(
            [mask[live].repeat_interleave(vocab_size, 0), torch.ones(len(extended), 1, dtype=torch.float64)], 1
        )
        ended = int((~live).sum())
        padding = torch.full((ended, 1), -1 if eos is None else eos)
        tokens = torch.cat([torch.cat([tokens[~live], padding], 1), extended])
        mask = torch.cat([torch.cat([mask[~live], torch.zeros(ended, 1, dtype=torch.float64)], 1), extended_mask])
        live = torch.cat([torch.zeros(ended, dtype=torch.bool), extended[:, -1] != final])
    return tokens, mask


def _prefix_rows(tokens: Tensor, vocab_size: int) -> Tensor:
    rows = torch.zeros_like(tokens)
    for n in range(1, tokens.shape[1]):
        rows[:, n] = rows[:, n - 1] * vocab_size + tokens[:, n - 1]
    return rows


def _gather(tables: list[Tensor], rows: Tensor, tokens: Tensor) -> Tensor:
    logits = [torch.log_softmax(table, -1)[rows[:, n], tokens[:, n]] for n, table in enumerate(tables)]
    return torch.stack(logits, dim=1)
