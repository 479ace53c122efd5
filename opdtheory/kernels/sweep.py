r"""Values and gradients of many positions, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels.forms import Filled, Form, fast_form
from opdtheory.kernels.laws import Buffers, Laws, Row, affine, default_rows, laws_of, narrow
from opdtheory.kernels.reference import reference_form

__all__ = ["Evaluator", "finish", "matrices", "runs", "sweep"]


@dataclass(frozen=True)
class Evaluator:
    """How a divergence is evaluated: the form, the dtype it is rounded in, and the form where that one fails."""

    form: Form
    dtype: torch.dtype
    reference: Form
    scale: float

    @classmethod
    def of(cls, divergence: Divergence, dtype: torch.dtype, scale: float) -> Evaluator:
        """The fast form in float32 for logits of that width or narrower, else the reference form in float64."""
        reference = reference_form(divergence)
        fast = None if dtype == torch.float64 else fast_form(divergence)
        if fast is None:
            return cls(reference, torch.float64, reference, scale)
        return cls(fast, torch.float32, reference, scale)

    def exact(self) -> Evaluator:
        """The same by the reference form."""
        return Evaluator(self.reference, torch.float64, self.reference, self.scale)


def sweep(
    evaluator: Evaluator,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    chunk: int | None,
    values: Tensor,
    gradient: Tensor | None,
) -> None:
    r"""Fill in the value of each position, times its weight, and the gradient of that in the student's logits.

    Args:
        evaluator: what to compute.
        student: logits, `(..., V)`.
        teacher: logits of the same shape.
        weights: `(...)` floating, or None for ones; positions of weight zero are not looked at.
        chunk: how many positions at a time.
        values: `(...)`, float64, overwritten.
        gradient: like `student`, overwritten, or None; it may be `student` itself.

    Raises:
        InvalidArgumentError: a row of another weight than zero holds NaN, +inf or only -inf.
    """
    vocabulary = student.shape[-1]
    rows = chunk or default_rows(vocabulary, student.device)
    chunks = _Chunks(evaluator, vocabulary, student.device)
    wide = [student, teacher] + ([] if gradient is None else [gradient])
    narrow = [values] + ([] if weights is None else [weights.contiguous()])
    for wides, narrows in matrices(wide, narrow):
        weight = None if weights is None else narrows[1]
        for part, weighed in runs(weight, narrows[0].shape[0], rows):
            grad = None if gradient is None else wides[2][part]
            if not weighed:
                narrows[0][part] = 0.0
                if grad is not None:
                    grad.zero_()
                continue
            factor = None if weight is None else weight[part].unsqueeze(-1)
            value = chunks(wides[0][part], wides[1][part], factor, grad)
            narrows[0][part] = value if isinstance(value, float) else value.squeeze(-1)


class _Chunks:
    """Evaluates one chunk after another in the same buffers."""

    def __init__(self, evaluator: Evaluator, vocabulary: int, device: torch.device) -> None:
        self._evaluator = evaluator
        self._buffers = Buffers.allocate(0, vocabulary, evaluator.dtype, device)
        self._guarded = False

    def __call__(self, student: Tensor, teacher: Tensor, weight: Tensor | None, grad: Tensor | None) -> Row:
        """The values of the rows; their gradient is left in `grad`."""
        rows, vocabulary = student.shape
        if self._buffers.p.shape[0] < rows:
            self._buffers = Buffers.allocate(rows, vocabulary, self._evaluator.dtype, student.device)
        form, buffers = self._evaluator.form, self._buffers.head(rows)
        laws = laws_of(student, teacher, self._evaluator.scale, buffers, self._guarded)
        filled = form.fill(laws)
        # One number tells of every NaN and infinity, as each would have entered a sum.
        if not _finite(filled.value + filled.mean):
            _refuse_unusable(laws)
            if form.guardable and not self._guarded:
                # What one chunk needed, its neighbours will need.
                self._guarded = True
                return self(student, teacher, weight, grad)
            if form is not self._evaluator.reference:
                return self._again(student, teacher, weight, grad)
        if grad is not None:
            finish(laws, form, filled, weight, grad)
        value = filled.value / laws.total
        return value if weight is None else weight.double() * value

    def _again(self, student: Tensor, teacher: Tensor, weight: Tensor | None, grad: Tensor | None) -> Tensor:
        """Rows that the fast form does not master: without the tokens that neither law has, or exactly."""
        values = []
        for row in range(student.shape[0]):
            part = slice(row, row + 1)
            one, other = student[part], teacher[part]
            kept = (~(torch.isneginf(one) & torch.isneginf(other))).squeeze(0).nonzero().squeeze(-1)
            compact = kept.numel() < one.shape[-1]
            evaluator = self._evaluator if compact else self._evaluator.exact()
            if compact:
                one, other = one[:, kept], other[:, kept]
            inner = None if grad is None else torch.empty_like(one, dtype=grad.dtype)
            chunks = _Chunks(evaluator, one.shape[-1], one.device)
            value = chunks(one, other, None if weight is None else weight[part], inner)
            values.append(torch.as_tensor(value, dtype=torch.float64, device=one.device).view(1, 1))
            if grad is not None and inner is not None:
                grad[part] = 0.0
                grad[part, kept] = inner
        return torch.cat(values)


def finish(laws: Laws, form: Form, filled: Filled, weight: Tensor | None, out: Tensor) -> None:
    """Write the gradient of a chunk from what its form found; the mean may be that of a larger vocabulary."""
    p, h = laws.p, filled.h
    factor, mean = form.factor * laws.scale / laws.total, filled.mean / laws.total
    if weight is not None:
        factor = factor * (weight.item() if isinstance(factor, float) else weight.double())
    target = out if out.dtype == p.dtype else h
    if form.kind == "weight":
        torch.mul(affine(h, -factor, factor * mean), p, out=target)
    elif isinstance(factor, float):
        torch.add(p.mul_(factor * mean), h, alpha=-factor, out=target)
    else:
        torch.mul(p.mul_(narrow(mean, p)).sub_(h), narrow(factor, p), out=target)
    if target is not out:
        out.copy_(target)


def _finite(row: Row) -> bool:
    return math.isfinite(row if isinstance(row, float) else float(row.sum()))


def _refuse_unusable(laws: Laws) -> None:
    for name, logits in (("student_logits", laws.student), ("teacher_logits", laws.teacher)):
        bad = int((~torch.isfinite(logits.amax(-1))).sum())
        if bad:
            raise InvalidArgumentError(
                name,
                f"{bad} of {logits.shape[0]} rows looked at hold NaN, +inf or only -inf; logits must be finite or -inf",
            )


def matrices(wide: list[Tensor], narrow: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Views of tensors `(..., V)` and `(...)` as matrices and vectors, in as few pieces as need no copy."""
    try:
        pieces = [each.view(-1, each.shape[-1]) for each in wide], [each.view(-1) for each in narrow]
    except RuntimeError:
        for index in range(wide[0].shape[0]):
            yield from matrices([each[index] for each in wide], [each[index] for each in narrow])
    else:
        yield pieces


def runs(weights: Tensor | None, count: int, rows: int) -> Iterator[tuple[slice, bool]]:
    """Consecutive positions, at most `rows` of them, that all have a weight other than zero, or all have none."""
    flags = [True] * count if weights is None else (weights != 0).tolist()
    start = 0
    while start < count:
        stop = start + 1
        while stop < count and flags[stop] == flags[start] and (stop - start < rows or not flags[start]):
            stop += 1
        yield slice(start, stop), flags[start]
        start = stop
