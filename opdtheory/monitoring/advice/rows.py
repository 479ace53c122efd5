"""What a recommendation reads: distributions at each token, or sums over sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.advice.exact import Groups, Histories
from opdtheory.monitoring.sums import Sums, group_of
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.rollouts import Rollouts

__all__ = ["Rows", "rows_of", "sums_of"]

# Numbers of one distribution that are held at once.
_HELD = 2**22


@dataclass(frozen=True)
class Rows:
    """Distributions at each token, and the set of rows that a group compares."""

    student: Float[Tensor, "N V"]
    teacher: Float[Tensor, "N V"]
    sets: Int64[Tensor, " N"] | None = field(default=None, repr=False)
    group: int = 1

    def histories(self, divergence: Divergence, chunk: slice) -> Histories:
        """The rows of a chunk."""
        groups = None if self.sets is None else Groups.of(self.sets[chunk], self.group)
        return Histories(divergence, self.student[chunk], self.teacher[chunk], groups)

    def chunks(self) -> list[slice]:
        """Rows in chunks that never split a set."""
        each = max(1, _HELD // self.student.shape[-1])
        if self.sets is None:
            return [slice(i, min(i + each, len(self.student))) for i in range(0, len(self.student), each)]
        ends = torch.cat([self.sets.diff().nonzero().flatten() + 1, torch.tensor([len(self.sets)])]).tolist()
        found, begin, before = [], 0, 0
        for end in ends:
            if end - begin > each and before > begin:
                found.append(slice(begin, before))
                begin = before
            before = end
        return [*found, slice(begin, before)]


def rows_of(source: Any, group: int) -> Rows | None:
    """The distributions at the tokens that count; None where they are not known."""
    if isinstance(source, Rollouts):
        if source.payload is not None:
            return None
        live = source.mask > 0
        rollout, position = live.nonzero().unbind(-1)
        student, teacher = source.student_logits.detach()[live], source.teacher_logits.detach()[live]
        total = len(source.tokens)
    elif isinstance(source, SampledTokens):
        if source.student_logits is None or source.teacher_logits is None:
            return None
        student, teacher, rollout, total = source.student_logits, source.teacher_logits, source.rollout, source.rollouts
        first = torch.searchsorted(rollout, torch.arange(total))
        position = torch.arange(len(rollout)) - first[rollout]
    else:
        return None
    if not len(student):
        raise InvalidArgumentError("found_or_rollouts", "must hold a token that counts")
    if group == 1:
        return Rows(student, teacher)
    if total % group:
        raise InvalidArgumentError("group", f"must divide the number of rollouts, {total}, got {group}")
    number = torch.div(rollout, group, rounding_mode="floor") * (int(position.max()) + 1) + position
    order = number.argsort(stable=True)
    return Rows(student[order], teacher[order], number[order], group)


def sums_of(source: Any) -> tuple[Sums, int]:
    """The sums over sampled tokens, and how many there are."""
    if isinstance(source, Rollouts):
        live = source.mask > 0
        rollout = live.nonzero()[:, 0]
        source = SampledTokens.flat(source.student_logprobs.detach()[live], source.teacher_logprobs[live], rollout)
    if isinstance(source, SampledTokens):
        sums = Sums.empty()
        sums.add(source.log_u, source.student, group_of(source.rollout))
        count = len(source)
    else:
        sums, count = source.sums, int(source.tokens)
    if not count or sums.count <= 0:
        raise InvalidArgumentError("found_or_rollouts", "must hold a token that counts")
    return sums, count
