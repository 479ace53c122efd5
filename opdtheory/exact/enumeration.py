"""Every sequence of a pair of policies, spelled out, and the objectives computed from them by definition.

The second route of the oracle: nothing is summed by level, and gradients come from autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact.oracle import check_objective
from opdtheory.exact.policies import Policy
from opdtheory.exact.tree import check_pair
from opdtheory.rollouts import Rollouts

__all__ = ["SEQUENCE_BUDGET", "Enumeration", "enumerated_value"]

SEQUENCE_BUDGET = 2**18


@dataclass(frozen=True)
class Enumeration:
    """All sequences that the sampling policy can produce, with their probabilities.

    Attributes:
        tokens: `(N, T)`; a sequence that has ended is padded with its end-of-sequence token.
        mask: `(N, T)` float64, 1 up to and including the end-of-sequence token.
        rows: `(N, T)`, the table row that each position reads: its prefix in base `V`. Padded
            positions read the rows of prefixes that have ended, which no live position reads.
        probability: of each sequence under the sampling policy, `(N,)`.
        student_tables: the student's logits by level, as `Policy.tables` gives them.
        teacher_tables: the teacher's.
        behavior_tables: the sampling policy's.
    """

    tokens: Int64[Tensor, "N T"]
    mask: Float[Tensor, "N T"]
    rows: Int64[Tensor, "N T"]
    probability: Float[Tensor, " N"]
    student_tables: list[Tensor]
    teacher_tables: list[Tensor]
    behavior_tables: list[Tensor]

    @classmethod
    def build(
        cls, student: Policy, teacher: Policy, behavior: Policy | None = None, budget: int = SEQUENCE_BUDGET
    ) -> Enumeration:
        """Enumerate the sequences of positive probability under `behavior`, by default the student.

        Raises:
            InvalidArgumentError: the policies do not match.
            BudgetExceededError: more than `budget` sequences.
        """
        check_pair(student, teacher)
        behavior = student if behavior is None else behavior
        check_pair(student, behavior)
        count = _count(student.vocab_size, student.horizon, student.eos)
        if count > budget:
            raise BudgetExceededError(
                f"enumerating V={student.vocab_size}, T={student.horizon}",
                count,
                budget,
                "lower the vocabulary or the horizon, or raise budget",
            )
        tokens, mask = _sequences(student.vocab_size, student.horizon, student.eos)
        rows = _prefix_rows(tokens, student.vocab_size)
        student_tables, teacher_tables = student.tables(), teacher.tables()
        behavior_tables = student_tables if behavior is student else behavior.tables()
        log_mu = _gather([t.detach() for t in behavior_tables], rows, tokens)
        probability = torch.where(mask > 0, log_mu, 0.0).sum(-1).exp()
        possible = probability > 0
        return cls(
            tokens[possible],
            mask[possible],
            rows[possible],
            probability[possible],
            student_tables,
            teacher_tables,
            behavior_tables,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def gather_logits(self, tables: list[Tensor], index: Tensor | slice = slice(None)) -> Float[Tensor, "B T V"]:
        """The rows of a policy's tables that the selected sequences read."""
        rows = self.rows[index]
        return torch.stack([table[rows[:, n]] for n, table in enumerate(tables)], dim=1)

    def rollouts(self, index: Tensor | slice = slice(None), student_logits: Tensor | None = None) -> Rollouts:
        """The selected sequences as a batch, as a trainer would see them.

        Args:
            index: which sequences, repetitions allowed.
            student_logits: a leaf `(B, T, V)` to differentiate, instead of the student's own rows.
        """
        if student_logits is None:
            student_logits = self.gather_logits(self.student_tables, index)
        behavior_logprobs = None
        if self.behavior_tables is not self.student_tables:
            behavior_logits = self.gather_logits(self.behavior_tables, index).detach()
            behavior_logprobs = _finite_when_masked(
                torch.log_softmax(behavior_logits, -1).gather(-1, self.tokens[index].unsqueeze(-1)).squeeze(-1),
                self.mask[index],
            )
        return Rollouts.from_logits(
            self.tokens[index],
            student_logits,
            self.gather_logits(self.teacher_tables, index).detach(),
            mask=self.mask[index],
            behavior_logprobs=behavior_logprobs,
        )


def enumerated_value(
    student: Policy,
    teacher: Policy,
    divergence: str | Divergence,
    objective: str = "token_local",
    gamma: float = 1.0,
    budget: int = SEQUENCE_BUDGET,
) -> Float[Tensor, ""]:
    """The objective by its definition, as a sum over spelled-out sequences, differentiable by autograd.

    Autograd of this value is the independent route to `exact_gradient`. It takes strictly positive
    probabilities only.

    Raises:
        InvalidArgumentError: a wrong name, policies that do not match, or zero probabilities.
        BudgetExceededError: more than `budget` sequences.
    """
    divergence = as_divergence(divergence)
    check_objective(objective, gamma)
    everything = Enumeration.build(student, teacher, budget=budget)
    if any(torch.isneginf(t).any() for t in (*everything.student_tables, *everything.teacher_tables)):
        raise InvalidArgumentError("student", "or teacher has zero probabilities; enumerated_value takes positive ones")
    rollouts = everything.rollouts()
    mask, log_u = rollouts.mask, rollouts.log_u
    log_p = (mask * rollouts.student_logprobs).sum(-1)
    if objective == "sequence":
        return (log_p.exp() * divergence.generator((mask * log_u).sum(-1))).sum()
    if objective == "token_return":
        discount = gamma ** torch.arange(mask.shape[1], dtype=mask.dtype)
        return (log_p.exp() * (mask * discount * divergence.generator(log_u)).sum(-1)).sum()
    # token_local: prefixes are drawn from the student but not differentiated; the token itself is.
    before = (mask * rollouts.student_logprobs).cumsum(-1) - mask * rollouts.student_logprobs
    all_log_p = torch.log_softmax(rollouts.student_logits, -1)
    all_log_q = torch.log_softmax(rollouts.teacher_logits, -1)
    per_row = (all_log_p.exp() * divergence.generator(all_log_q - all_log_p)).sum(-1)
    # Each prefix is met once per sequence that continues it; the rest of that sequence sums to one.
    rest = (log_p.unsqueeze(-1) - before).detach()
    return (mask * (before.detach() + rest).exp() * per_row).sum()


def _count(vocab_size: int, horizon: int, eos: int | None) -> int:
    if eos is None:
        return vocab_size**horizon
    live = vocab_size - 1
    return sum(live**n for n in range(horizon)) + live**horizon


def _sequences(vocab_size: int, horizon: int, eos: int | None) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    live = torch.ones(1, dtype=torch.bool)
    mask = torch.zeros(1, 0, dtype=torch.float64)
    alphabet = torch.arange(vocab_size)
    for _ in range(horizon):
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
        live = torch.cat([torch.zeros(ended, dtype=torch.bool), extended[:, -1] != (-1 if eos is None else eos)])
    return tokens, mask


def _prefix_rows(tokens: Tensor, vocab_size: int) -> Tensor:
    rows = torch.zeros_like(tokens)
    for n in range(1, tokens.shape[1]):
        rows[:, n] = rows[:, n - 1] * vocab_size + tokens[:, n - 1]
    return rows


def _gather(tables: list[Tensor], rows: Tensor, tokens: Tensor) -> Tensor:
    logits = [torch.log_softmax(table, -1)[rows[:, n], tokens[:, n]] for n, table in enumerate(tables)]
    return torch.stack(logits, dim=1)


def _finite_when_masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where((mask == 0) & torch.isneginf(values), 0.0, values)
