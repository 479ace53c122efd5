r"""A part of each row of logits, where others hold the rest: what this part adds to the row's sums, and its gradient.

A part may be split over several programs, whose sums are added in their order. The first pass finds the largest logits
and sums relative to them, for the KLs those over the log-ratio too. For other divergences a second pass finds value and
mean weight, given the totals of all parts; and a last one the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opdtheory.kernels.programs.elementary import (
    bounded,
    cross_slope,
    cross_terms,
    gap,
    in_bits,
    loaded,
    terms,
    together,
)
from opdtheory.kernels.programs.few_tokens import below, raised, taken, weight_of

__all__ = ["COLUMNS", "NUMBERS", "part_slopes_program", "part_sums_program", "part_terms_program"]

# What the first pass finds of a part, and what the others are given of a row.
COLUMNS, NUMBERS = 8, 8
_COLUMNS, _NUMBERS = tl.constexpr(COLUMNS), tl.constexpr(NUMBERS)
_INF = tl.constexpr(float("inf"))
_LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _highest(top, total):
    """The largest logit as others may compare it: -inf without tokens, inf where there is NaN or inf."""
    top = tl.where(total < _INF, top.to(tl.float64), _INF)
    return tl.where(total == 0.0, -_INF, top)


@triton.jit
def _crossed(p, q, d, KIND: tl.constexpr):
    """The terms of both means; a token that the distribution of a mean lacks counts nothing (T10)."""
    under_student, under_teacher = cross_terms(p, q, d, KIND)
    return tl.where(d < _INF, under_student, 0.0), tl.where(d > -_INF, under_teacher, 0.0)


@triton.jit
def part_sums_program(
    student,
    teacher,
    weights,
    found,
    student_row,
    student_word,
    teacher_row,
    teacher_word,
    words,
    span,
    scale,
    KIND: tl.constexpr,
    CROSS: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of both logits the largest and the sum of exponentials relative to it; the cross sums; whether one is -inf."""
    row = tl.program_id(0).to(tl.int64)
    found += (row * tl.num_programs(1) + tl.program_id(1)) * _COLUMNS
    student += row * student_row
    teacher += row * teacher_row
    weight = weight_of(weights, row, WEIGHED)
    if weight == 0.0:
        # Finite numbers that nobody needs.
        columns = tl.arange(0, _COLUMNS)
        tl.store(found + columns, ((columns == 2) | (columns == 3)).to(tl.float64))
    else:
        factor = in_bits(scale)
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, words)
        whole = 0.0
        if CROSS:
            # Logits that differ by a large constant are brought together.
            ours = tl.max(taken(student, student_word, begin, end, BLOCK), 0).to(tl.float64)
            theirs = tl.max(taken(teacher, teacher_word, begin, end, BLOCK), 0).to(tl.float64)
            distance = (ours - theirs) * scale
            whole = together(tl.where(tl.abs(distance) < _INF, distance, 0.0), scale)
        top = tl.full((BLOCK,), _LEAST, tl.float32)
        other_top = tl.full((BLOCK,), _LEAST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        other_total = tl.zeros((BLOCK,), tl.float32)
        firsts = tl.zeros((BLOCK,), tl.float32)
        seconds = tl.zeros((BLOCK,), tl.float32)
        lowest = tl.zeros((BLOCK,), tl.float32)
        every = tl.arange(0, BLOCK)
        for start in range(begin, end, 2 * BLOCK):
            a = taken(student, student_word, start, end, BLOCK)
            b = taken(student, student_word, start + BLOCK, end, BLOCK)
            c = taken(teacher, teacher_word, start, end, BLOCK)
            d = taken(teacher, teacher_word, start + BLOCK, end, BLOCK)
            new = raised(top, a, b)
            other_new = raised(other_top, c, d)
            fade = below(top, new, factor)
            other_fade = below(other_top, other_new, factor)
            top = new
            other_top = other_new
            p = below(a, new, factor)
            next_p = below(b, new, factor)
            q = below(c, other_new, factor)
            next_q = below(d, other_new, factor)
            total = tl.fma(total, fade, p + next_p)
            other_total = tl.fma(other_total, other_fade, q + next_q)
            if CROSS:
                first, second = _crossed(p, q, gap(a, c, whole) * scale, KIND)
                next_first, next_second = _crossed(next_p, next_q, gap(b, d, whole) * scale, KIND)
                firsts = tl.fma(firsts, fade, first + next_first)
                seconds = tl.fma(seconds, other_fade, second + next_second)
            else:
                # Tokens beyond the end are absent too.
                lowest = tl.minimum(lowest, tl.where(start + every < end, tl.minimum(a, c), 0.0))
                lowest = tl.minimum(lowest, tl.where(start + BLOCK + every < end, tl.minimum(b, d), 0.0))
        highest = tl.max(top, 0)
        other_highest = tl.max(other_top, 0)
        fade = below(top, highest, factor)
        other_fade = below(other_top, other_highest, factor)
        sum_ = tl.sum((total * fade).to(tl.float64), 0)
        other_sum = tl.sum((other_total * other_fade).to(tl.float64), 0)
        tl.store(found, _highest(highest, sum_))
        tl.store(found + 1, _highest(other_highest, other_sum))
        tl.store(found + 2, sum_)
        tl.store(found + 3, other_sum)
        tl.store(found + 4, tl.sum((firsts * fade).to(tl.float64), 0))
        tl.store(found + 5, tl.sum((seconds * other_fade).to(tl.float64), 0))
        tl.store(found + 6, whole)
        tl.store(found + 7, tl.min(lowest, 0) == -_INF)


@triton.jit
def _probabilities(
    student, teacher, student_word, teacher_word, start, end, scale, factor, top, other_top, whole, quotient,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The logits of a block, its probabilities times the student's total, and the differences of its logits."""
    ours = loaded(student, student_word, start, end, BLOCK).to(tl.float32)
    theirs = loaded(teacher, teacher_word, start, end, BLOCK).to(tl.float32)
    p = below(ours, top, factor)
    q = below(theirs, other_top, factor) * quotient
    return ours, theirs, p, q, gap(ours, theirs, whole) * scale


@triton.jit
def part_terms_program(
    student,
    teacher,
    weights,
    found,
    numbers,
    results,
    student_row,
    student_word,
    teacher_row,
    teacher_word,
    words,
    span,
    scale,
    a,
    b,
    at_zero,
    slope_at_infinity,
    KIND: tl.constexpr,
    COARSE: tl.constexpr,
    WEIGHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of a part for value and mean weight, times the student's total."""
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    results += part * 2
    student += row * student_row
    teacher += row * teacher_row
    weight = weight_of(weights, row, WEIGHED)
    if weight == 0.0:
        tl.store(results, weight)
        tl.store(results + 1, weight)
    else:
        factor = in_bits(scale)
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, words)
        numbers += row * _NUMBERS
        top = tl.load(numbers)
        other_top = tl.load(numbers + 1)
        quotient = tl.load(numbers + 2)
        whole = tl.load(numbers + 3)
        shift = tl.load(numbers + 4)
        holes = tl.load(found + part * _COLUMNS + 7) != 0.0
        values = tl.zeros((BLOCK,), tl.float32)
        masses = tl.zeros((BLOCK,), tl.float32)
        for start in range(begin, end, BLOCK):
            ours, theirs, p, q, d = _probabilities(
                student, teacher, student_word, teacher_word, start, end, scale, factor, top, other_top, whole,
                quotient, BLOCK,
            )  # fmt: skip
            value, mass = terms(p, q, d + shift, a, b, KIND, COARSE)
            if holes:
                value, mass = bounded(value, mass, p, q, ours, theirs, at_zero, at_zero, slope_at_infinity)
            values += value
            masses += mass
        tl.store(results, tl.sum(values.to(tl.float64), 0))
        tl.store(results + 1, tl.sum(masses.to(tl.float64), 0))


@triton.jit
def part_slopes_program(
    student,
    teacher,
    gradient,
    found,
    numbers,
    student_row,
    student_word,
    teacher_row,
    teacher_word,
    gradient_row,
    gradient_word,
    words,
    span,
    scale,
    a,
    b,
    at_zero,
    slope_at_infinity,
    KIND: tl.constexpr,
    CROSS: tl.constexpr,
    COARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a part, zero without reading where its factor is."""
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    student += row * student_row
    teacher += row * teacher_row
    gradient += row * gradient_row
    numbers += row * _NUMBERS
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, words)
    every = tl.arange(0, BLOCK).to(tl.int64)
    slope_factor = tl.load(numbers + 5)
    if slope_factor == 0.0:
        for start in range(begin, end, BLOCK):
            at = start + every
            tl.store(gradient + at * gradient_word, tl.zeros((BLOCK,), tl.float32), mask=at < end)
    else:
        factor = in_bits(scale)
        top = tl.load(numbers)
        other_top = tl.load(numbers + 1)
        quotient = tl.load(numbers + 2)
        whole = tl.load(numbers + 3)
        shift = tl.load(numbers + 4)
        centre = tl.load(numbers + 6)
        holes = tl.load(found + part * _COLUMNS + 7) != 0.0
        for start in range(begin, end, BLOCK):
            ours, theirs, p, q, d = _probabilities(
                student, teacher, student_word, teacher_word, start, end, scale, factor, top, other_top, whole,
                quotient, BLOCK,
            )  # fmt: skip
            if CROSS:
                slope = tl.where(d < _INF, cross_slope(p, q, d, centre, KIND), 0.0)
            else:
                value, mass = terms(p, q, d + shift, a, b, KIND, COARSE)
                if holes:
                    value, mass = bounded(value, mass, p, q, ours, theirs, at_zero, at_zero, slope_at_infinity)
                slope = tl.fma(p, -centre, mass)
            at = start + every
            tl.store(gradient + at * gradient_word, slope * slope_factor, mask=at < end)
