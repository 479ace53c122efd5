r"""A whole row of logits in one program of a GPU, in Triton, which this module needs.

Where the forms of `opdtheory.kernels.forms` make a dozen passes over buffers, a program reads its row three times and
writes once: normalisers, then value and mean, then the gradient

$$\frac{\partial D}{\partial z_a} = c\,(p_a \textstyle\sum_b h_b - h_a), \qquad h = p\,w_f(u)$$

with every term in the gauge $f'(1) = w(1) = 0$ (T3): the terms of a value are never negative, so that their sum keeps
its digits, and at the teacher the gradient is exactly zero. Rows whose result is not finite are left to the forms.
Tests set `TRITON_INTERPRET=1` to run the programs on a CPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence

__all__ = ["Program", "program_of", "run_program"]

# Tokens that a program processes together, and its warps [measured on an H100].
_BLOCK, _WARPS = 2048, 8

_LOG2E = tl.constexpr(1.4426950216293335)
_LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))
# Below the logits of any model: its exponential below any peak is zero.
_LOWEST = tl.constexpr(-1e30)
_NEAR = tl.constexpr(8.0)
_EPS = tl.constexpr(1.1920928955078125e-07)


class Program(NamedTuple):
    """What a program knows about its divergence: a kind, a parameter, and what `-inf` among the logits costs."""

    kind: str
    parameter: float
    at_zero: float
    slope_at_infinity: float


@functools.lru_cache(maxsize=256)
def program_of(label: str) -> Program:
    """The program of a divergence that has a fast form."""
    divergence = as_divergence(label)
    kind, parameter = divergence.name, next(iter(divergence.parameters.values()), 0.0)
    if kind == "jsd":
        kind, parameter = "skew_jsd", 0.5
    elif kind == "alpha" and parameter in (0.0, 1.0):
        kind = "forward_kl" if parameter else "reverse_kl"
    elif kind == "alpha":
        kind = "power_of_student" if parameter < 0.5 else "power_of_teacher"
    elif kind in ("skew_forward_kl", "skew_reverse_kl") and not parameter:
        kind = kind.removeprefix("skew_")
    slope = float(divergence.log_slope(torch.zeros((), dtype=torch.float64, device="cpu")))
    return Program(kind, parameter, divergence.at_zero + slope, divergence.slope_at_infinity - slope)


def run_program(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    scale: float,
    weights: Tensor | None,
    values: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """Fill in values and gradients as `sweep` does, for matrices and vectors; return which rows are left to do.

    Nothing has been written to these rows, so that the gradient may be the student's logits here too.
    """
    rows, words = student.shape
    # Products and sums are fused only where the programs say so: at the teacher, q - p must be exactly zero.
    options: dict[str, bool] = {} if student.device.type == "cpu" else {"enable_fp_fusion": False}
    program = program_of(divergence.label)
    left = torch.empty(rows, dtype=torch.bool, device=student.device)
    slopes, factors = student if gradient is None else gradient, values if weights is None else weights
    _program[(rows,)](
        student,
        teacher,
        slopes,
        factors,
        values,
        left,
        *student.stride(),
        *teacher.stride(),
        *slopes.stride(),
        words,
        scale,
        program.parameter,
        1.0 - program.parameter,
        program.at_zero,
        program.slope_at_infinity,
        KIND=program.kind,
        WEIGHED=weights is not None,
        WANTED=gradient is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        **options,
    )
    return left


@triton.jit
def _exp(x):
    """The exponential to two units in the last place; the error of the machine's own grows with its argument."""
    # Far below zero, the rest of the product would be inf - inf.
    x = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = x * _LOG2E
    rest = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -exponent))
    return tl.exp2(exponent) * tl.fma(rest, _LN2, 1.0)


@triton.jit
def _log_mixture(log_u, ratio, share, rest):
    """The logarithm of `rest + share * u` for u of any size, zero at u = 1, with `ratio = exp(-|log u|)`."""
    lesser = tl.where(log_u > 0.0, rest, share)
    return tl.maximum(log_u, 0.0) + tl.log(tl.fma(lesser, ratio - 1.0, 1.0))


@triton.jit
def _terms(p, q, log_u, a, b, KIND: tl.constexpr):
    """The term of the value and the mass of each token that both distributions have."""
    d = q - p
    if KIND == "forward_kl":
        value = q * log_u - d
        mass = d
    elif KIND == "reverse_kl":
        mass = p * log_u
        value = d - mass
    elif KIND == "jeffreys":
        value = d * log_u
        mass = d + p * log_u
    elif KIND == "chi2":
        u = _exp(log_u)
        value = d * (u - 1.0)
        mass = d * (u + 1.0)
    elif KIND == "neyman_chi2":
        inverse = _exp(-log_u)
        value = d * (1.0 - inverse)
        mass = 2.0 * d * inverse
    elif KIND == "hellinger":
        root = tl.sqrt_rn(p)
        difference = tl.sqrt_rn(q) - root
        value = difference * difference
        mass = root * difference
    elif KIND == "total_variation":
        value = 0.5 * tl.abs(d)
        mass = tl.where(d == 0.0, 0.0 * d, tl.where(d > 0.0, 0.5 * p, -0.5 * p))
    elif KIND == "le_cam":
        # Tokens whose probabilities both underflow weigh nothing.
        r = tl.where(p + q == 0.0, 0.0, d / (p + q))
        value = d * r
        mass = p * r * (2.0 + r)
    elif KIND == "skew_jsd":
        weight = _log_mixture(log_u, _exp(-tl.abs(log_u)), a, b)
        value = a * q * (log_u - weight) - b * p * weight
        mass = b * p * weight
    elif KIND == "skew_forward_kl":
        mixture = p + a * d
        value = q * (log_u - _log_mixture(log_u, _exp(-tl.abs(log_u)), a, b)) - b * d
        mass = tl.where(mixture == 0.0, 0.0, b * b * p * d / mixture)
    elif KIND == "skew_reverse_kl":
        ratio = _exp(-tl.abs(log_u))
        log_mixture = _log_mixture(log_u, ratio, b, a)
        # 1/v - 1 of the mixture v = a + b u
        above = log_u > 0.0
        gap = b * (1.0 - ratio)
        inverse = tl.where(above, -gap, gap) / (tl.where(above, b, a) + tl.where(above, a, b) * ratio)
        value = b * d - p * log_mixture
        mass = p * (log_mixture + a * inverse)
    elif KIND == "power_of_student":
        mass = p * (_exp(a * log_u) - 1.0) / a
        value = (d - mass) / b
    else:
        tl.static_assert(KIND == "power_of_teacher")
        excess = q * (_exp(-b * log_u) - 1.0)
        mass = (d + excess) / a
        value = (-excess / b - d) / a
    return value, mass


@triton.jit
def _loaded(logits, step, start, words, BLOCK: tl.constexpr):
    """A block of logits in float32; beyond the last token, logits whose exponentials are zero."""
    # In 64 bits, as tokens may be far from the start of a row that is not contiguous.
    at = start + tl.arange(0, BLOCK).to(tl.int64)
    return tl.load(logits + at * step, mask=at < words, other=_LOWEST).to(tl.float32)


@triton.jit
def _reference(logits, step, words, scale, BLOCK: tl.constexpr):
    """A logit near the largest: exponentials relative to it overflow only if another logit is 88 nats larger."""
    top = tl.max(_loaded(logits, step, 0, words, BLOCK), 0) * scale
    return tl.where(top > _LOWEST / 2, top, 0.0)


@triton.jit
def _block(
    student,
    teacher,
    student_word,
    teacher_word,
    start,
    words,
    scale,
    top,
    other_top,
    quotient,
    whole,
    shift,
    shift_rest,
    holes,
    a,
    b,
    at_zero,
    slope_at_infinity,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For a block of tokens: `p`, the terms of the value and the masses, all times the student's total."""
    ours = _loaded(student, student_word, start, words, BLOCK)
    theirs = _loaded(teacher, teacher_word, start, words, BLOCK)
    p = _exp(tl.fma(ours, scale, -top))
    q = _exp(tl.fma(theirs, scale, -other_top)) * quotient
    value, mass = _terms(p, q, tl.fma((theirs + whole) - ours, scale, shift) + shift_rest, a, b, KIND)
    if holes:
        # T10: a token that one distribution lacks.
        absent, lacking = ours == -_INF, theirs == -_INF
        value = tl.where(lacking, p * at_zero, value)
        mass = tl.where(absent, 0.0, tl.where(lacking, -p * at_zero, mass))
        value = tl.where(absent, tl.where(lacking, 0.0, q * slope_at_infinity), value)
    return p, value, mass


@triton.jit
def _program(
    student,
    teacher,
    gradient,
    weights,
    values,
    left,
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
    WEIGHED: tl.constexpr,
    WANTED: tl.constexpr,
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
        top = _reference(student, student_word, words, scale, BLOCK)
        other_top = _reference(teacher, teacher_word, words, scale, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        other_sums = tl.zeros((BLOCK,), tl.float32)
        lowest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, words, BLOCK):
            ours = _loaded(student, student_word, start, words, BLOCK)
            theirs = _loaded(teacher, teacher_word, start, words, BLOCK)
            sums += _exp(tl.fma(ours, scale, -top))
            other_sums += _exp(tl.fma(theirs, scale, -other_top))
            lowest = tl.minimum(lowest, tl.minimum(ours, theirs))
        total = tl.sum(sums.to(tl.float64), 0)
        other_total = tl.sum(other_sums.to(tl.float64), 0)
        holes = tl.min(lowest, 0) == -_INF
        # As rounded, but one where it is an ulp away, since products round unevenly there.
        quotient = (total / other_total).to(tl.float32)
        quotient = tl.where(tl.abs(quotient - 1.0) > _EPS, quotient, 1.0)
        # What the normalisers add to a log-ratio. Logits that differ by a large constant are first brought together.
        full = top.to(tl.float64) - other_top.to(tl.float64) + tl.log(quotient.to(tl.float64))
        whole = tl.where(tl.abs(full) < _NEAR, 0.0, tl.floor(full / scale + 0.5))
        full -= whole * scale
        shift = full.to(tl.float32)
        shift_rest = (full - shift.to(tl.float64)).to(tl.float32)
        whole = whole.to(tl.float32)

        sums = tl.zeros((BLOCK,), tl.float32)
        other_sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, words, BLOCK):
            p, terms, masses = _block(
                student,
                teacher,
                student_word,
                teacher_word,
                start,
                words,
                scale,
                top,
                other_top,
                quotient,
                whole,
                shift,
                shift_rest,
                holes,
                a,
                b,
                at_zero,
                slope_at_infinity,
                KIND,
                BLOCK,
            )
            sums += terms
            other_sums += masses
        value = tl.sum(sums.to(tl.float64), 0) / total
        mean = tl.sum(other_sums.to(tl.float64), 0) / total
        # Every NaN and infinity has entered a sum. A distribution without tokens has no total.
        usable = (tl.abs(value) + tl.abs(mean) < _INF) & (total > 0.0) & (other_total > 0.0)
        tl.store(left + row, usable == 0)
        if usable:
            tl.store(values + row, weight * value)
            if WANTED:
                factor, center = (-weight * scale / total).to(tl.float32), mean.to(tl.float32)
                for start in range(0, words, BLOCK):
                    p, terms, masses = _block(
                        student,
                        teacher,
                        student_word,
                        teacher_word,
                        start,
                        words,
                        scale,
                        top,
                        other_top,
                        quotient,
                        whole,
                        shift,
                        shift_rest,
                        holes,
                        a,
                        b,
                        at_zero,
                        slope_at_infinity,
                        KIND,
                        BLOCK,
                    )
                    at = start + every
                    tl.store(gradient + at * gradient_word, factor * (masses - center * p), mask=at < words)
