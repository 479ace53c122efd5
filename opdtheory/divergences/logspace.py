r"""Functions of $t = \log u$ that stay accurate where the textbook formula cancels, overflows or underflows.

All are elementwise and map float64 tensors of any shape to float64. Finite arguments never give NaN; the limits at
$t = \pm\infty$ are left to the caller (`divergence.Form` holds them).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "TwoFloat",
    "box_cox",
    "exp_product",
    "exp_remainder",
    "expm1_product",
    "log_mixture",
    "mixture_ratio",
    "mul_exp",
    "polynomial",
    "sigmoid",
    "xlogx_remainder",
]

_SPLITTER = 134217729.0  # 2**27 + 1: Dekker's constant for a 53-bit significand
_REMAINDER_COEFFICIENTS = tuple(1 / math.factorial(n) for n in range(2, 21))


class TwoFloat(NamedTuple):
    """A real number as an unevaluated sum `hi + lo` of two floats: about 106 bits."""

    hi: float
    lo: float

    @classmethod
    def of(cls, value: Fraction) -> TwoFloat:
        """The nearest pair to an exact value."""
        hi = float(value)
        return cls(hi, float(value - Fraction(hi)))


def polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    r"""Horner's rule, $\sum_k c_k x^k$."""
    result = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def exp_remainder(t: Tensor) -> Tensor:
    r"""The remainder $e^t - 1 - t \ge 0$, with small relative error near zero too."""
    small = t.clamp(-1.0, 1.0)
    series = small * small * polynomial(small, _REMAINDER_COEFFICIENTS)
    return torch.where(t.abs() < 1.0, series, torch.expm1(t) - t)


def xlogx_remainder(log_v: Tensor) -> Tensor:
    r"""The remainder $v \log v - v + 1 \ge 0$ of $v \log v$ at $v = 1$, for $v = e^{\mathtt{log\_v}}$."""
    return mul_exp(exp_remainder(-log_v), log_v)


def mul_exp(factor: Tensor | float, t: Tensor) -> Tensor:
    r"""The product $x\, e^t$, which overflows or underflows only if the product itself does.

    The factor $e^{t/2}$ is applied twice, as $e^t$ may leave the range of float64 before $x e^t$ does.
    """
    half = torch.exp(t / 2)
    return (factor * half) * half


def log_mixture(t: Tensor, a: float, b: float) -> Tensor:
    r"""The logarithm $\log(a e^t + b)$ of a mixture, $a, b \ge 0$, $a + b = 1$, with small relative error.

    Both weights are arguments, as $1 - a$ would lose a small $b$ once $a$ is rounded.
    """
    if a == 0.0:
        return torch.zeros_like(t)
    if b == 0.0:
        return t.clone()
    # Up to 700 the excess over one is finite, and its log1p keeps the root at t = 0. Below minus one half it cancels.
    excess = a * torch.expm1(t.clamp(max=700.0))
    low = torch.log(b + a * torch.exp(t.clamp(max=0.0)))
    high = t + torch.log(a + b * torch.exp(-t.clamp(min=0.0)))
    return torch.where(t > 700.0, high, torch.where(excess < -0.5, low, torch.log1p(excess.clamp(min=-0.5))))


def mixture_ratio(t: Tensor, a: float, b: float) -> Tensor:
    r"""The ratio $e^t / (a e^t + b)$, $a, b \ge 0$, $a + b = 1$: a logistic curve from 0 to $1/a$."""
    if a == 0.0:
        return torch.exp(t)
    if b == 0.0:
        return torch.full_like(t, 1.0 / a)
    half = torch.exp(t.clamp(max=0.0) / 2)
    # Half of the exponent stays outside, as e^t may be subnormal where its ratio to a small b is not.
    return half / (a * half * half + b * torch.exp(-t.clamp(min=0.0))) * half


def sigmoid(t: Tensor) -> Tensor:
    r"""The logistic function $e^t / (1 + e^t)$, accurate down to the smallest normal number."""
    return mixture_ratio(t, 0.5, 0.5) / 2


def exp_product(t: Tensor, a: TwoFloat, scale: float = 1.0) -> Tensor:
    r"""The power $c\, e^{a t}$ with $a$ in two floats, accurate although $a t$ is rounded.

    A rounded exponent near 700 alone would cost 500 units in the last place.
    """
    product, error = _two_product(t, a)
    # The clamp keeps the halves finite; anything beyond it overflows for every scale above 1e-300.
    half = torch.exp(product.clamp(max=1400.0) / 2)
    return ((scale * half) * half) * (1.0 + error)


def expm1_product(t: Tensor, a: TwoFloat, scale: float = 1.0) -> Tensor:
    r"""The difference $c\,(e^{a t} - 1)$ with $a$ in two floats, accurate at both ends."""
    product, error = _two_product(t, a)
    near = scale * (torch.expm1(product.clamp(max=600.0)) + error * torch.exp(product.clamp(max=600.0)))
    return torch.where(product > 600.0, exp_product(t, a, scale), near)


def box_cox(t: Tensor, a: TwoFloat) -> Tensor:
    r"""The Box-Cox transform of the ratio, $(u^a - 1)/a$, which is $\log u$ at $a = 0$."""
    if a.hi == 0.0:
        return t.clone()
    # A tiny product may be subnormal and without digits: there the transform is t to the last bit.
    tiny = (a.hi * t).abs() < 2.0**-60
    inverse = 1.0 / a.hi
    if math.isinf(inverse):
        return t.clone()
    return torch.where(tiny, t, expm1_product(t, a, inverse))


def _two_product(t: Tensor, a: TwoFloat) -> tuple[Tensor, Tensor]:
    """The product `a t` in float64 and its rounding error, which is left out beyond the range of exp."""
    product = a.hi * t
    in_range = (product.abs() < 2000.0) & (t.abs() < 1e150)
    safe = torch.where(in_range, t, torch.zeros_like(t))
    if abs(a.hi) < 1e150:
        scaled = _SPLITTER * a.hi
        head = scaled - (scaled - a.hi)
    else:
        head = a.hi
    tail = a.hi - head
    scaled_t = _SPLITTER * safe
    head_t = scaled_t - (scaled_t - safe)
    tail_t = safe - head_t
    error = ((head * head_t - a.hi * safe) + head * tail_t + tail * head_t) + tail * tail_t
    return product, torch.where(in_range, error + a.lo * safe, torch.zeros_like(t))
