r"""What the programs compute of a block of tokens.

With $u = q/p$ and $h = p\,w_f(u)$, terms are in the gauge $f'(1) = w(1) = 0$ (T3): those of a value are never negative,
so that their sum keeps its digits, and at the teacher the gradient is exactly zero. Probabilities are exponentials
relative to a logit near the largest; those of the teacher are brought to the total of the student's.

For the KLs and their sum, value and mean weight are means of the log-ratio itself. It is $d + c$ with $d$ from the
logits and $c$ from the normalisers, so that one pass finds both.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "apart",
    "bounded",
    "cross_slope",
    "cross_terms",
    "cross_value",
    "gap",
    "in_bits",
    "loaded",
    "powers",
    "reference",
    "rounded",
    "terms",
    "terms_in_units",
    "together",
    "units",
]

_LOG2E = tl.constexpr(1.4426950216293335)
_LOG2E_REST = tl.constexpr(1.9259629911266175e-08)
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E_WIDE = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))
# Below the logits of any model: its exponential below any peak is zero.
_LOWEST = tl.constexpr(-1e30)
_NEAR = tl.constexpr(8.0)
_EPS = tl.constexpr(1.1920928955078125e-07)


@triton.jit
def exp_(x):
    """The exponential to two units in the last place; the error of the machine's own grows with its argument."""
    # Far below zero, the rest of the product would be inf - inf.
    x = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = x * _LOG2E
    rest = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -exponent))
    return tl.exp2(exponent) * tl.fma(rest, _LN2, 1.0)


@triton.jit
def _below_one(log_u):
    """The lesser of u and its inverse."""
    return tl.exp2(tl.abs(log_u) * -_LOG2E)


@triton.jit
def _log2(x, COARSE: tl.constexpr):
    """The logarithm to base 2 of a number below one, or by the machine, to 2^-22, one instruction for twenty."""
    if COARSE:
        found = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        found = tl.log2(x)
    return found


@triton.jit
def _bits_above(log_u, ratio, share, rest, COARSE: tl.constexpr):
    """The logarithm to base 2 of `rest + share * u` over the greater of u and one, with `ratio = exp(-|log u|)`."""
    lesser = tl.where(log_u > 0.0, rest, share)
    return _log2(tl.fma(lesser, ratio - 1.0, 1.0), COARSE)


@triton.jit
def _log_mixture(log_u, ratio, share, rest, COARSE: tl.constexpr):
    """The logarithm of `rest + share * u` for u of any size, zero at u = 1."""
    return tl.fma(_bits_above(log_u, ratio, share, rest, COARSE), _LN2, tl.maximum(log_u, 0.0))


@triton.jit
def _jsd_in_bits(p, q, bits, a, b, COARSE: tl.constexpr):
    """A part of the value and the mass of the skewed JSD, in bits and without its shares."""
    weight = _bits_above(bits, tl.exp2(-tl.abs(bits)), a, b, COARSE) + tl.maximum(bits, 0.0)
    return q * (bits - weight), p * weight


@triton.jit
def loaded(logits, step, start, words, BLOCK: tl.constexpr):
    """A block of logits in their own dtype; beyond the last token, logits whose exponentials are zero."""
    # In 64 bits, as tokens may be far from the start of a row that is not contiguous.
    at = start + tl.arange(0, BLOCK).to(tl.int64)
    return tl.load(logits + at * step, mask=at < words, other=_LOWEST)


@triton.jit
def in_bits(scale):
    """What takes logits to exponents of two."""
    return scale * _LOG2E


@triton.jit
def reference(logits, step, words, factor, BLOCK: tl.constexpr):
    """An exponent near the largest: powers relative to it overflow only if another is 127 larger."""
    top = tl.max(loaded(logits, step, 0, words, BLOCK).to(tl.float32), 0)
    return tl.where(top > _LOWEST / 2, top, 0.0) * factor


@triton.jit
def powers(logits, factor, top):
    """The exponentials of scaled logits less a reference: with an error of 6e-8 for each nat between them."""
    return tl.exp2(tl.fma(logits, factor, -top))


@triton.jit
def apart(top, other_top):
    """The references' distance in nats, float64."""
    return (top.to(tl.float64) - other_top.to(tl.float64)) * _LN2


@triton.jit
def together(distance, scale):
    """The whole number that is added to the teacher's logits where they differ by a large constant."""
    return tl.where(tl.abs(distance) < _NEAR, 0.0, tl.floor(distance / scale + 0.5)).to(tl.float32)


@triton.jit
def rounded(ratio):
    """What brings the teacher's exponentials to the student's total, in float32."""
    quotient = ratio.to(tl.float32)
    # One where it is an ulp away, since products round unevenly there.
    return tl.where(tl.abs(quotient - 1.0) > _EPS, quotient, 1.0)


@triton.jit
def terms(p, q, log_u, a, b, KIND: tl.constexpr, COARSE: tl.constexpr):
    """The term of the value and the mass of each token that both distributions have."""
    d = q - p
    if KIND == "chi2":
        u = exp_(log_u)
        value = d * (u - 1.0)
        mass = d * (u + 1.0)
    elif KIND == "neyman_chi2":
        inverse = exp_(-log_u)
        value = d * (1.0 - inverse)
        mass = 2.0 * d * inverse
    elif KIND == "hellinger":
        root = tl.sqrt_rn(p)
        difference = tl.sqrt_rn(q) - root
        value = difference * difference
        mass = root * difference
    elif KIND == "total_variation":
        value = 0.5 * tl.abs(d)
        # By the logits, as the rounding of p and q would turn signs near the teacher.
        mass = tl.where(log_u == 0.0, 0.0 * d, tl.where(log_u > 0.0, 0.5 * p, -0.5 * p))
    elif KIND == "le_cam":
        # Tokens whose probabilities both underflow weigh nothing.
        r = tl.where(p + q == 0.0, 0.0, d / (p + q))
        value = d * r
        mass = p * r * (2.0 + r)
    elif KIND == "skew_jsd":
        part, mass = _jsd_in_bits(p, q, log_u * _LOG2E, a, b, COARSE)
        mass *= b * _LN2
        value = tl.fma(part, a * _LN2, -mass)
    elif KIND == "skew_forward_kl":
        mixture = p + a * d
        value = q * (log_u - _log_mixture(log_u, _below_one(log_u), a, b, COARSE)) - b * d
        mass = tl.where(mixture == 0.0, 0.0, b * b * p * d / mixture)
    elif KIND == "skew_reverse_kl":
        ratio = _below_one(log_u)
        log_mixture = _log_mixture(log_u, ratio, b, a, COARSE)
        # 1/v - 1 of the mixture v = a + b u
        above = log_u > 0.0
        gap = b * (1.0 - ratio)
        inverse = tl.where(above, -gap, gap) / (tl.where(above, b, a) + tl.where(above, a, b) * ratio)
        value = b * d - p * log_mixture
        mass = p * (log_mixture + a * inverse)
    elif KIND == "power_of_student":
        mass = p * (exp_(a * log_u) - 1.0) / a
        value = (d - mass) / b
    else:
        tl.static_assert(KIND == "power_of_teacher")
        excess = q * (exp_(-b * log_u) - 1.0)
        mass = (d + excess) / a
        value = (-excess / b - d) / a
    return value, mass


@triton.jit
def bounded(value, mass, p, q, ours, theirs, value_at_zero, mass_at_zero, slope_at_infinity):
    """The same for all tokens, with what those cost that one distribution lacks (T10), in units of value and mass."""
    absent, lacking = ours == -_INF, theirs == -_INF
    value = tl.where(lacking, p * value_at_zero, value)
    mass = tl.where(absent, 0.0, tl.where(lacking, -p * mass_at_zero, mass))
    value = tl.where(absent, tl.where(lacking, 0.0, q * slope_at_infinity), value)
    return value, mass


@triton.jit
def units(a, b, scale, constant, quotient, at_zero, slope_at_infinity, KIND: tl.constexpr):
    """What `terms_in_units` counts in, so that factors that all tokens share are multiplied once.

    Returns:
        For the log-ratio, the factor of the difference of logits and the constant; for the teacher's exponentials, a
        factor; for the value, the factors of the sums of both parts; for the mass, its factor; and for tokens that one
        distribution lacks, their costs.
    """
    if KIND == "skew_jsd":
        return (
            scale * _LOG2E,
            (constant * _LOG2E_WIDE).to(tl.float32),
            1.0,
            _LN2 * a * quotient.to(tl.float64),
            -_LN2 * b,
            b * _LN2,
            0.0,
            at_zero / (b * _LN2),
            slope_at_infinity / (a * _LN2),
        )
    else:
        return scale, constant.to(tl.float32), quotient, 1.0, 0.0, 1.0, at_zero, at_zero, slope_at_infinity


@triton.jit
def terms_in_units(p, q, log_u, a, b, KIND: tl.constexpr, COARSE: tl.constexpr):
    """A part of the value and the mass of each token, in units of their own: the JSD's in bits, per share, unscaled."""
    if KIND == "skew_jsd":
        value, mass = _jsd_in_bits(p, q, log_u, a, b, COARSE)
    else:
        value, mass = terms(p, q, log_u, a, b, KIND, COARSE)
    return value, mass


@triton.jit
def gap(ours, theirs, whole):
    """The difference of the logits, which is exact where student and teacher are close."""
    return (theirs + whole) - ours


@triton.jit
def cross_terms(p, q, d, KIND: tl.constexpr):
    """The terms of the sums over the difference d under student and teacher, each where it is needed."""
    under_student = p
    under_teacher = q
    if KIND != "forward_kl":
        under_student = p * d
    if KIND != "reverse_kl":
        under_teacher = q * d
    return under_student, under_teacher


@triton.jit
def cross_value(by_student, by_teacher, constant, KIND: tl.constexpr):
    """The value from the means of d, and the constant by which d misses the log-ratio, all float64."""
    if KIND == "forward_kl":
        value = by_teacher + constant
    elif KIND == "reverse_kl":
        value = -(by_student + constant)
    else:
        value = by_teacher - by_student
    # Rounding aside, none is negative.
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def cross_slope(p, q, d, mean, KIND: tl.constexpr):
    """The gradient in the logits up to a factor, from the difference d and its mean under the student."""
    if KIND == "forward_kl":
        slope = q - p
    elif KIND == "reverse_kl":
        slope = p * (d - mean)
    else:
        slope = tl.fma(p, d - mean, q - p)
    return slope
