r"""What is kept of a run: sums over its tokens and rollouts, which add up over batches, steps and files."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.estimators.offpolicy import CAP, KEEP_RANGE
from opdtheory.monitoring.sums import GROUPS, Sums, group_of
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.monitoring.weights import Weight
from opdtheory.monitoring.whole_rows import row_sums

__all__ = ["LIKELY", "Evidence", "OffPolicy", "leave_one_out"]

# At most k tokens have a probability above 1/(k + 1), so each of them is among the k likeliest.
LIKELY = 4


@dataclass
class OffPolicy:
    r"""Sums over tokens of another sampler $\mu$, by what corrects for it; $\rho = p/\mu$.

    Attributes:
        ratio: of $\log\rho$ in place of $\log u$.
        corrected: each token weighs $\rho$: expectations under the student (T8).
        truncated: each token weighs $\min(\rho, 2)$, as truncated importance sampling does (T14).
        masked: each token weighs $\rho$ if it lies in $[0.5, 5]$, else nothing (T14).
    """

    ratio: Sums = field(default_factory=Sums.empty)
    corrected: Sums = field(default_factory=Sums.empty)
    truncated: Sums = field(default_factory=Sums.empty)
    masked: Sums = field(default_factory=Sums.empty)

    def add(self, tokens: SampledTokens, group: Tensor, square: Tensor | None) -> None:
        """Add tokens whose sampler's log-probabilities are known."""
        assert tokens.behavior is not None
        log_rho = tokens.student - tokens.behavior
        rho = log_rho.exp()
        low, high = KEEP_RANGE
        kept = torch.where((rho >= low) & (rho <= high), rho, 0.0)
        self.ratio.add(log_rho, tokens.student, group)
        for sums, weight in ((self.corrected, rho), (self.truncated, rho.clamp(max=CAP)), (self.masked, kept)):
            sums.add(tokens.log_u, tokens.student, group, weight, square)


# Columns of `Evidence.surprise` and of `Evidence.lengths`.
_SURPRISE = ("tokens", "excess")
_LENGTHS = ("rollouts", "length", "squared_length", "weight")


@dataclass
class Evidence:
    r"""The sums of a run.

    Attributes:
        weight: of the estimator in use.
        others: weights that are laid beside it where whole distributions come.
        together: rollouts of one prompt, which stand next to each other and are not independent.
        sampled: of the tokens as they were sampled.
        likely: of the tokens that are surely among the teacher's `LIKELY` likeliest.
        off_policy: those that correct for another sampler; None if it was not logged.
        surprise: by group: the tokens with a known entropy, and the sum of $-\log p - H$ over them.
        lengths: by group: rollouts, their lengths, squared lengths, and summed weights.
        rows: by estimator and group, what whole distributions say (`whole_rows.COLUMNS`); empty if they never came.
        tokens: the number of tokens.
        rollouts: the number of rollouts.
        impossible: tokens that the teacher cannot write.
        left_out: tokens that could not be used, by reason.
        complete: whether both whole distributions came with all tokens.
    """

    weight: Weight
    together: int = 1
    others: tuple[Weight, ...] = ()
    sampled: Sums = field(default_factory=Sums.empty)
    likely: Sums = field(default_factory=Sums.empty)
    off_policy: OffPolicy | None = None
    surprise: Float[Tensor, "G 2"] = field(default_factory=lambda: _zeros(_SURPRISE))
    lengths: Float[Tensor, "G 4"] = field(default_factory=lambda: _zeros(_LENGTHS))
    rows: dict[str, Float[Tensor, "G M"]] = field(default_factory=dict)
    tokens: int = 0
    rollouts: int = 0
    impossible: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    complete: bool = True

    def add(self, tokens: SampledTokens) -> None:
        """Add the tokens of further rollouts."""
        self.left_out.update(tokens.left_out)
        if not len(tokens):
            return
        group = group_of(tokens.rollout, self.rollouts, self.together)
        square = _square(tokens)
        self.complete = self.complete and tokens.student_logits is not None and tokens.teacher_logits is not None
        if self.complete:
            for name, sums in row_sums(tokens, (self.weight, *self.others), group).items():
                self.rows[name] = self.rows[name] + sums if name in self.rows else sums
        self.sampled.add(tokens.log_u, tokens.student, group, square=square)
        likely = tokens.teacher > -math.log(LIKELY + 1)
        chosen = None if square is None else square[likely]
        self.likely.add(tokens.log_u[likely], tokens.student[likely], group[likely], square=chosen)
        if tokens.behavior is not None:
            self.off_policy = self.off_policy or OffPolicy()
            self.off_policy.add(tokens, group, square)
        if tokens.entropy is not None:
            known = torch.isfinite(tokens.entropy)
            excess = torch.where(known, -tokens.student - tokens.entropy, 0.0)
            self.surprise += _by_group(group, known.double(), excess)
        self._add_rollouts(tokens)
        self.tokens += len(tokens)
        self.rollouts += tokens.rollouts
        self.impossible += int((tokens.teacher == -torch.inf).sum())

    def _add_rollouts(self, tokens: SampledTokens) -> None:
        count = tokens.rollouts
        each = torch.bincount(tokens.rollout, minlength=count).double()
        weights = torch.bincount(tokens.rollout, self.weight(tokens.log_u.clamp(-80.0, 80.0)), count)
        group = group_of(torch.arange(count), self.rollouts, self.together)
        self.lengths += _by_group(group, torch.ones_like(each), each, each.square(), weights)

    def as_corrected(self, importance: str | None) -> Sums:
        """The sums with the importance weights of an estimator; as sampled if there are none."""
        if self.off_policy is None or importance is None:
            return self.sampled
        by = {"tis": self.off_policy.truncated, "mask": self.off_policy.masked}
        return by.get(importance, self.off_policy.corrected)

    @property
    def own(self) -> Sums:
        """The sums that stand for expectations under the student: corrected where the sampler is known."""
        return self.sampled if self.off_policy is None else self.off_policy.corrected


def leave_one_out(sums: Float[Tensor, "G M"]) -> Float[Tensor, "K M"]:
    """The total of all groups, and that of all but each one that has something."""
    total = sums.sum(0, keepdim=True)
    return torch.cat([total, total - sums[sums[:, 0] > 0]])


def _zeros(columns: tuple[str, ...]) -> Tensor:
    return torch.zeros(GROUPS, len(columns), dtype=torch.float64)


def _by_group(group: Tensor, *values: Tensor) -> Float[Tensor, "G M"]:
    return torch.stack([torch.bincount(group, value, GROUPS) for value in values], dim=-1)


def _square(tokens: SampledTokens) -> Tensor | None:
    """The squared length of the score of each token in the logits, if the student's distribution is known."""
    if tokens.student_logits is None:
        return None
    p = tokens.student.exp()
    # Of a certain token, rounding may leave less than zero.
    return (1 - 2 * p + torch.softmax(tokens.student_logits, -1).square().sum(-1)).clamp_min(0.0)
