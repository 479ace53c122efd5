r"""A whole row of logits in one program of a GPU, in Triton, which this module needs.

What the forms of `opdtheory.kernels.forms` do in a dozen passes over buffers, a program does in three reads of its row
and one write: normalisers, then value and mean, then the gradient

$$\frac{\partial D}{\partial z_a} = c\,(p_a \textstyle\sum_b h_b - h_a), \qquad h = p\,w_f(u)$$

with every term in the gauge $f'(1) = w(1) = 0$ (T3): terms of a value are never negative, so that their sum keeps its
digits, and at the teacher the gradient is exactly zero. Rows whose result is not finite are left to the forms. Set
`TRITON_INTERPRET=1` to run the programs on a CPU, for tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opdtheory.divergences import Divergence

__all__ = ["Program", "program_of", "run_program"]

# Words that a program looks at together, and warps that it has [measured on an H100].
_BLOCK, _WARPS = 4096, 8

_LOG2E = tl.constexpr(1.4426950216293335)
_LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
_LN2 = tl.constexpr(0.6931471805599453)
_INF = tl.constexpr(float("inf"))
# Below the logits of any model; its exponential under any peak is zero.
_LOWEST = tl.constexpr(-1e30)
_NEAR = tl.constexpr(8.0)
_EPS = tl.constexpr(1.1920928955078125e-07)


class Program(NamedTuple):
    """What a program is told of its divergence: a kind, a parameter, and what `-inf` among the logits costs."""

    kind: str
    parameter: float
    at_zero: float
    slope_at_infinity: float


def program_of(divergence: Divergence) -> Program:
    """The program of a divergence for which there is a fast form."""
    kind, parameter = divergence.name, next(iter(divergence.parameters.values()), 0.0)
    if kind == "jsd":
        kind, parameter = "skew_jsd", 0.5
    elif kind == "alpha" and parameter in (0.0, 1.0):
        kind = "forward_kl" if parameter else "reverse_kl"
    elif kind == "alpha":
        kind = "power_of_student" if parameter < 0.5 else "power_of_teacher"
    elif kind in ("skew_forward_kl", "skew_reverse_kl") and not parameter:
        kind = kind.removeprefix("skew_")
    slope = float(divergence.log_slope(torch.zeros((), dtype=torch.float64)))
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
    """Fill in values and gradients as `sweep` does, of matrices and vectors; the rows that are left, by number.

    Rows that are left have not been written to, so that the gradient may be the student's logits here too.
    """
    rows, words = student.shape
    program = program_of(divergence)
    left = torch.empty(rows, dtype=torch.bool, device=student.device)
    slopes, factors = student if gradient is None else gradient, values if weights is None else weights
    options = {} if student.device.type == "cpu" else {"enable_fp_fusion": False}
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
    return left.nonzero()[:, 0]


@triton.jit
def _exp(x: Any) -> Any:
    """To two units in the last place; the machine's own loses as many as its argument is large."""
    # Far below, the rest of the product would be inf - inf.
    x = tl.where(x < -200.0, -200.0, x)
    exponent = x * _LOG2E
    rest = tl.fma(x, _LOG2E, -exponent) + x * _LOG2E_REST
    return tl.exp2(exponent) * (1.0 + rest * _LN2)


@triton.jit
def _log_mixture(log_u: Any, ratio: Any, share: Any, rest: Any) -> Any:
    """The logarithm of `rest + share * u`, for u of any size and zero at u = 1; with `ratio = exp(-|log u|)`."""
    below = tl.log(1.0 + share * (ratio - 1.0))
    above = log_u + tl.log(1.0 + rest * (ratio - 1.0))
    return tl.where(log_u > 0.0, above, below)


@triton.jit
def _terms(
    ours: Any,
    theirs: Any,
    top: Any,
    other_top: Any,
    quotient: Any,
    whole: Any,
    shift: Any,
    shift_rest: Any,
    a: Any,
    b: Any,
    at_zero: Any,
    slope_at_infinity: Any,
    KIND: tl.constexpr,
) -> Any:
    """Of each word `p`, its term of the value and its mass, all of them times the student's total."""
    p = _exp(ours - top)
    q = _exp(theirs - other_top) * quotient
    d = q - p
    log_u = ((theirs + whole) - ours + shift) + shift_rest
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
        # Words of which both probabilities underflow weigh nothing.
        r = tl.where(p + q == 0.0, 0.0, d / (p + q))
        value = d * r
        mass = p * r * (2.0 + r)
    elif KIND == "skew_jsd":
        weight = _log_mixture(log_u, _exp(-tl.abs(log_u)), a, b)
        value = a * q * (log_u - weight) - b * p * weight
        mass = b * p * weight
    elif KIND == "skew_forward_kl":
        log_mixture = _log_mixture(log_u, _exp(-tl.abs(log_u)), a, b)
        mixture = p + a * d
        value = q * (log_u - log_mixture) - b * d
        mass = tl.where(mixture == 0.0, 0.0, b * b * p * d / mixture)
    elif KIND == "skew_reverse_kl":
        ratio = _exp(-tl.abs(log_u))
        log_mixture = _log_mixture(log_u, ratio, b, a)
        # 1/v - 1 of the mixture v = a + b u
        inverse = tl.where(log_u > 0.0, -b * (1.0 - ratio) / (a * ratio + b), b * (1.0 - ratio) / (a + b * ratio))
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
    # T10: a word that one law lacks.
    absent, lacking = ours == -_INF, theirs == -_INF
    value = tl.where(lacking, p * at_zero, value)
    mass = tl.where(absent, 0.0, tl.where(lacking, -p * at_zero, mass))
    value = tl.where(absent, tl.where(lacking, 0.0, q * slope_at_infinity), value)
    return p, value, mass


@triton.jit
def _grown(peak: Any, total: Any, x: Any) -> Any:
    """Peaks and sums of exponentials below them, with one more word each."""
    higher = tl.maximum(peak, x)
    return higher, total * _exp(peak - higher) + _exp(x - higher)


@triton.jit
def _program(
    student: Any,
    teacher: Any,
    gradient: Any,
    weights: Any,
    values: Any,
    left: Any,
    student_row: Any,
    student_word: Any,
    teacher_row: Any,
    teacher_word: Any,
    gradient_row: Any,
    gradient_word: Any,
    words: Any,
    scale: Any,
    a: Any,
    b: Any,
    at_zero: Any,
    slope_at_infinity: Any,
    KIND: tl.constexpr,
    WEIGHED: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    gradient += row * gradient_row
    every = tl.arange(0, BLOCK)
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
        peak = tl.full((BLOCK,), _LOWEST, tl.float32)
        other_peak = tl.full((BLOCK,), _LOWEST, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        other_sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, words, BLOCK):
            at = start + every
            ours = tl.load(student + at * student_word, mask=at < words, other=-_INF).to(tl.float32) * scale
            theirs = tl.load(teacher + at * teacher_word, mask=at < words, other=-_INF).to(tl.float32) * scale
            peak, sums = _grown(peak, sums, ours)
            other_peak, other_sums = _grown(other_peak, other_sums, theirs)
        top, other_top = tl.max(peak, 0), tl.max(other_peak, 0)
        total = tl.sum((sums * _exp(peak - top)).to(tl.float64), 0)
        other_total = tl.sum((other_sums * _exp(other_peak - other_top)).to(tl.float64), 0)
        # As rounded, and one where it is an ulp away, of which products are rounded unevenly.
        quotient = (total / other_total).to(tl.float32)
        quotient = tl.where(tl.abs(quotient - 1.0) > _EPS, quotient, 1.0)
        # What the normalisers add to a log-ratio. Logits that are far apart by a constant are first brought together.
        full = top.to(tl.float64) - other_top.to(tl.float64) + tl.log(quotient.to(tl.float64))
        whole = tl.where(tl.abs(full) < _NEAR, 0.0, tl.floor(full + 0.5))
        shift = (full - whole).to(tl.float32)
        shift_rest = (full - whole - shift.to(tl.float64)).to(tl.float32)
        whole = whole.to(tl.float32)

        sums = tl.zeros((BLOCK,), tl.float32)
        other_sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, words, BLOCK):
            at = start + every
            ours = tl.load(student + at * student_word, mask=at < words, other=-_INF).to(tl.float32) * scale
            theirs = tl.load(teacher + at * teacher_word, mask=at < words, other=-_INF).to(tl.float32) * scale
            p, value, mass = _terms(
                ours,
                theirs,
                top,
                other_top,
                quotient,
                whole,
                shift,
                shift_rest,
                a,
                b,
                at_zero,
                slope_at_infinity,
                KIND,
            )
            sums += value
            other_sums += mass
        value = tl.sum(sums.to(tl.float64), 0) / total
        mean = tl.sum(other_sums.to(tl.float64), 0) / total
        # Every NaN and infinity has entered a sum. A law without words has no total.
        usable = (tl.abs(value) + tl.abs(mean) < _INF) & (total > 0.0) & (other_total > 0.0)
        tl.store(left + row, usable == 0)
        if usable:
            tl.store(values + row, weight * value)
            if WANTED:
                factor, center = (-weight * scale / total).to(tl.float32), mean.to(tl.float32)
                for start in range(0, words, BLOCK):
                    at = start + every
                    ours = tl.load(student + at * student_word, mask=at < words, other=-_INF).to(tl.float32) * scale
                    theirs = tl.load(teacher + at * teacher_word, mask=at < words, other=-_INF).to(tl.float32) * scale
                    p, _, mass = _terms(
                        ours,
                        theirs,
                        top,
                        other_top,
                        quotient,
                        whole,
                        shift,
                        shift_rest,
                        a,
                        b,
                        at_zero,
                        slope_at_infinity,
                        KIND,
                    )
                    tl.store(gradient + at * gradient_word, factor * (mass - center * p), mask=at < words)
