r"""Values and gradients of many positions, chunk by chunk."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels.arguments import check_weights
from opdtheory.kernels.distributions import Buffers, Distributions, Row, affine, default_rows, distributions_of, narrow
from opdtheory.kernels.forms import Filled, Form, fast_form
from opdtheory.kernels.pieces import matrices
from opdtheory.kernels.reference import reference_form

__all__ = ["Evaluator", "any_left", "can_split", "finish", "has_programs", "runs", "sweep", "sweep_once"]


@dataclass(frozen=True)
class Evaluator:
    """How a divergence is evaluated: the form, the dtype of its arithmetic, and the form to use if it fails."""

    divergence: Divergence
    form: Form
    dtype: torch.dtype
    reference: Form
    scale: float

    @classmethod
    def of(cls, divergence: Divergence, dtype: torch.dtype, scale: float) -> Evaluator:
        """The fast form in float32 for float32 or narrower logits, else the reference form in float64."""
        reference = reference_form(divergence)
        fast = None if dtype == torch.float64 else fast_form(divergence)
        if fast is None:
            return cls(divergence, reference, torch.float64, reference, scale)
        return cls(divergence, fast, torch.float32, reference, scale)

    def has_programs(self, device: torch.device) -> bool:
        """Whether programs evaluate whole rows on a device; they look at weights themselves."""
        return self.dtype == torch.float32 and has_programs(device)

    def exact(self) -> Evaluator:
        """The evaluator with the reference form."""
        return Evaluator(self.divergence, self.reference, torch.float64, self.reference, self.scale)


def sweep(
    evaluator: Evaluator,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    chunk: int | None,
    values: Tensor,
    gradient: Tensor | None,
) -> None:
    r"""Fill in the value of each position, times its weight, and its gradient in the student's logits.

    Args:
        evaluator: what to compute.
        student: logits, `(..., V)`.
        teacher: logits of the same shape.
        weights: `(...)`, floating-point, or None for ones; positions of weight zero are skipped.
        chunk: the number of positions at a time.
        values: `(...)`, of float32 or float64, overwritten.
        gradient: like `student`, overwritten, or None; it may be `student` itself.

    Raises:
        InvalidArgumentError: a weight is not finite, or a row of non-zero weight holds NaN, +inf or only -inf.
    """
    rows = chunk or default_rows(student.shape[-1], student.device)
    # The gradient serves as a buffer, unless it takes the place of logits that are still needed.
    spare = gradient is not student and gradient is not None and gradient.dtype == evaluator.dtype
    chunks = _Chunks(evaluator, spare)
    wide = [student, teacher] + ([] if gradient is None else [gradient])
    narrow = [values] + ([] if weights is None else [weights.contiguous()])
    for wides, narrows in matrices(wide, narrow):
        if evaluator.has_programs(student.device):
            _by_programs(evaluator, wides, narrows, rows)
        elif rows == 1 and student.device.type == "cpu":
            found, *weight = narrows
            _singly(chunks, wides, found, weight[0].tolist() if weight else None)
        else:
            _by_chunks(chunks, wides, narrows, rows)


def sweep_once(
    evaluator: Evaluator,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    values: Tensor,
    gradient: Tensor | None,
    rest: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`sweep` by programs of matrices, without waiting for the device.

    Args:
        evaluator: what to compute.
        student: logits, `(N, V)`.
        teacher: logits of the same shape.
        weights: `(N,)`, or None for ones.
        values: `(N,)`, overwritten.
        gradient: like `student`, overwritten, or None; it may be `student` itself.
        rest: if not None, the gradient is of bfloat16, and followed at this distance by what its rounding took.

    Returns:
        A state for `any_left`, and which positions are left to do, `(N,)`: value and gradient are zero so far.
    """
    from opdtheory.kernels.programs.launch import run_program

    return run_program(
        evaluator.divergence, student, teacher, evaluator.scale, weights, values, gradient, rest=rest, fill=0.0
    )


def any_left(*states: Tensor) -> bool:
    """Whether any row of some calls is left to do; the one time that the host waits for them.

    Raises:
        RuntimeError: programs that hold a row together have not met.
    """
    found = int(states[0] if len(states) == 1 else torch.cat(states).amax())
    if found > 1:
        raise RuntimeError(
            "the programs that hold a row of logits together have not met within half a minute, as if the GPU had not "
            "run them at once; the gradient is not complete"
        )
    return found > 0


def can_split(student: Tensor) -> bool:
    """Whether `sweep_once` can write a gradient as two numbers."""
    from opdtheory.kernels.programs.launch import splits

    rows, words = student.shape
    return splits(rows, words, student.device)


def has_programs(device: torch.device) -> bool:
    """Whether those of `opdtheory.kernels.programs` can process whole rows."""
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _by_programs(evaluator: Evaluator, wides: list[Tensor], narrows: list[Tensor], rows: int) -> None:
    """Give each row to a program, and process by chunks the rows whose results are not finite there."""
    from opdtheory.kernels.programs.launch import run_program

    (student, teacher, *grad), (found, *weight) = wides, narrows
    captured = student.is_cuda and torch.cuda.is_current_stream_capturing()
    state, left = run_program(
        evaluator.divergence,
        student,
        teacher,
        evaluator.scale,
        weight[0] if weight else None,
        found,
        grad[0] if grad else None,
        fill=math.nan if captured else None,
    )
    # The one time that the host waits; in a graph of the device's it cannot.
    if not captured and any_left(state):
        check_weights(weight[0] if weight else None)
        some, few = [each[left] for each in wides], [each[left] for each in narrows]
        _by_chunks(_Chunks(evaluator, spare=False), some, few, rows)
        found[left] = few[0]
        for whole, part in zip(grad, some[2:], strict=True):
            whole[left] = part


def _by_chunks(chunks: _Chunks, wides: list[Tensor], narrows: list[Tensor], rows: int) -> None:
    found, *weight = narrows
    for part, weighed in runs(weight[0] if weight else None, found.shape[0], rows):
        ours, theirs, *grad = (each[part] for each in wides)
        if weighed:
            factor = weight[0][part].double().unsqueeze(-1) if weight else 1.0
            found[part] = chunks(ours, theirs, factor, grad[0] if grad else None).squeeze(-1)  # type: ignore[union-attr]
        else:
            found[part] = 0.0
            for each in grad:
                each.zero_()


def _singly(chunks: _Chunks, wides: list[Tensor], found: Tensor, weights: list[float] | None) -> None:
    """Process row by row, with plain numbers for numbers per row."""
    values = []
    for row, (ours, theirs, *grad) in enumerate(zip(*(each.unbind() for each in wides), strict=True)):
        factor = weights[row] if weights else 1.0
        if factor:
            values.append(chunks(ours, theirs, factor, grad[0] if grad else None))
        else:
            values.append(0.0)
            for each in grad:
                each.zero_()
    found.copy_(torch.tensor(values, dtype=found.dtype))


class _Chunks:
    """Evaluates one chunk after another in the same buffers."""

    def __init__(self, evaluator: Evaluator, spare: bool) -> None:
        self._evaluator, self._spare = evaluator, spare
        self._buffers: Buffers | None = None
        # What one chunk needs, its neighbours will need too.
        self._guarded = self._shifted = False

    def __call__(self, student: Tensor, teacher: Tensor, weight: Row, grad: Tensor | None) -> Row:
        """The values of the rows times their weights; the gradient goes into `grad`."""
        form = self._evaluator.form
        distributions, filled = self._filled(student, teacher, grad)
        if not _finite(filled) and form.guardable and not self._guarded:
            self._guarded = True
            distributions, filled = self._filled(student, teacher, grad)
        if not _finite(filled) and form is not self._evaluator.reference:
            distributions, filled = self._filled(*self._without_harmless(student, teacher), grad)
            if not _finite(filled):
                return _Chunks(self._evaluator.exact(), spare=False)(student, teacher, weight, grad)
        if grad is not None:
            finish(distributions, form, filled, weight, grad)
        return weight * filled.value / distributions.total

    def _filled(self, student: Tensor, teacher: Tensor, grad: Tensor | None) -> tuple[Distributions, Filled]:
        buffers = self._sized(student, grad if self._spare else None)
        form = self._evaluator.form
        distributions = distributions_of(
            student, teacher, self._evaluator.scale, buffers, self._guarded, self._shifted, form.by_log_ratio
        )
        self._shifted = distributions.peaks is not None
        filled = form.fill(distributions)
        if not _finite(filled):
            _refuse_unusable(distributions)
        return distributions, filled

    def _sized(self, like: Tensor, h: Tensor | None) -> Buffers:
        if self._buffers is None or self._buffers.p.shape[0] < like.shape[0]:
            self._buffers = Buffers.allocate(like.shape, self._evaluator.dtype, like.device, h)
        buffers = self._buffers.head(like.shape[0])
        return buffers if h is None else buffers._replace(h=h)

    def _without_harmless(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, made finite where a token that a distribution lacks has a finite cost.

        Such a token keeps a probability of exactly zero, with a log-ratio that can be multiplied by it.
        """
        absent, lacking = torch.isneginf(student), torch.isneginf(teacher)
        both, divergence = absent & lacking, self._evaluator.divergence
        absent = absent if math.isfinite(divergence.slope_at_infinity) else both
        lacking = lacking if math.isfinite(divergence.at_zero) else both
        return student.masked_fill(absent, _lowest(student)), teacher.masked_fill(lacking, _lowest(teacher))


def _lowest(like: Tensor) -> float:
    """A logit whose exponential is zero and whose multiples are finite."""
    return max(torch.finfo(like.dtype).min, -1e30)


def finish(distributions: Distributions, form: Form, filled: Filled, weight: Row, out: Tensor) -> None:
    """Write the gradient of a chunk from the results of its form; the mean may be that of a larger vocabulary."""
    p, h = distributions.p, filled.h
    factor, mean = weight * form.factor * distributions.scale / distributions.total, filled.mean / distributions.total
    target = out if out.dtype == p.dtype else h
    if form.kind == "weight":
        torch.mul(affine(h, -factor, factor * mean), p, out=target)
    elif isinstance(factor, float):
        torch.add(p.mul_(factor * mean), h, alpha=-factor, out=target)
    else:
        torch.mul(p.mul_(narrow(mean, p)).sub_(h), narrow(factor, p), out=target)
    if target is not out:
        out.copy_(target)


def _finite(filled: Filled) -> bool:
    """Whether every result is finite: one number tells, as every NaN and infinity would have entered a sum."""
    row = filled.value + filled.mean
    return math.isfinite(row if isinstance(row, float) else float(row.sum()))


def _refuse_unusable(distributions: Distributions) -> None:
    for name, logits in (("student_logits", distributions.student), ("teacher_logits", distributions.teacher)):
        unusable = ~torch.isfinite(logits.amax(-1))
        if bool(unusable.any()):
            raise InvalidArgumentError(
                name,
                f"must be finite or -inf, and not all -inf; {int(unusable.sum())} of {unusable.numel()} rows are not",
            )


def runs(weights: Tensor | None, count: int, rows: int) -> Iterator[tuple[slice, bool]]:
    """Runs of consecutive positions whose weights are all zero, or at most `rows` whose weights are all non-zero."""
    flags = [True] * count if weights is None else (weights != 0).tolist()
    start = 0
    while start < count:
        stop = start + 1
        while stop < count and flags[stop] == flags[start] and (stop - start < rows or not flags[start]):
            stop += 1
        yield slice(start, stop), flags[start]
        start = stop
