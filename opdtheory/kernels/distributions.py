r"""The distributions of student and teacher at a chunk of positions, in buffers that are used again for the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Buffers",
    "Distributions",
    "Row",
    "affine",
    "default_rows",
    "distributions_of",
    "distributions_within",
    "narrow",
    "row_dot",
    "row_sum",
    "scaled_exp",
    "wide_like",
]

Row: TypeAlias = "float | Tensor"
"""A number for each row of a chunk: `(R, 1)`, float64; for a single row `(V,)` a Python float, which is faster."""

# Elements of a buffer: on a CPU four buffers should fit in the cache, elsewhere launches count.
_CPU_ELEMENTS, _DEVICE_ELEMENTS = 2**18, 2**24
# Elements per thread of a row that is worth taking alone [measured], so that a number per row is a plain one.
_SINGLE = 2**14
# Bounds of sums of exponentials in float32: below, relevant tokens would underflow; above, products could overflow.
_LEAST, _MOST = 1e-10, 1e20
_FLOOR = 1e-25
_NEAR = 8.0  # nats between the normalisers of student and teacher


class Buffers(NamedTuple):
    """Four buffers for a chunk, `(R, V)` each, or for a single row, `(V,)`."""

    p: Tensor
    q: Tensor
    h: Tensor
    x: Tensor

    @classmethod
    def allocate(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, h: Tensor | None = None
    ) -> Buffers:
        """New buffers, not initialised, except for a given `h`."""
        p, q, x = (torch.empty(*shape, dtype=dtype, device=device) for _ in range(3))
        return cls(p, q, torch.empty_like(p) if h is None else h, x)

    def head(self, rows: int) -> Buffers:
        """The buffers for fewer rows."""
        return self if rows == self.p.shape[0] else Buffers(*(each[:rows] for each in self))


def default_rows(vocabulary: int, device: torch.device) -> int:
    """The default number of positions in a chunk."""
    if device.type != "cpu":
        return max(1, _DEVICE_ELEMENTS // vocabulary)
    return 1 if vocabulary >= _SINGLE * torch.get_num_threads() else max(1, _CPU_ELEMENTS // vocabulary)


@dataclass
class Distributions:
    r"""The probabilities of a chunk of positions, and what forms need to know about them.

    Attributes:
        buffers: `p` holds `total` times the student's probabilities, exactly zero where a logit is `-inf`; to normalise
            would take a pass, and values and masses are homogeneous. `q` holds the teacher's exponentials; `h` and `x`
            are free.
        student: the student's logits as given, in their own dtype.
        teacher: the teacher's logits as given.
        scale: the inverse temperature.
        peaks: the maxima subtracted from the scaled logits of student and teacher, `(R, 1)` each, or None.
        total: the sum of the student's exponentials.
        quotient: the factor that brings the teacher's exponentials to the same total, as rounded.
        guarded: whether a floor, far below rounding and far above underflow, keeps quotients from being 0/0.
        subtracted: whether `h` holds the difference of the logits, taken when they were first read.
    """

    buffers: Buffers
    student: Tensor
    teacher: Tensor
    scale: float
    peaks: tuple[Tensor, Tensor] | None
    total: Row
    quotient: Row
    guarded: bool = False
    subtracted: bool = False
    _pending: bool = True  # whether `buffers.q` has not been multiplied by the quotient yet

    @property
    def p(self) -> Tensor:
        """The student's probabilities, times the total."""
        return self.buffers.p

    @property
    def q(self) -> Tensor:
        """The teacher's probabilities, times the total."""
        if self._pending:
            self.buffers.q.mul_(narrow(self.quotient, self.buffers.q))
            self._pending = False
        return self.buffers.q

    def student_normaliser(self) -> Row:
        r"""The student's $\log \sum_a e^{z_a}$."""
        return self._peak(0) + _log(self.total)

    def teacher_normaliser(self) -> Row:
        r"""The teacher's normaliser, which matches `q` to the last digit of its factor."""
        return self._peak(1) + _log(self.total) - _log(self.quotient)

    def log_ratio(self) -> tuple[Tensor, Row]:
        r"""Write $\log u$ into `h`, and return what the rounding of the normalisers took from it.

        It comes from the difference of the logits, which is exact where student and teacher are close and finite where
        probabilities underflow. Logits that differ by a large constant are first brought together.
        """
        out = self.buffers.h
        shift = self._peak(0) - self._peak(1) + _log(self.quotient)
        if not (self.subtracted and _largest(shift) < _NEAR):
            shift = self._subtract(shift)
        self.subtracted = False
        rounded = narrow(shift, out)
        return out.add_(rounded), shift - wide_like(rounded, self.total)

    def _subtract(self, shift: Row) -> Row:
        """Write the difference of the logits into `h`, and return what remains to be added."""
        out, student, teacher = self.buffers.h, self.student, self.teacher
        if teacher.dtype != out.dtype or self.scale != 1.0:
            teacher = out.copy_(teacher).mul_(self.scale)
        if student.dtype != out.dtype or self.scale != 1.0:
            student = self.buffers.x.copy_(student).mul_(self.scale)
        if _largest(shift) < _NEAR:
            torch.sub(teacher, student, out=out)
            return shift
        # A NaN shift makes the value NaN, for which the row raises an error.
        whole = shift.round() if isinstance(shift, Tensor) else _rounded(shift)
        torch.add(teacher, narrow(whole, out), out=out).sub_(student)
        return shift - whole

    def excess(self) -> Tensor:
        """Write `q - p` into `x`."""
        return torch.sub(self.q, self.p, out=self.buffers.x)

    def student_divisor(self) -> Tensor:
        """The student's probabilities, guarded if necessary, which uses `x`."""
        return self.guard(self.buffers.x.copy_(self.p)) if self.guarded else self.p

    def guard(self, divisor: Tensor) -> Tensor:
        """Lift a divisor above zero in place, if necessary."""
        return divisor.add_(narrow(_FLOOR * self.total, divisor)) if self.guarded else divisor

    def teacher_over(self, divisor: Tensor) -> Tensor:
        """Write `q` over the divisor into `h`, kept above zero, without computing `q`."""
        floor, out = narrow(_FLOOR, divisor), self.buffers.h
        if self._pending and isinstance(self.quotient, float):
            return torch.addcdiv(floor, self.buffers.q, divisor, value=self.quotient, out=out)
        return torch.addcdiv(floor, self.q, divisor, out=out)

    def teacher_sum(self, terms: Tensor) -> Row:
        r"""The sums $\sum_a q_a x_a$ times the total, without computing `q`."""
        if self._pending and isinstance(self.quotient, float):
            return self.quotient * row_dot(self.buffers.q, terms)
        return row_dot(self.q, terms)

    def _peak(self, which: int) -> Row:
        return 0.0 if self.peaks is None else wide_like(self.peaks[which], self.total)


def distributions_of(
    student: Tensor,
    teacher: Tensor,
    scale: float,
    buffers: Buffers,
    guarded: bool = False,
    shifted: bool = False,
    by_log_ratio: bool = False,
) -> Distributions:
    """The distributions of a chunk of logits, `(R, V)` or `(V,)`.

    Exponentials of unshifted logits need neither the maximum nor its subtraction, which rounds. Where one of their sums
    is not well within range, or if `shifted`, the maximum is subtracted first. `by_log_ratio` announces that log-ratios
    will be needed.
    """
    # Once the exponentials are done, the logits have left the cache.
    subtracted = by_log_ratio and scale == 1.0 and student.dtype == teacher.dtype == buffers.h.dtype
    if subtracted:
        torch.sub(teacher, student, out=buffers.h)
    peaks = (_peak(student, scale, buffers.p), _peak(teacher, scale, buffers.q)) if shifted else None
    scaled_exp(buffers.p, student, scale, peaks[0] if peaks else None)
    scaled_exp(buffers.q, teacher, scale, peaks[1] if peaks else None)
    total, other = row_sum(buffers.p), row_sum(buffers.q)
    if not shifted and not (_in_range(total) and _in_range(other)):
        return distributions_of(student, teacher, scale, buffers, guarded, shifted=True, by_log_ratio=by_log_ratio)
    quotient = _quotient(total, other, buffers.q)
    return Distributions(buffers, student, teacher, scale, peaks, total, quotient, guarded, subtracted)


def _peak(logits: Tensor, scale: float, like: Tensor) -> Tensor:
    return scale * logits.amax(-1, keepdim=True).to(like.dtype)


def distributions_within(
    student: Tensor, teacher: Tensor, scale: float, buffers: Buffers, peaks: list[Tensor], totals: list[Tensor]
) -> Distributions:
    """The distributions on a part of the vocabulary, from the peaks and totals of all of it, `(R, 1)` each."""
    narrow_peaks = peaks[0].to(buffers.p.dtype), peaks[1].to(buffers.p.dtype)
    scaled_exp(buffers.p, student, scale, narrow_peaks[0])
    scaled_exp(buffers.q, teacher, scale, narrow_peaks[1])
    quotient = _quotient(totals[0], totals[1], buffers.q)
    return Distributions(buffers, student, teacher, scale, narrow_peaks, totals[0], quotient, guarded=True)


def scaled_exp(out: Tensor, logits: Tensor, scale: float, peak: Tensor | None = None) -> None:
    """Write the exponentials of scaled logits minus a peak `(R, 1)` into `out`."""
    source = logits
    if logits.dtype != out.dtype or scale != 1.0:
        source = out.copy_(logits)
        if scale != 1.0:
            out.mul_(scale)
    if peak is not None:
        source = torch.sub(source, peak, out=out)
    torch.exp(source, out=out)


def affine(buffer: Tensor, factor: Row, shift: Row) -> Tensor:
    """The buffer times a factor plus a shift, in place, and in one pass if the factor is a plain number."""
    if isinstance(factor, float):
        return torch.add(narrow(shift, buffer), buffer, alpha=factor, out=buffer)
    return buffer.mul_(narrow(factor, buffer)).add_(narrow(shift, buffer))


def narrow(row: Row, like: Tensor) -> Tensor:
    """A number per row in the dtype of a buffer."""
    if isinstance(row, float):
        return torch.scalar_tensor(row, dtype=like.dtype, device=like.device)
    return row.to(like.dtype)


def row_dot(a: Tensor, b: Tensor) -> Row:
    r"""The sum $\sum_a x_a y_a$ of each row."""
    return torch.dot(a, b).item() if a.ndim == 1 else (a * b).sum(-1, keepdim=True).double()


def row_sum(a: Tensor) -> Row:
    """The sum of each row."""
    return a.sum().item() if a.ndim == 1 else a.sum(-1, keepdim=True).double()


def _quotient(total: Row, other: Row, buffer: Tensor) -> Row:
    """The quotient in the dtype of the buffer; one where it is an ulp away, since products round unevenly there."""
    eps, row = torch.finfo(buffer.dtype).eps, total / other
    if isinstance(row, float):
        rounded = narrow(row, buffer).item()
        return rounded if abs(rounded - 1) > eps else 1.0
    rows = row.to(buffer.dtype)
    return torch.where((rows - 1).abs() > eps, rows, 1.0).double()


def _largest(row: Row) -> float:
    return abs(row) if isinstance(row, float) else float(row.abs().max())


def _in_range(row: Row) -> bool:
    if isinstance(row, float):
        return _LEAST < row < _MOST
    return bool(((row > _LEAST) & (row < _MOST)).all())


def wide_like(column: Tensor, like: Row) -> Row:
    """A column of numbers in the form of another number per row."""
    return column.item() if isinstance(like, float) else column.double()


def _rounded(number: float) -> float:
    return float(round(number)) if math.isfinite(number) else math.nan


def _log(row: Row) -> Row:
    if isinstance(row, float):
        # As in torch, where the logits were not usable.
        return math.log(row) if row > 0 else math.nan
    return row.log()
