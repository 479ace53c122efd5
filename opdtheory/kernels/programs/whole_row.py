r"""A whole row of logits in one program, block by block: for rows that no group of programs can hold.

A program reads its row three times and writes once: normalisers, then value and mean weight, then the gradient. For the
KLs it reads twice, as the first pass finds the means of the log-ratio too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opdtheory.kernels.programs.elementary import (
    apart,
    bounded,
    cross_slope,
    cross_terms,
    cross_value,
    gap,
    in_bits,
    loaded,
    powers,
    reference,
    rounded,
    terms_in_units,
    together,
    units,
)

__all__ = ["whole_row_program"]

_INF = tl.constexpr(float("inf"))


@triton.jit
def _block(
    student,
    teacher,
    student_word,
    teacher_word,
    start,
    words,
    scale,
    factor,
    top,
    other_top,
    whole,
    teacher_unit,
    BLOCK: tl.constexpr,
):
    """The logits of a block, its probabilities times the student's total, and the gaps of its logits."""
    ours = loaded(student, student_word, start, words, BLOCK).to(tl.float32)
    theirs = loaded(teacher, teacher_word, start, words, BLOCK).to(tl.float32)
    p = powers(ours, factor, top)
    q = powers(theirs, factor, other_top) * teacher_unit
    return ours, theirs, p, q, gap(ours, theirs, whole)


@triton.jit
def whole_row_program(
    student,
    teacher,
    gradient,
    weights,
    values,
    left,
    state,
    student_row,
    student_word,
    teacher_row,
    teacher_word,
    gradient_row,
    gradient_word,
    words,
    empty,
    scale,
    a,
    b,
    at_zero,
    slope_at_infinity,
    KIND: tl.constexpr,
    CROSS: tl.constexpr,
    COARSE: tl.constexpr,
    WEIGHED: tl.constexpr,
    WANTED: tl.constexpr,
    FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row: `left` says whether it is left to do, and the first state is 1 if any is."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    gradient += row * gradient_row
    every = tl.arange(0, BLOCK).to(tl.int64)
    weight = tl.full((), 1.0, tl.float64)
    if WEIGHED:
        weight = tl.load(weights + row).to(tl.float64)
    if weight == 0.0:
        tl.store(values + row, weight)
        tl.store(left + row, False)
        if WANTED:
            for start in range(0, words, BLOCK):
                at = start + every
                tl.store(gradient + at * gradient_word, tl.zeros((BLOCK,), tl.float32), mask=at < words)
    else:
        factor = in_bits(scale)
        top = reference(student, student_word, words, factor, BLOCK)
        other_top = reference(teacher, teacher_word, words, factor, BLOCK)
        distance = apart(top, other_top)
        whole = together(distance, scale)
        sums = tl.zeros((BLOCK,), tl.float32)
        other_sums = tl.zeros((BLOCK,), tl.float32)
        lowest = tl.zeros((BLOCK,), tl.float32)
        firsts = tl.zeros((BLOCK,), tl.float32)
        seconds = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, words, BLOCK):
            ours, theirs, p, q, d = _block(
                student, teacher, student_word, teacher_word, start, words, scale, factor, top, other_top, whole, 1.0,
                BLOCK,
            )  # fmt: skip
            sums += p
            other_sums += q
            if CROSS:
                # T10: a token that the distribution of a mean lacks counts nothing.
                under_student, under_teacher = cross_terms(p, q, d, KIND)
                firsts += tl.where(d < _INF, under_student, 0.0)
                seconds += tl.where(d > -_INF, under_teacher, 0.0)
            else:
                lowest = tl.minimum(lowest, tl.minimum(ours, theirs))
        total = tl.sum(sums.to(tl.float64), 0)
        other_total = tl.sum(other_sums.to(tl.float64), 0)
        inverse = 1.0 / total
        ratio = total / other_total
        quotient = rounded(ratio)
        constant = distance - whole.to(tl.float64) * scale + tl.log(ratio)
        mass_unit = 1.0
        # fmt: off
        (
            step, shift, teacher_unit, first_unit, second_unit, own_unit,
            value_at_zero, mass_at_zero, slope_end,
        ) = units(a, b, scale, constant, quotient, at_zero, slope_at_infinity, KIND)
        # fmt: on
        holes = tl.min(lowest, 0) == -_INF
        if CROSS:
            mean = tl.sum(firsts.to(tl.float64), 0) * inverse
            other_mean = tl.sum(seconds.to(tl.float64), 0) / other_total
            value = cross_value(mean * scale, other_mean * scale, constant, KIND)
            if KIND == "jeffreys":
                mean *= scale
            if KIND == "reverse_kl":
                mass_unit = scale
        else:
            for start in range(0, words, BLOCK):
                ours, theirs, p, q, d = _block(
                    student, teacher, student_word, teacher_word, start, words, scale, factor, top, other_top, whole,
                    teacher_unit, BLOCK,
                )  # fmt: skip
                value_part, mass = terms_in_units(p, q, tl.fma(d, step, shift), a, b, KIND, COARSE)
                if holes:
                    value_part, mass = bounded(
                        value_part, mass, p, q, ours, theirs, value_at_zero, mass_at_zero, slope_end
                    )
                firsts += value_part
                seconds += mass
            first = tl.sum(firsts.to(tl.float64), 0)
            second = tl.sum(seconds.to(tl.float64), 0)
            value = (first * first_unit + second * second_unit) * inverse
            mean = second * inverse
            mass_unit = own_unit
        # Every NaN and infinity has entered a sum. A distribution without tokens has no total.
        finite = (tl.abs(value) + tl.abs(mean) + tl.abs(weight) < _INF) & (total > 0.0) & (other_total > 0.0)
        tl.store(left + row, finite == 0)
        if finite:
            tl.store(values + row, weight * value)
        else:
            tl.store(state, 1)
            if FILLED:
                tl.store(values + row, empty)
        if WANTED:
            slope_factor, centre = (-weight * scale * mass_unit * inverse).to(tl.float32), mean.to(tl.float32)
            if finite:
                for start in range(0, words, BLOCK):
                    ours, theirs, p, q, d = _block(
                        student, teacher, student_word, teacher_word, start, words, scale, factor, top, other_top,
                        whole, teacher_unit, BLOCK,
                    )  # fmt: skip
                    if CROSS:
                        if KIND == "jeffreys":
                            d = d * scale
                        slope = tl.where(d < _INF, cross_slope(p, q, d, centre, KIND), 0.0)
                    else:
                        value_part, mass = terms_in_units(p, q, tl.fma(d, step, shift), a, b, KIND, COARSE)
                        if holes:
                            value_part, mass = bounded(
                                value_part, mass, p, q, ours, theirs, value_at_zero, mass_at_zero, slope_end
                            )
                        slope = tl.fma(p, -centre, mass)
                    at = start + every
                    tl.store(gradient + at * gradient_word, slope * slope_factor, mask=at < words)
            elif FILLED:
                for start in range(0, words, BLOCK):
                    at = start + every
                    tl.store(gradient + at * gradient_word, tl.zeros((BLOCK,), tl.float32) + empty, mask=at < words)
