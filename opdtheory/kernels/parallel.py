r"""The divergence from logits whose vocabulary is split over the ranks of a process group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import arguments
from opdtheory.kernels.attached import attached, outside_graphs
from opdtheory.kernels.distributions import Buffers, Distributions, default_rows, distributions_within, scaled_exp
from opdtheory.kernels.forms import Filled
from opdtheory.kernels.pieces import matrices
from opdtheory.kernels.sweep import Evaluator, finish, runs

__all__ = ["fused_parallel_divergence"]


@outside_graphs
def fused_parallel_divergence(
    student_logits: Float[Tensor, "*batch V_local"],
    teacher_logits: Float[Tensor, "*batch V_local"],
    divergence: str | Divergence,
    group: dist.ProcessGroup | None = None,
    mask: Shaped[Tensor, "*batch"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""`fused_divergence` of logits whose vocabulary is split over the ranks of a group.

    $$\ell_n = m_n \sum_{\text{ranks}} \sum_{a \in V_{\text{rank}}} p_n(a)\, f\!\left(\frac{q_n(a)}{p_n(a)}\right)$$

    There are three all-reduces of two numbers per position: the maxima, the sums of exponentials, and the value with
    the mean weight (T1), each a sum over the vocabulary; the last is repeated where terms are infinite or overflow. On
    GPUs with programs, the KLs and their sum need two all-reduces, the second of four numbers per position; all ranks
    must have programs, or none.
    Logits are never gathered. Each rank gets the same values and the gradient of its own part; all must call the
    function together, with the same mask, and pass the same upstream gradient. The parts may differ in size, but
    student and teacher must be split alike. Accuracy, `-inf`, `mask` and dtypes are as in `fused_divergence`; first
    derivatives only.

    Args:
        student_logits: this rank's part of $z$, with any leading shape.
        teacher_logits: this rank's part of the teacher's logits.
        divergence: an object or a catalogue name.
        group: the ranks that share the vocabulary (default: the default group).
        mask: a weight for each position.
        temperature: divides both logits.
        chunk_size: the number of positions at a time.

    Returns:
        $\ell$, float64 if any logits are, else float32; nats.

    Raises:
        InvalidArgumentError: a shape, dtype or number does not fit, there is no process group, or a row holds NaN, +inf
            or, over all ranks, only `-inf`; the last is raised on every rank.

    References: T1 and T12 of the theory.

    Example:
        >>> fused_parallel_divergence(student_part, teacher_part, "jsd").sum().backward()  # doctest: +SKIP
    """
    arguments.check_logits("student_logits", student_logits)
    arguments.check_logits("teacher_logits", teacher_logits)
    arguments.check_matching("teacher_logits", teacher_logits, "student_logits", student_logits)
    dtype, weights = arguments.shared(student_logits, mask, temperature, chunk_size, student_logits, teacher_logits)
    if not (dist.is_available() and dist.is_initialized()):
        raise InvalidArgumentError(
            "group", "must be a process group, got none; call torch.distributed.init_process_group"
        )
    scale, wanted = 1.0 / temperature, student_logits.requires_grad and torch.is_grad_enabled()
    evaluator = Evaluator.of(as_divergence(divergence), dtype, scale)
    # As on all ranks, whatever the size of their parts.
    programs = evaluator.has_programs(student_logits.device)
    kind = _Programs if programs and student_logits.shape[:-1].numel() else _Part
    if kind is _Part:
        # The programs look at weights themselves.
        arguments.check_weights(weights)
    with torch.no_grad():
        part = kind(evaluator, student_logits, teacher_logits, weights, group, chunk_size)
        values, gradient = part.evaluated(wanted)
    return attached("fused_parallel_divergence", student_logits, values.to(dtype), gradient)


class _Part:
    """This rank's logits, with the normalisers of all ranks."""

    def __init__(
        self,
        evaluator: Evaluator,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor | None,
        group: dist.ProcessGroup | None,
        chunk: int | None,
    ) -> None:
        self._evaluator, self._student, self._teacher, self._group = evaluator, student, teacher, group
        self._scale = evaluator.scale
        self._rows = chunk or default_rows(student.shape[-1], student.device)
        batch = student.shape[:-1]
        self._weights = student.new_ones(batch, dtype=torch.float64) if weights is None else weights.double()
        self._normalise()

    def _normalise(self) -> None:
        """Find the peaks of the scaled logits and the sums of exponentials less them, of all ranks, `(2, ...)` each."""
        student, teacher = self._student, self._teacher
        peaks = torch.stack([student.amax(-1).double(), teacher.amax(-1).double()])
        # The maximum over ranks is undefined for NaN, but keeps an infinity.
        self._peaks = self._reduced(torch.where(torch.isnan(peaks), math.inf, peaks), dist.ReduceOp.MAX)
        self._refuse_unusable()
        self._peaks = self._scale * self._peaks
        self._totals = self._reduced(self._exponentials(arguments.sum_dtype(student, teacher)), dist.ReduceOp.SUM)

    def evaluated(self, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The values times the weights, and their gradient in this rank's logits if wanted."""
        evaluator = self._evaluator
        sums = self._sums(evaluator, self._weights)
        plans = [(evaluator, self._weights)]
        exact = ~torch.isfinite(sums.sum(0))
        if evaluator.form is not evaluator.reference and bool(exact.any()):
            # All ranks have the same sums, so they agree on another round.
            plans = [
                (evaluator, self._weights.masked_fill(exact, 0.0)),
                (evaluator.exact(), self._weights.masked_fill(~exact, 0.0)),
            ]
            sums = torch.where(exact, self._sums(*plans[1]), sums)
        values = torch.where(self._weights != 0, self._weights * sums[0], 0.0)
        if not wanted:
            return values, None
        gradient = torch.zeros_like(self._student, memory_format=torch.contiguous_format)
        for evaluator, weights in plans:
            self._write(evaluator, weights, sums[1], gradient)
        return values, gradient

    def _write(self, evaluator: Evaluator, weights: Tensor, means: Tensor, gradient: Tensor) -> None:
        """Fill in the gradient of the positions with a weight."""
        for distributions, grad, (weight, mean) in self._chunks(evaluator.dtype, weights, [weights, means], gradient):
            filled = evaluator.form.fill(distributions)
            whole = Filled(filled.h, filled.value, distributions.total * mean)
            finish(distributions, evaluator.form, whole, weight, grad)

    def _sums(self, evaluator: Evaluator, weights: Tensor) -> Tensor:
        """The value and the mean of each position over all ranks, `(2, ...)`."""
        sums = torch.zeros_like(self._totals)
        for distributions, _, (value, mean) in self._chunks(evaluator.dtype, weights, [sums[0], sums[1]]):
            filled = evaluator.form.fill(distributions)
            value.copy_(torch.as_tensor(filled.value / distributions.total))
            mean.copy_(torch.as_tensor(filled.mean / distributions.total))
        return self._reduced(sums, dist.ReduceOp.SUM)

    def _chunks(
        self, dtype: torch.dtype, weights: Tensor, columns: list[Tensor], gradient: Tensor | None = None
    ) -> Iterator[tuple[Distributions, Tensor, list[Tensor]]]:
        """The distributions of the positions with a weight, with their gradient and their part of each column."""
        buffers = Buffers.allocate((self._rows, self._student.shape[-1]), dtype, self._student.device)
        wide = [self._student, self._teacher, self._student if gradient is None else gradient]
        narrow = [weights, *self._peaks, *self._totals, *columns]
        for (student, teacher, grad), (weight, *numbers) in matrices(wide, narrow):
            for part, weighed in runs(weight, student.shape[0], self._rows):
                if weighed:
                    of_rows = [each[part].unsqueeze(-1) for each in numbers]
                    peaks, totals, rest = of_rows[:2], of_rows[2:4], of_rows[4:]
                    head = buffers.head(part.stop - part.start)
                    distributions = distributions_within(student[part], teacher[part], self._scale, head, peaks, totals)
                    yield distributions, grad[part], rest

    def _exponentials(self, dtype: torch.dtype) -> Tensor:
        """The sums of this rank's exponentials, less the maximum of all ranks, `(2, ...)`."""
        sums = torch.zeros_like(self._peaks)
        buffer = Buffers.allocate((self._rows, self._student.shape[-1]), dtype, self._student.device).p
        for logits, peak, total in zip((self._student, self._teacher), self._peaks, sums, strict=True):
            for (part,), (weight, high, sum_) in matrices([logits], [self._weights, peak, total]):
                for rows, weighed in runs(weight, part.shape[0], self._rows):
                    if weighed:
                        out = buffer[: rows.stop - rows.start]
                        scaled_exp(out, part[rows], self._scale, high[rows].unsqueeze(-1).to(dtype))
                        sum_[rows] = out.sum(-1).double()
        return sums

    def _reduced(self, numbers: Tensor, by: Any) -> Tensor:
        dist.all_reduce(numbers, op=by, group=self._group)
        return numbers

    def _refuse_unusable(self) -> None:
        for name, peaks in zip(("student_logits", "teacher_logits"), self._peaks, strict=True):
            bad = int((~torch.isfinite(peaks) & (self._weights != 0)).sum())
            if bad:
                raise InvalidArgumentError(
                    name, f"{bad} of {peaks.numel()} rows hold NaN or +inf on some rank, or only -inf on every rank"
                )


class _Programs(_Part):
    """The same by programs, which read this rank's logits three times, and twice for the KLs and their sum."""

    def _normalise(self) -> None:
        from opdtheory.kernels.programs.launch_parts import Part

        self._weights = self._weights.contiguous()
        self._part = Part(self._evaluator.divergence, self._student, self._teacher, self._weights, self._scale)
        self._logits = self._reduced(self._part.peaks(), dist.ReduceOp.MAX)
        self._row_sums = self._reduced(self._part.sums(self._logits), dist.ReduceOp.SUM)
        self._peaks, self._totals = self._scale * self._logits, self._row_sums[:2]

    def evaluated(self, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """As above; the host waits once, in the end, and again only if some positions need the exact form."""
        if self._part.crosses:
            value, mean = self._part.crossed(self._logits, self._row_sums)
        else:
            value, mean = self._reduced(self._part.terms(self._logits, self._row_sums), dist.ReduceOp.SUM)
        weighed = self._weights != 0
        exact = ~torch.isfinite(value + mean + self._weights) & weighed
        captured = self._student.is_cuda and torch.cuda.is_current_stream_capturing()
        gradient = None
        if wanted:
            gradient = torch.empty(self._student.shape, dtype=self._student.dtype, device=self._student.device)
            # In a graph of the device's nobody can wait, and what is left becomes NaN.
            weights = self._weights.masked_fill(exact, math.nan if captured else 0.0)
            self._part.write_slopes(self._logits, self._row_sums, mean, weights, gradient)
        if captured:
            value = value.masked_fill(exact, math.nan)
        elif bool(exact.any()):
            # All ranks have the same sums, so they agree on this.
            arguments.check_weights(self._weights)
            self._refuse_unusable()
            evaluator, weights = self._evaluator.exact(), self._weights.masked_fill(~exact, 0.0)
            sums = self._sums(evaluator, weights)
            value = torch.where(exact, sums[0], value)
            if gradient is not None:
                self._write(evaluator, weights, sums[1], gradient)
        return torch.where(weighed, self._weights * value, 0.0), gradient
