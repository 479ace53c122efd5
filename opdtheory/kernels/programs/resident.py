r"""A row of logits held in registers by a group of programs, read once and written once.

Each member of a group holds a block of the row. What it finds of its block, sums, it publishes to the others: each sum
in a word of 64 bits together with the number of the exchange, so that a word that has arrived says so itself. Members
add the words in the same order, so that all know the same totals, on every run. The words of two successive exchanges
have separate places: who publishes the exchange after the next has seen all words of the next, whose senders had read
those of this one.

A member waits only for members of its own group. Programs join groups in the order in which they start, so that at most
one group of a launch is incomplete, whatever else runs on the GPU, and the others finish. An incomplete one holds less
than an eighth of what the GPU runs at once (`launch.group_of`): up to eight launches cannot block each other. Should a
member never come all the same, the others give up, and the call raises an error.
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

__all__ = ["COLUMNS", "PEEK", "resident_program"]

# Sums that an exchange has at most, and tokens that a reference logit is sought among.
COLUMNS, PEEK = 4, 1024
_COLUMNS, _PEEK = tl.constexpr(COLUMNS), tl.constexpr(PEEK)
# Times that a member asks for a sum before it gives up: about half a minute.
_PATIENCE = tl.constexpr(2**25)
_INF = tl.constexpr(float("inf"))
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _sent(words, number, value):
    """Publish a number in float32, with that of the exchange."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & _LOW
    tl.atomic_xchg(words, (number.to(tl.int64) << 32) | bits, sem="relaxed")


@triton.jit
def _received(words, number, members, state, patience, SLOTS: tl.constexpr):
    """The sum of what all members publish, in float64, as soon as it is there; and a zero that comes with it.

    Who has asked in vain as often as it has patience says so in the state, and takes NaN.
    """
    at = tl.arange(0, SLOTS)
    mine = number.to(tl.int64) << 32
    found = tl.load(words + at, mask=at < members, other=mine, volatile=True)
    least = tl.min((found >> 32).to(tl.int32), 0)
    asked = 0
    while (least < number) & (asked < patience):
        found = tl.load(words + at, mask=at < members, other=mine, volatile=True)
        least = tl.min((found >> 32).to(tl.int32), 0)
        asked += 1
    values = (found & _LOW).to(tl.int32).to(tl.float32, bitcast=True)
    total = tl.sum(values.to(tl.float64), 0)
    if least < number:
        tl.atomic_or(state, 2, sem="relaxed")
        total += float("nan")
        # It has come in vain for this row, and asks once for each of the others.
        patience = 0
    return total, (least - number).to(tl.float32), patience


@triton.jit
def _taken(
    student,
    teacher,
    row,
    student_row,
    student_word,
    teacher_row,
    teacher_word,
    start,
    words,
    factor,
    BLOCK: tl.constexpr,
):
    """A block of a row of both logits, and the row's references."""
    line = row.to(tl.int64)
    student += line * student_row
    teacher += line * teacher_row
    return (
        loaded(student, student_word, start, words, BLOCK),
        loaded(teacher, teacher_word, start, words, BLOCK),
        reference(student, student_word, words, factor, _PEEK),
        reference(teacher, teacher_word, words, factor, _PEEK),
    )


@triton.jit
def _wanted(
    row,
    rows,
    groups,
    weights,
    values,
    left,
    gradient,
    gradient_row,
    gradient_word,
    gradient_rest,
    at,
    words,
    member,
    WEIGHED: tl.constexpr,
    WANTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The next row of the group that has a weight, from this one on, and its weight; zeros for those before it."""
    weight = tl.full((), 1.0, tl.float64)
    if WEIGHED:
        weight = tl.load(weights + row, mask=row < rows, other=1.0).to(tl.float64)
        while weight == 0.0:
            line = row.to(tl.int64)
            if member == 0:
                tl.store(values + line, weight)
                tl.store(left + line, False)
            if WANTED:
                slopes = gradient + line * gradient_row + at * gradient_word
                tl.store(slopes, tl.zeros((BLOCK,), tl.float32), mask=at < words)
                if SPLIT:
                    tl.store(slopes + gradient_rest, tl.zeros((BLOCK,), tl.float32), mask=at < words)
            row += groups
            weight = tl.load(weights + row, mask=row < rows, other=1.0).to(tl.float64)
    return row, weight


@triton.jit
def resident_program(
    student,
    teacher,
    gradient,
    weights,
    values,
    left,
    state,
    boards,
    student_row,
    student_word,
    teacher_row,
    teacher_word,
    gradient_row,
    gradient_word,
    gradient_rest,
    rows,
    words,
    empty,
    scale,
    a,
    b,
    at_zero,
    slope_at_infinity,
    members,
    groups,
    KIND: tl.constexpr,
    CROSS: tl.constexpr,
    NARROW: tl.constexpr,
    COARSE: tl.constexpr,
    WEIGHED: tl.constexpr,
    WANTED: tl.constexpr,
    SPLIT: tl.constexpr,
    FILLED: tl.constexpr,
    ALONE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of a group, one after another: `left` says which rows are left to do.

    The first state is 1 if any row is, and 2 more if members of a group have not met.
    """
    if ALONE:
        group = tl.program_id(0)
        member = 0
    else:
        ticket = tl.atomic_add(state + 1, 1, sem="relaxed")
        group = ticket // members
        member = ticket % members
    start = member * BLOCK
    at = start + tl.arange(0, BLOCK).to(tl.int64)
    inside = at < words
    boards += group.to(tl.int64) * (2 * _COLUMNS * SLOTS)
    factor = in_bits(scale)
    number = 0
    patience = tl.full((), _PATIENCE, tl.int32)
    # fmt: off
    row, weight = _wanted(
        group, rows, groups, weights, values, left, gradient, gradient_row, gradient_word, gradient_rest,
        at, words, member, WEIGHED, WANTED, SPLIT, BLOCK,
    )
    # fmt: on
    if NARROW:
        # The next row is read while this one waits for its sums; wider logits would not find room.
        some = tl.where(row < rows, words, 0)
        # fmt: off
        held, other_held, top, other_top = _taken(
            student, teacher, row, student_row, student_word, teacher_row, teacher_word,
            start, some, factor, BLOCK,
        )
        # fmt: on
    while row < rows:
        line = row.to(tl.int64)
        # fmt: off
        after, weight_after = _wanted(
            row + groups, rows, groups, weights, values, left, gradient, gradient_row, gradient_word, gradient_rest,
            at, words, member, WEIGHED, WANTED, SPLIT, BLOCK,
        )
        # fmt: on
        some = tl.where(after < rows, words, 0)
        slopes = gradient + line * gradient_row + at * gradient_word
        if not NARROW:
            # fmt: off
            held, other_held, top, other_top = _taken(
                student, teacher, row, student_row, student_word, teacher_row, teacher_word,
                start, words, factor, BLOCK,
            )
            # fmt: on
        ours = held.to(tl.float32)
        theirs = other_held.to(tl.float32)
        its_top = other_top
        distance = apart(top, other_top)
        whole = together(distance, scale)
        p = powers(ours, factor, top)
        q = powers(theirs, factor, other_top)
        d = gap(ours, theirs, whole)
        zero = 0.0
        total = tl.sum(p, 0)
        other_total = tl.sum(q, 0)
        holes = False
        if CROSS:
            under_student, under_teacher = cross_terms(p, q, d, KIND)
            first = tl.sum(under_student, 0)
            second = tl.sum(under_teacher, 0)
            holes = (tl.abs(first) + tl.abs(second) < _INF) == 0
            if holes:
                # T10: a token that the distribution of the mean lacks counts nothing.
                first = tl.sum(tl.where(d < _INF, under_student, 0.0), 0)
                second = tl.sum(tl.where(d > -_INF, under_teacher, 0.0), 0)
            if NARROW:
                # fmt: off
                held, other_held, top, other_top = _taken(
                    student, teacher, after, student_row, student_word, teacher_row, teacher_word,
                    start, some, factor, BLOCK,
                )
                # fmt: on
        if ALONE:
            total = total.to(tl.float64)
            other_total = other_total.to(tl.float64)
            if CROSS:
                first = first.to(tl.float64)
                second = second.to(tl.float64)
        else:
            number += 1
            board = boards + (number & 1) * (_COLUMNS * SLOTS)
            _sent(board + member, number, total)
            _sent(board + SLOTS + member, number, other_total)
            if CROSS:
                if KIND != "forward_kl":
                    _sent(board + 2 * SLOTS + member, number, first)
                    first, zero, patience = _received(board + 2 * SLOTS, number, members, state, patience, SLOTS)
                if KIND != "reverse_kl":
                    _sent(board + 3 * SLOTS + member, number, second)
                    second, zero, patience = _received(board + 3 * SLOTS, number, members, state, patience, SLOTS)
            total, zero, patience = _received(board, number, members, state, patience, SLOTS)
            other_total, zero, patience = _received(board + SLOTS, number, members, state, patience, SLOTS)
        inverse = 1.0 / total
        ratio = total / other_total
        quotient = rounded(ratio)
        constant = distance - whole.to(tl.float64) * scale + tl.log(ratio)
        if NARROW:
            # By a zero that nobody knows before, so that numbers are computed again rather than kept.
            q = powers(theirs, factor, its_top + zero)
        mass_unit = 1.0
        if CROSS:
            mean = first.to(tl.float64) * inverse
            value = cross_value(mean * scale, second.to(tl.float64) / other_total * scale, constant, KIND)
            if KIND == "jeffreys":
                slope = cross_slope(p, q * quotient, d * scale, (mean * scale).to(tl.float32), KIND)
            else:
                slope = cross_slope(p, q * quotient, d, mean.to(tl.float32), KIND)
            if KIND == "reverse_kl":
                mass_unit = scale
            if holes:
                slope = tl.where(d < _INF, slope, 0.0)
        else:
            # fmt: off
            (
                step, shift, teacher_unit, first_unit, second_unit, mass_unit,
                value_at_zero, mass_at_zero, slope_end,
            ) = units(a, b, scale, constant, quotient, at_zero, slope_at_infinity, KIND)
            # fmt: on
            q = q * teacher_unit
            value_part, mass = terms_in_units(p, q, tl.fma(d, step, shift), a, b, KIND, COARSE)
            first = tl.sum(value_part, 0)
            second = tl.sum(mass, 0)
            holes = (tl.abs(first) + tl.abs(second) < _INF) == 0
            if holes:
                # Read again, so that the logits need not be held for this.
                ours = loaded(student + line * student_row, student_word, start, words, BLOCK).to(tl.float32)
                theirs = loaded(teacher + line * teacher_row, teacher_word, start, words, BLOCK).to(tl.float32)
                q = powers(theirs, factor, its_top) * teacher_unit
                value_part, mass = terms_in_units(
                    p, q, tl.fma(gap(ours, theirs, whole), step, shift), a, b, KIND, COARSE
                )
                value_part, mass = bounded(value_part, mass, p, q, ours, theirs, value_at_zero, mass_at_zero, slope_end)
                first = tl.sum(value_part, 0)
                second = tl.sum(mass, 0)
            if NARROW:
                # fmt: off
                held, other_held, top, other_top = _taken(
                    student, teacher, after, student_row, student_word, teacher_row, teacher_word,
                    start, some, factor, BLOCK,
                )
                # fmt: on
            if ALONE:
                first = first.to(tl.float64)
                second = second.to(tl.float64)
            else:
                number += 1
                board = boards + (number & 1) * (_COLUMNS * SLOTS)
                _sent(board + member, number, first)
                _sent(board + SLOTS + member, number, second)
                first, zero, patience = _received(board, number, members, state, patience, SLOTS)
                second, zero, patience = _received(board + SLOTS, number, members, state, patience, SLOTS)
            value = (first * first_unit + second * second_unit) * inverse
            mean = second * inverse
            slope = tl.fma(p, -mean.to(tl.float32), mass)
        # Every NaN and infinity has entered a sum. A distribution without tokens has no total.
        finite = (tl.abs(value) + tl.abs(mean) + tl.abs(weight) < _INF) & (total > 0.0) & (other_total > 0.0)
        if member == 0:
            tl.store(left + line, finite == 0)
            if finite:
                tl.store(values + line, weight * value)
            else:
                tl.atomic_or(state, 1, sem="relaxed")
                if FILLED:
                    tl.store(values + line, empty)
        if WANTED:
            slope = slope * (-weight * scale * mass_unit * inverse).to(tl.float32)
            if finite:
                if SPLIT:
                    high = slope.to(tl.bfloat16)
                    tl.store(slopes, high, mask=inside)
                    tl.store(slopes + gradient_rest, slope - high.to(tl.float32), mask=inside)
                else:
                    tl.store(slopes, slope, mask=inside)
            elif FILLED:
                tl.store(slopes, tl.zeros((BLOCK,), tl.float32) + empty, mask=inside)
                if SPLIT:
                    tl.store(slopes + gradient_rest, tl.zeros((BLOCK,), tl.float32) + empty, mask=inside)
        row = after
        weight = weight_after
