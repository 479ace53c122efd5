r"""A whole row of logits in one program, block by block: for rows that no group of programs can hold.

A program reads its row three times and writes once: normalisers, then value and mean weight, then the gradient. For the
KLs it reads twice, as the first pass finds the means of the log-ratio too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opdtheory.kernels.programs.elementary import (
    apart,
    boundary,
    cross_slope,
    cross_terms,
    cross_value,
    difference,
    in_bits,
    loaded,
    powers,
    reference,
    rounded,
    terms,
    together,
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
    quotient,
    BLOCK: tl.constexpr,
):
    """The logits of a block, its probabilities times the student's total, and the differences of its logits."""
    ours = loaded(student, student_word, start, words, BLOCK).to(tl.float32)
    theirs = loaded(teacher, teacher_word, start, words, BLOCK).to(tl.float32)
    p = powers(ours, factor, top)
    q = powers(theirs, factor, other_top) * quotient
    return ours, theirs, p, q, difference(ours, theirs, scale, whole)


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
    SPOILT: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
        shift = constant.to(tl.float32)
        holes = tl.min(lowest, 0) == -_INF
        if CROSS:
            mean = tl.sum(firsts.to(tl.float64), 0) * inverse
            value = cross_value(mean, tl.sum(seconds.to(tl.float64), 0) / other_total, constant, KIND)
        else:
            for start in range(0, words, BLOCK):
                ours, theirs, p, q, d = _block(
                    student, teacher, student_word, teacher_word, start, words, scale, factor, top, other_top, whole,
                    quotient, BLOCK,
                )  # fmt: skip
                value_terms, mass = terms(p, q, d + shift, a, b, KIND, COARSE)
                if holes:
                    value_terms, mass = boundary(value_terms, mass, p, q, ours, theirs, at_zero, slope_at_infinity)
                firsts += value_terms
                seconds += mass
            value = tl.sum(firsts.to(tl.float64), 0) * inverse
            mean = tl.sum(seconds.to(tl.float64), 0) * inverse
        # Every NaN and infinity has entered a sum. A distribution without tokens has no total.
        finite = (tl.abs(value) + tl.abs(mean) + tl.abs(weight) < _INF) & (total > 0.0) & (other_total > 0.0)
        tl.store(left + row, finite == 0)
        if finite:
            tl.store(values + row, weight * value)
        else:
            tl.store(state, 1)
            if SPOILT:
                tl.store(values + row, float("nan"))
        if WANTED:
            slope_factor, centre = (-weight * scale * inverse).to(tl.float32), mean.to(tl.float32)
            if finite:
                for start in range(0, words, BLOCK):
                    ours, theirs, p, q, d = _block(
                        student, teacher, student_word, teacher_word, start, words, scale, factor, top, other_top,
                        whole, quotient, BLOCK,
                    )  # fmt: skip
                    if CROSS:
                        slope = tl.where(d < _INF, cross_slope(p, q, d, centre, KIND), 0.0)
                    else:
                        value_terms, mass = terms(p, q, d + shift, a, b, KIND, COARSE)
                        if holes:
                            value_terms, mass = boundary(
                                value_terms, mass, p, q, ours, theirs, at_zero, slope_at_infinity
                            )
                        slope = tl.fma(p, -centre, mass)
                    at = start + every
                    tl.store(gradient + at * gradient_word, slope * slope_factor, mask=at < words)
            elif SPOILT:
                for start in range(0, words, BLOCK):
                    at = start + every
                    tl.store(
                        gradient + at * gradient_word, tl.full((BLOCK,), float("nan"), tl.float32), mask=at < words
                    )
