"""The passes over a part of each row of logits, by programs."""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.kernels.pieces import matrices
from opdtheory.kernels.programs.launch import constants, program_of
from opdtheory.kernels.programs.launch_few import BLOCK, WARPS, split_of
from opdtheory.kernels.programs.parts import (
    COLUMNS,
    NUMBERS,
    part_slopes_program,
    part_sums_program,
    part_terms_program,
)

__all__ = ["Part"]

_NEAR, _EPS = 8.0, 2.0**-23  # as in the programs


class Part:
    """A part of the student's and the teacher's logits, and what is known of the whole rows.

    Args:
        divergence: the generator, which has a fast form.
        student: logits, `(..., V)`, of float32 or narrower.
        teacher: logits of the same shape.
        weights: `(...)`, float64, contiguous; of rows of weight zero nothing is read.
        scale: the inverse temperature.

    Attributes:
        crosses: whether the first pass finds all that the values need.
    """

    def __init__(self, divergence: Divergence, student: Tensor, teacher: Tensor, weights: Tensor, scale: float) -> None:
        self._divergence, self._program = divergence, program_of(divergence.label)
        self._student, self._teacher, self._weights, self._scale = student, teacher, weights, scale
        self._split = split_of(weights.numel(), student.shape[-1], student.device)
        self.crosses = constants(divergence.label, narrow=False)["CROSS"]
        shape = (*weights.shape, self._split.parts * COLUMNS)
        self._found = torch.empty(shape, dtype=torch.float64, device=student.device)
        for (ours, theirs, found), (weight,) in matrices([student, teacher, self._found], [weights]):
            part_sums_program[(ours.shape[0], self._split.parts)](
                ours, theirs, weight, found, *ours.stride(), *theirs.stride(), ours.shape[-1], self._split.span, scale,
                WEIGHED=True, **self._options("KIND", "CROSS"),
            )  # fmt: skip

    def peaks(self) -> Tensor:
        """The largest logits of student and teacher, `(2, ...)`; inf for a row with NaN or inf, -inf without tokens."""
        return self._columns(0, 2).amax(-2).movedim(-1, 0).contiguous()

    def sums(self, peaks: Tensor) -> Tensor:
        """The sums of exponentials relative to the peaks of all parts, and if it crosses those over the log-ratio.

        Returns:
            `(2, ...)`, or `(4, ...)` with the sums under student and teacher.
        """
        tops, sums = self._columns(0, 2), self._columns(2, 4)
        faded = torch.where(sums == 0, 0.0, torch.exp(self._scale * (tops - peaks.movedim(0, -1).unsqueeze(-2))))
        numbers = [sums * faded]
        if self.crosses:
            # From the constant that this part was brought together with to that of the whole row.
            moved = self._scale * (self._whole(peaks)[..., None, None] - self._columns(6, 7))
            numbers.append((self._columns(4, 6) + moved * sums) * faded)
        return torch.cat(numbers, -1).sum(-2).movedim(-1, 0).contiguous()

    def crossed(self, peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Value and mean of each row, from the sums of all parts."""
        total, other_total, first, second = sums
        mean, by_teacher, constant = first / total, second / other_total, self._constant(peaks, sums)
        if self._program.kind == "forward_kl":
            value = by_teacher + constant
        elif self._program.kind == "reverse_kl":
            value = -(mean + constant)
        else:
            value = by_teacher - mean
        # Rounding aside, none is negative.
        return torch.where(value < 0, 0.0, value), mean

    def terms(self, peaks: Tensor, sums: Tensor) -> Tensor:
        """What this part adds to value and mean, `(2, ...)`."""
        results = self._found.new_empty(*self._weights.shape, self._split.parts * 2)
        wide = [self._student, self._teacher, self._found, self._numbers(peaks, sums, None, None), results]
        for (ours, theirs, found, numbers, out), (weight,) in matrices(wide, [self._weights]):
            part_terms_program[(ours.shape[0], self._split.parts)](
                ours, theirs, weight, found, numbers, out, *ours.stride(), *theirs.stride(), ours.shape[-1],
                self._split.span, *self._parameters(), WEIGHED=True, **self._options("KIND", "COARSE"),
            )  # fmt: skip
        return results.unflatten(-1, (-1, 2)).sum(-2).movedim(-1, 0) / sums[0]

    def write_slopes(self, peaks: Tensor, sums: Tensor, mean: Tensor, weights: Tensor, gradient: Tensor) -> None:
        """Fill the gradient, contiguous, with zeros where a weight is zero."""
        wide = [self._student, self._teacher, gradient, self._found, self._numbers(peaks, sums, mean, weights)]
        for (ours, theirs, slopes, found, numbers), _ in matrices(wide, []):
            part_slopes_program[(ours.shape[0], self._split.parts)](
                ours, theirs, slopes, found, numbers, *ours.stride(), *theirs.stride(), *slopes.stride(),
                ours.shape[-1], self._split.span, *self._parameters(), **self._options("KIND", "CROSS", "COARSE"),
            )  # fmt: skip

    def _columns(self, start: int, stop: int) -> Tensor:
        return self._found.unflatten(-1, (-1, COLUMNS))[..., start:stop]

    def _whole(self, peaks: Tensor) -> Tensor:
        """The whole number that is added to the teacher's logits."""
        distance = self._scale * (peaks[0] - peaks[1])
        return torch.where(distance.abs() < _NEAR, 0.0, torch.floor(peaks[0] - peaks[1] + 0.5))

    def _constant(self, peaks: Tensor, sums: Tensor) -> Tensor:
        """What the log-ratio is above the difference of the logits."""
        return self._scale * (peaks[0] - peaks[1] - self._whole(peaks)) + torch.log(sums[0] / sums[1])

    def _numbers(self, peaks: Tensor, sums: Tensor, mean: Tensor | None, weights: Tensor | None) -> Tensor:
        """What the programs are given of each row, `(..., NUMBERS)`, float32."""
        zero = torch.zeros_like(sums[0])
        quotient = (sums[0] / sums[1]).float()
        # One where it is an ulp away, since products round unevenly there.
        quotient = torch.where((quotient - 1).abs() > _EPS, quotient, 1.0)
        factor = zero if weights is None else torch.where(weights == 0, 0.0, -weights * self._scale / sums[0])
        columns = [peaks[0], peaks[1], quotient, self._whole(peaks), self._constant(peaks, sums), factor]
        columns += [zero if mean is None else mean]
        columns += [zero] * (NUMBERS - len(columns))
        return torch.stack([each.float() for each in columns], -1)

    def _parameters(self) -> tuple[float, ...]:
        program = self._program
        return self._scale, program.parameter, 1.0 - program.parameter, program.at_zero, program.slope_at_infinity

    def _options(self, *names: str) -> dict[str, object]:
        """The constants of a program that has these."""
        here = self._student.device.type == "cpu"
        every = constants(self._divergence.label, self._student.itemsize == self._teacher.itemsize == 2, here)
        # Products and sums are fused only where the programs say so: at the teacher, q - p must be exactly zero.
        options = {} if here else {"enable_fp_fusion": False}
        return {name: every[name] for name in names} | {"BLOCK": BLOCK, "num_warps": WARPS} | options
