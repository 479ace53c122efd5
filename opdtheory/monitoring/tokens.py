r"""The sampled tokens of some rollouts as a trainer logged them: what is usable, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = ["REASONS", "SampledTokens", "words_of"]

# Why a token is left out, in words. A masked one is no fault and is not counted.
REASONS = {
    "nan": "have a log-probability that is no number",
    "missing": "have no log-probability of the teacher or the student",
    "impossible": "have probability zero under the student, which cannot have written them",
    "above_zero": "have a log-probability above zero",
    "ragged": "are in rows whose columns differ in length",
}

# Log-probabilities in bfloat16 or from rounding may lie slightly above zero.
_ABOVE = 1e-2


@dataclass(frozen=True)
class SampledTokens:
    r"""Unmasked tokens of rollouts, one entry each; all log-probabilities are natural.

    Attributes:
        student: $\log p(y_n|h_n)$, finite, `(N,)`.
        teacher: $\log q(y_n|h_n)$, `(N,)`; `-inf` where the teacher cannot write the token.
        rollout: the number of each token's rollout, from 0 without gaps, `(N,)`.
        behavior: $\log\mu(y_n|h_n)$ of the policy or engine that sampled, `(N,)`; None if not logged.
        entropy: the entropy of $p(\cdot|h_n)$, in nats, `(N,)`; None if not logged.
        student_logits: rows of the student's whole distribution, `(N, V)`; None if not logged.
        teacher_logits: those of the teacher, `(N, V)`; None if not logged.
        left_out: the number of tokens that could not be used, by a reason of `REASONS`.
    """

    student: Float[Tensor, " N"]
    teacher: Float[Tensor, " N"]
    rollout: Int64[Tensor, " N"]
    behavior: Float[Tensor, " N"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    student_logits: Float[Tensor, "N V"] | None = None
    teacher_logits: Float[Tensor, "N V"] | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.student)

    @property
    def rollouts(self) -> int:
        """The number of rollouts."""
        return int(self.rollout[-1]) + 1 if len(self.rollout) else 0

    @property
    def log_u(self) -> Float[Tensor, " N"]:
        r"""$\log u_n = \log q - \log p$, in nats."""
        return self.teacher - self.student

    @classmethod
    def of(
        cls,
        student: Any,
        teacher: Any,
        behavior: Any = None,
        mask: Any = None,
        *,
        entropy: Any = None,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> SampledTokens:
        """The usable tokens of arrays or ragged lists.

        Args:
            student: log-probabilities of the sampled tokens: `(T,)` of one rollout, `(B, T)`, or a list of rows of any
                lengths; numbers may be None or NaN.
            teacher: the teacher's, likewise.
            behavior: those of the sampling policy, likewise.
            mask: 1 on tokens that count, likewise; by default all do.
            entropy: entropies of the student, likewise.
            student_logits: `(T, V)` or `(B, T, V)`.
            teacher_logits: likewise.

        Raises:
            InvalidArgumentError: an argument cannot be read as rows of numbers, or tensors differ in shape.
        """
        given = {"student_logprobs": student, "teacher_logprobs": teacher, "behavior_logprobs": behavior}
        given |= {"mask": mask, "entropy": entropy}
        columns = {name: _plain(value) for name, value in given.items() if value is not None}
        flat, lengths, ragged = _padded(columns) or _of_rows(columns)
        number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        logits = [
            _flat_logits(name, value, len(number))
            for name, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits))
        ]
        return cls.flat(
            flat["student_logprobs"],
            flat["teacher_logprobs"],
            number,
            flat.get("behavior_logprobs"),
            flat.get("mask"),
            entropy=flat.get("entropy"),
            student_logits=logits[0],
            teacher_logits=logits[1],
            ragged=ragged,
        )

    @classmethod
    def flat(
        cls,
        student: Tensor,
        teacher: Tensor,
        rollout: Tensor,
        behavior: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        entropy: Tensor | None = None,
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        ragged: int = 0,
    ) -> SampledTokens:
        """The usable tokens of flat tensors, whose `rollout` never falls from one token to the next."""
        student, teacher = student.double(), teacher.double()
        keep, left_out = _usable(student, teacher, behavior, mask)
        if ragged:
            left_out["ragged"] = ragged
        if bool(keep.all()):
            pick = lambda x: x  # noqa: E731
        else:
            pick = lambda x: None if x is None else x[keep]  # noqa: E731
        _, number = torch.unique_consecutive(pick(rollout), return_inverse=True)
        as_double = lambda x: None if x is None else pick(x).double()  # noqa: E731
        return cls(
            student=pick(student).clamp(max=0.0),
            teacher=pick(teacher).clamp(max=0.0),
            rollout=number,
            behavior=None if behavior is None else pick(behavior).double().clamp(max=0.0),
            entropy=as_double(entropy),
            student_logits=as_double(student_logits),
            teacher_logits=as_double(teacher_logits),
            left_out=left_out,
        )


def words_of(left_out: Mapping[str, int]) -> tuple[str, ...]:
    """What was left out, a sentence for each reason."""
    return tuple(f"{count:,} tokens {REASONS.get(reason, reason)}." for reason, count in left_out.items() if count)


def _usable(
    student: Tensor, teacher: Tensor, behavior: Tensor | None, mask: Tensor | None
) -> tuple[Bool[Tensor, " N"], dict[str, int]]:
    """Which tokens are used, and how many unmasked ones are not, by reason."""
    keep = torch.ones_like(student, dtype=torch.bool) if mask is None else mask > 0
    known = [student, teacher] if behavior is None else [student, teacher, behavior]
    left_out: dict[str, int] = {}
    faults = {
        "nan": lambda: _any(torch.isnan(x) for x in known),
        "impossible": lambda: (student == -torch.inf) | (False if behavior is None else behavior == -torch.inf),
        "above_zero": lambda: _any(x > _ABOVE for x in known),
    }
    for reason, fault in faults.items():
        bad = keep & fault()
        count = int(bad.sum())
        if count:
            left_out[reason] = count
            keep = keep & ~bad
    return keep, left_out


def _any(flags: Iterable[Tensor]) -> Tensor:
    return reduce(torch.logical_or, flags)


def _plain(value: Any) -> Any:
    """A tensor without its gradient, in place of an array of numbers or a tensor; nested ones as their rows."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, Tensor):
        value = value.detach()
        return list(value.unbind()) if value.is_nested else value
    return value


def _padded(columns: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[int], int] | None:
    """The columns, the lengths of their rows and no token lost, if all are tensors of one shape `(B, T)`."""
    shapes = {value.shape if isinstance(value, Tensor) else None for value in columns.values()}
    shape = shapes.pop()
    if shapes or shape is None or len(shape) != 2:
        return None
    return {name: value.flatten() for name, value in columns.items()}, [shape[1]] * shape[0], 0


def _of_rows(columns: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[int], int]:
    """The columns, the lengths of their rows and the number of tokens lost because rows differ in length."""
    rows = {name: _rows(name, value) for name, value in columns.items()}
    lengths, ragged = _common_lengths(rows)
    return {name: _joined(each, lengths) for name, each in rows.items()}, lengths, ragged


def _rows(name: str, value: Any) -> list[Tensor]:
    """The rows of a tensor or of nested lists."""
    if isinstance(value, Tensor):
        if value.ndim not in (1, 2):
            raise InvalidArgumentError(name, f"must have shape (T,) or (B, T), got {tuple(value.shape)}")
        return [value] if value.ndim == 1 else list(value)
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        raise InvalidArgumentError(name, f"must be an array or lists of numbers, got {type(value).__name__}")
    nested = any(isinstance(row, Sequence | np.ndarray | Tensor) for row in value)
    return [_row(name, row) for row in value] if nested else [_row(name, value)]


def _row(name: str, row: Any) -> Tensor:
    if isinstance(row, Tensor):
        return row.detach().flatten()
    if row is None:
        return torch.empty(0, dtype=torch.float64)
    try:
        return torch.from_numpy(np.array(row, dtype=np.float64).reshape(-1))
    except (TypeError, ValueError):
        pass
    try:
        return torch.tensor([torch.nan if each is None else float(each) for each in row], dtype=torch.float64)
    except (TypeError, ValueError):
        raise InvalidArgumentError(name, f"must hold numbers, got {str(row)[:60]!r}") from None


def _common_lengths(columns: Mapping[str, list[Tensor]]) -> tuple[list[int], int]:
    """The length of each row that all columns share, 0 where they differ, and the number of tokens that this costs."""
    counts = {name: len(rows) for name, rows in columns.items()}
    if len(set(counts.values())) > 1:
        raise InvalidArgumentError("rows", f"must be as many in every column, got {counts}")
    lengths, ragged = [], 0
    for rows in zip(*columns.values(), strict=True):
        sizes = {len(row) for row in rows}
        agree = len(sizes) == 1
        lengths.append(max(sizes) if agree else 0)
        ragged += 0 if agree else max(sizes)
    return lengths, ragged


def _joined(rows: Iterable[Tensor], lengths: Sequence[int]) -> Tensor:
    kept = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.float64)


def _flat_logits(name: str, value: Any, tokens: int) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.ndim not in (2, 3):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidArgumentError(name, f"must be a tensor of shape (T, V) or (B, T, V), got {shape}")
    rows = value.detach().flatten(0, -2)
    if len(rows) != tokens:
        raise InvalidArgumentError(name, f"must have a row for each of the {tokens} tokens, got {len(rows)}")
    return rows
