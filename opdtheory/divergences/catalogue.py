r"""The catalogue of f-divergences: one entry each, $D_f(q\|p) = E_p[f(u)]$ with $u = q/p$, teacher over student.

In the forms below $t = \log u$. Parameters are read as the decimal that they print as: `alpha(0.3)` is exactly 3/10,
in the symbolic generator and in the numbers alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdtheory.divergences.divergence import Divergence, Form
from opdtheory.divergences.logspace import (
    TwoFloat,
    box_cox,
    exp_product,
    exp_remainder,
    expm1_product,
    log_mixture,
    mixture_ratio,
    mul_exp,
    polynomial,
    sigmoid,
    xlogx_remainder,
)
from opdtheory.divergences.registry import entry, family, member
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    import sympy

_INF = math.inf
_LOG2 = math.log(2.0)


def _constant(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


def _jsd_generator(t: Tensor) -> Tensor:
    # Near u = 1 with s = t/2: e^s (s sinh s - cosh s log cosh s), a difference of squares in the ratio 2 : 1.
    s = t.clamp(-2.0, 2.0) / 2
    half_sinh = torch.sinh(s / 2)
    square = half_sinh * half_sinh
    cosh = 1 + 2 * square
    near = torch.exp(s) * (2 * s * half_sinh * torch.sqrt(1 + square) - cosh * torch.log1p(2 * square))
    # With L = log((1 + e^-|t|)/2) the mixtures' logarithms are L or L + |t|. Beyond 3000 e^t is infinite, or zero.
    low = torch.log((1 + torch.exp(-t.abs())) / 2)
    far = -mul_exp((low - t.clamp(-3000.0, 0.0)) / 2, t) - (t.clamp(0.0, 3000.0) + low) / 2
    return torch.where(t.abs() < 2.0, near, far)


def _forward_remainder(t: Tensor, slope: float, log_inverse: Tensor) -> Tensor:
    """`u log v - slope (u - 1)`, where `v = u / (1 + slope (u - 1))`, from `-log v`."""
    near = mul_exp(exp_remainder(log_inverse.clamp(max=3.0)), t)
    return torch.where(log_inverse < 3.0, near, slope - mul_exp(log_inverse + slope, t.clamp(max=0.0)))


reverse_kl = entry(
    "reverse_kl",
    lambda sympy, u: -sympy.log(u),
    generator=Form(lambda t: -t, _INF, -_INF),
    log_slope=Form(_constant(-1.0), -1.0, -1.0),
    weight=Form(lambda t: t - 1, -_INF, _INF),
    curvature=Form(_constant(1.0), 1.0, 1.0),
    curvature_slope=torch.zeros_like,
    remainder=Form(exp_remainder, _INF, _INF),
    centred_weight=Form(torch.clone, -_INF, _INF),
    slope_at_infinity=0.0,
    reference="Kullback & Leibler (1951), doi:10.1214/aoms/1177729694; in distillation arXiv 2306.08543",
)
r"""Reverse KL, $D = KL(p\|q)$: $f = -\log u$. Range $[0, \infty]$, not symmetric; mode-seeking.

Reference: Kullback & Leibler (1951); in distillation MiniLLM, arXiv 2306.08543.
"""

forward_kl = entry(
    "forward_kl",
    lambda sympy, u: u * sympy.log(u),
    generator=Form(lambda t: mul_exp(t, t), 0.0, _INF),
    log_slope=Form(lambda t: mul_exp(t + 1, t), 0.0, _INF),
    weight=Form(torch.exp, 0.0, _INF),
    curvature=Form(torch.exp, 0.0, _INF),
    curvature_slope=torch.exp,
    remainder=Form(lambda t: _forward_remainder(t, 1.0, -t), 1.0, _INF),
    centred_weight=Form(torch.expm1, -1.0, _INF),
    slope_at_infinity=_INF,
    reference="Kullback & Leibler (1951), doi:10.1214/aoms/1177729694",
)
r"""Forward KL, $D = KL(q\|p)$: $f = u \log u$. Range $[0, \infty]$, not symmetric; mass-covering.

Reference: Kullback & Leibler (1951).
"""

jsd = entry(
    "jsd",
    lambda sympy, u: (u * sympy.log(u) - (u + 1) * sympy.log((u + 1) / 2)) / 2,
    generator=Form(_jsd_generator, _LOG2 / 2, _INF),
    log_slope=Form(lambda t: mul_exp(-log_mixture(-t, 0.5, 0.5) / 2, t), 0.0, _INF),
    weight=Form(lambda t: log_mixture(t, 0.5, 0.5) / 2, -_LOG2 / 2, _INF),
    curvature=Form(lambda t: sigmoid(t) / 2, 0.0, 0.5),
    curvature_slope=lambda t: sigmoid(t) * sigmoid(-t) / 2,
    slope_at_infinity=_LOG2 / 2,
    reference="Lin (1991), doi:10.1109/18.61115",
)
r"""Jensen-Shannon, $D = \frac12 KL(q\|m) + \frac12 KL(p\|m)$, $m = \frac12(p + q)$.

$f = \frac12 [u \log u - (u+1) \log\frac{u+1}2]$. Range $[0, \log 2]$, symmetric.
Reference: Lin (1991), doi:10.1109/18.61115.
"""


@family(sought=(1e-3, 1.0 - 1e-3), drawn=(0.01, 0.99), examples=(0.1, 0.9))
def skew_jsd(beta: float) -> Divergence:
    r"""Skew Jensen-Shannon, $D = \beta KL(q\|m) + (1-\beta) KL(p\|m)$, $m = \beta q + (1-\beta) p$.

    $$f = \beta u \log u - M \log M, \qquad M = \beta u + 1 - \beta$$

    The generalised JSD of GKD and TRL; `jsd` at one half. Range $[0, -\beta \log \beta - (1-\beta) \log(1-\beta)]$;
    exchanging p and q exchanges $\beta$ and $1-\beta$. At $\beta = 0$ and $1$ it is identically zero (T12).

    Args:
        beta: the mixture weight of the teacher, in [0, 1].

    Raises:
        InvalidArgumentError: `beta` is not a real number in [0, 1].

    References: arXiv 2306.13649; Lin (1991), doi:10.1109/18.61115.
    """
    exact = _parameter("beta", beta, lambda x: 0 <= x <= 1, "a real number in [0, 1]")
    b, c = float(exact), float(1 - exact)
    variance = float(exact * (1 - exact))

    def expr(sympy: Any, u: sympy.Symbol) -> sympy.Expr:
        weight = sympy.Rational(exact)
        mixture = weight * u + (1 - weight)
        return weight * u * sympy.log(u) - mixture * sympy.log(mixture)

    def generator(t: Tensor) -> Tensor:
        # The perspective f_b(u) = u f_{1-b}(1/u) keeps the weight in the near form at most one half.
        small = t.clamp(-1.5, 1.5)
        if exact <= Fraction(1, 2):
            near = _skew_jsd_near(small, b)
        else:
            near = mul_exp(_skew_jsd_near(-small, c), small)
        far = mul_exp(-b * log_mixture(-t, c, b), t) - c * log_mixture(t, b, c)
        return torch.where(t.abs() < 1.5, near, far)

    if variance == 0.0:
        nothing = Form(torch.zeros_like, 0.0, 0.0)
        forms = dict.fromkeys(("generator", "log_slope", "weight", "curvature"), nothing)
    else:
        forms = {
            "generator": Form(generator, -c * _log(1 - exact), _INF),
            "log_slope": Form(lambda t: mul_exp(-b * log_mixture(-t, c, b), t), 0.0, _INF),
            "weight": Form(lambda t: c * log_mixture(t, b, c), c * _log(1 - exact), _INF),
            "curvature": Form(lambda t: variance * mixture_ratio(t, b, c), 0.0, c),
        }
    return member(
        "skew_jsd",
        expr,
        **forms,
        curvature_slope=lambda t: variance * c * mixture_ratio(t, b, c) * _inverse_mixture(t, b, c),
        slope_at_infinity=0.0 if variance == 0.0 else -b * _log(exact),
        reference="arXiv 2306.13649; Lin (1991), doi:10.1109/18.61115",
        parameters={"beta": float(beta)},
    )


def _skew_jsd_near(t: Tensor, b: float) -> Tensor:
    excess = b * torch.expm1(t)
    return b * xlogx_remainder(t) - xlogx_remainder(torch.log1p(excess))


chi2 = entry(
    "chi2",
    lambda sympy, u: (u - 1) ** 2,
    generator=Form(lambda t: torch.expm1(t) ** 2, 1.0, _INF),
    log_slope=Form(lambda t: mul_exp(2 * torch.expm1(t), t), 0.0, _INF),
    weight=Form(lambda t: torch.expm1(2 * t), -1.0, _INF),
    curvature=Form(lambda t: 2 * torch.exp(2 * t), 0.0, _INF),
    curvature_slope=lambda t: 4 * torch.exp(2 * t),
    slope_at_infinity=_INF,
    reference="Pearson (1900), doi:10.1080/14786440009463897",
)
r"""Pearson $\chi^2$, $D = \sum (q - p)^2 / p$: $f = (u - 1)^2$. Range $[0, \infty]$, not symmetric.

Reference: Pearson (1900).
"""

neyman_chi2 = entry(
    "neyman_chi2",
    lambda sympy, u: (u - 1) ** 2 / u,
    generator=Form(lambda t: (2 * torch.sinh(t / 2)) ** 2, _INF, _INF),
    log_slope=Form(lambda t: 2 * torch.sinh(t), -_INF, _INF),
    weight=Form(lambda t: -2 * torch.expm1(-t), -_INF, 2.0),
    curvature=Form(lambda t: 2 * torch.exp(-t), _INF, 0.0),
    curvature_slope=lambda t: -2 * torch.exp(-t),
    slope_at_infinity=1.0,
    reference="Neyman (1949), Proc. Berkeley Symp. Math. Stat. Prob. 1, 239-273",
)
r"""Neyman $\chi^2$, $D = \sum (q - p)^2 / q$: $f = (u - 1)^2 / u$. Range $[0, \infty]$, not symmetric.

Reference: Neyman (1949), first Berkeley Symposium, 239-273.
"""

hellinger = entry(
    "hellinger",
    lambda sympy, u: (sympy.sqrt(u) - 1) ** 2,
    generator=Form(lambda t: torch.expm1(t / 2) ** 2, 1.0, _INF),
    log_slope=Form(lambda t: torch.exp(t / 2) * torch.expm1(t / 2), 0.0, _INF),
    weight=Form(lambda t: torch.expm1(t / 2), -1.0, _INF),
    curvature=Form(lambda t: torch.exp(t / 2) / 2, 0.0, _INF),
    curvature_slope=lambda t: torch.exp(t / 2) / 4,
    slope_at_infinity=1.0,
    reference="Hellinger (1909), doi:10.1515/crll.1909.136.210",
)
r"""Squared Hellinger, $D = \sum (\sqrt q - \sqrt p)^2$: $f = (\sqrt u - 1)^2$. Range $[0, 2]$, symmetric.

Reference: Hellinger (1909), doi:10.1515/crll.1909.136.210.
"""


def _total_variation_generator(t: Tensor) -> Tensor:
    return torch.where(t > 700.0, mul_exp(0.5, t), torch.expm1(t).abs() / 2)


total_variation = entry(
    "total_variation",
    lambda sympy, u: sympy.Abs(u - 1) / 2,
    generator=Form(_total_variation_generator, 0.5, _INF),
    log_slope=Form(lambda t: mul_exp(torch.sign(t) / 2, t), 0.0, _INF),
    weight=Form(lambda t: torch.sign(t) / 2, -0.5, 0.5),
    curvature=Form(torch.zeros_like, 0.0, 0.0),
    curvature_slope=torch.zeros_like,
    slope_at_infinity=0.5,
    reference="Csiszar (1967), Studia Sci. Math. Hungar. 2, 299-318",
)
r"""Total variation, $D = \frac12 \sum |q - p|$: $f = \frac12 |u - 1|$. Range $[0, 1]$, symmetric.

At the kink $u = 1$ slope and weight are 0, the middle of the subdifferential, and `curvature`, a delta function
there, is taken to be 0 everywhere. Reference: Csiszar (1967), Studia Sci. Math. Hungar. 2, 299-318.
"""

le_cam = entry(
    "le_cam",
    lambda sympy, u: (u - 1) ** 2 / (u + 1),
    generator=Form(lambda t: torch.expm1(t) * torch.tanh(t / 2), 1.0, _INF),
    log_slope=Form(lambda t: torch.tanh(t / 2) * sigmoid(t) * (torch.exp(t) + 3), 0.0, _INF),
    weight=Form(lambda t: torch.tanh(t / 2) * (1 + 2 * sigmoid(t)), -1.0, 3.0),
    curvature=Form(lambda t: 8 * sigmoid(t) ** 2 * sigmoid(-t), 0.0, 0.0),
    curvature_slope=lambda t: 8 * sigmoid(t) ** 2 * sigmoid(-t) * (2 * sigmoid(-t) - sigmoid(t)),
    slope_at_infinity=1.0,
    reference="Le Cam (1986), Asymptotic Methods in Statistical Decision Theory; Vincze (1981)",
)
r"""Le Cam (triangular discrimination), $D = \sum (q - p)^2 / (q + p)$: $f = (u - 1)^2 / (u + 1)$.

Range $[0, 2]$, symmetric. Reference: Le Cam (1986), Asymptotic Methods in Statistical Decision Theory.
"""

jeffreys = entry(
    "jeffreys",
    lambda sympy, u: (u - 1) * sympy.log(u),
    generator=Form(lambda t: t * torch.expm1(t), _INF, _INF),
    log_slope=Form(lambda t: mul_exp(t, t) + torch.expm1(t), -1.0, _INF),
    weight=Form(lambda t: torch.expm1(t) + t, -_INF, _INF),
    curvature=Form(lambda t: torch.exp(t) + 1, 1.0, _INF),
    curvature_slope=torch.exp,
    slope_at_infinity=_INF,
    reference="Jeffreys (1946), doi:10.1098/rspa.1946.0056",
)
r"""Jeffreys, $D = KL(p\|q) + KL(q\|p)$: $f = (u - 1) \log u$. Range $[0, \infty]$, symmetric.

Reference: Jeffreys (1946), doi:10.1098/rspa.1946.0056.
"""


@family(sought=(-4.0, 4.0), drawn=(-3.0, 4.0), examples=(-1.5, 0.0, 0.3, 1.0, 2.5))
def alpha(alpha: float) -> Divergence:
    r"""Cressie-Read power divergence, $D = \frac{1}{\alpha(\alpha-1)} \left(\sum q^\alpha p^{1-\alpha} - 1\right)$.

    $$f = \frac{u^\alpha - 1 - \alpha (u - 1)}{\alpha (\alpha - 1)}, \qquad f'(1) = 0, \quad f''(1) = 1$$

    with the limits $u - 1 - \log u$ at 0 (reverse KL) and $u \log u - u + 1$ at 1 (forward KL); twice the squared
    Hellinger distance at one half, half of Pearson's at 2 and of Neyman's at -1. Its weight is the Box-Cox transform
    $(u^\alpha - 1)/\alpha$. Exchanging p and q exchanges $\alpha$ and $1 - \alpha$. Range $[0, \infty]$, bounded by
    $1/(\alpha(1-\alpha))$ for $0 < \alpha < 1$.

    Args:
        alpha: any finite real number.

    Raises:
        InvalidArgumentError: `alpha` is not a finite real number.

    References: Cressie & Read (1984), doi:10.1111/j.2517-6161.1984.tb01318.x; Box & Cox (1964).
    """
    exact = _parameter("alpha", alpha, lambda x: True, "a finite real number")
    power, below = TwoFloat.of(exact), TwoFloat.of(exact - 1)
    a = power.hi

    def expr(sympy: Any, u: sympy.Symbol) -> sympy.Expr:
        order = sympy.Rational(exact)
        if exact == 0:
            return u - 1 - sympy.log(u)
        if exact == 1:
            return u * sympy.log(u) - u + 1
        return (u**order - 1 - order * (u - 1)) / (order * (order - 1))

    def weight_limit(at_infinity: bool) -> float:
        if exact == 0:
            return _INF if at_infinity else -_INF
        if (exact > 0) == at_infinity:
            return _INF if at_infinity else -_INF
        return _float(-1 / exact)

    curvature_limits = (1.0, 1.0) if exact == 0 else ((0.0, _INF) if exact > 0 else (_INF, 0.0))
    return member(
        "alpha",
        expr,
        generator=Form(_alpha_generator(exact), _float(1 / exact) if exact > 0 else _INF, _INF),
        log_slope=Form(
            lambda t: _alpha_log_slope(t, power, below, _headroom(t, a)) / _headroom(t, a),
            0.0 if exact > 0 else (-1.0 if exact == 0 else -_INF),
            _INF,
        ),
        weight=Form(lambda t: box_cox(t, power), weight_limit(False), weight_limit(True)),
        curvature=Form(lambda t: exp_product(t, power), *curvature_limits),
        curvature_slope=lambda t: exp_product(t, power, a),
        slope_at_infinity=_float(1 / (1 - exact)) if exact < 1 else _INF,
        reference="Cressie & Read (1984), doi:10.1111/j.2517-6161.1984.tb01318.x",
        parameters={"alpha": float(alpha)},
    )


_SCALE = 2.0**-16  # room for terms that overflow although their difference does not


def _headroom(t: Tensor, a: float) -> Tensor:
    return torch.where((t > 0) | (a * t > 0), _SCALE, 1.0).to(t.dtype)


def _alpha_log_slope(t: Tensor, power: TwoFloat, below: TwoFloat, scale: Tensor) -> Tensor:
    """The slope `u (u**(a-1) - 1) / (a - 1)`, times `scale`."""
    if below.hi == 0.0:
        return mul_exp(scale * t, t)
    inverse = 1.0 / below.hi
    lifted = torch.where(scale == 1.0, exp_product(t, power, inverse), exp_product(t, power, inverse * _SCALE))
    far = lifted - mul_exp(scale * inverse, t)
    near = mul_exp(scale * box_cox(t, below), t)
    # Two terms overflow together only for u > 1, where the slope is positive.
    return torch.where((below.hi * t).abs() < 1.0, near, torch.where(torch.isnan(far), _INF, far))


def _alpha_generator(exact: Fraction) -> Callable[[Tensor], Tensor]:
    power, below = TwoFloat.of(exact), TwoFloat.of(exact - 1)
    reach = max(Fraction(1), abs(exact))
    # f = t^2 sum_n c_n (r t)^(n-2), c_n = (1 + a + ... + a^(n-2)) / (n! r^(n-2)), r = max(1, |a|)
    series, geometric = [], Fraction(0)
    for n in range(2, 34):
        geometric = geometric * exact + 1
        series.append(float(geometric / (reach ** (n - 2) * math.factorial(n))))
    coefficients, radius = tuple(series), float(reach)
    central = -1 <= exact <= 2
    product = 0.0 if central else float(1 / (exact * (exact - 1)))
    inverse = 0.0 if central else float(1 / (exact - 1))

    def generator(t: Tensor) -> Tensor:
        small = t.clamp(-1.0 / radius, 2.0 / radius)
        near = small * small * polynomial(radius * small, coefficients)
        scale = _headroom(t, power.hi)
        if central:
            lifted = torch.where(scale == 1.0, box_cox(t, power), _scaled_box_cox(t, power))
            far = _alpha_log_slope(t, power, below, scale) - lifted
        else:
            first = torch.where(
                scale == 1.0, expm1_product(t, power, product), expm1_product(t, power, product * _SCALE)
            )
            far = first - torch.where(
                t > 1.0, mul_exp(scale * inverse, t) - scale * inverse, scale * inverse * torch.expm1(t.clamp(max=1.0))
            )
        # Two terms that both overflow have an infinite difference: f is not negative.
        far = torch.where(torch.isnan(far), _INF, far / scale)
        # The series alternates for u < 1, so that it serves less far on that side.
        return torch.where((radius * t > -1.0) & (radius * t < 2.0), near, far)

    return generator


def _scaled_box_cox(t: Tensor, power: TwoFloat) -> Tensor:
    """The transform times `_SCALE`, without overflowing before that product does."""
    if power.hi == 0.0 or math.isinf(1.0 / power.hi):
        return t * _SCALE
    tiny = (power.hi * t).abs() < 2.0**-60
    return torch.where(tiny, t * _SCALE, expm1_product(t, power, _SCALE / power.hi))


@family(sought=(0.0, 1.0 - 1e-3), drawn=(0.0, 0.95), examples=(0.0, 0.3))
def skew_forward_kl(lam: float) -> Divergence:
    r"""Skew forward KL, $D = KL(q \,\|\, \lambda q + (1-\lambda) p)$.

    $$f = u \log \frac{u}{\lambda u + 1 - \lambda}$$

    The forward KL at $\lambda = 0$. Range $[0, -\log\lambda]$, not symmetric.

    Args:
        lam: the teacher's share of the mixture, in [0, 1).

    Raises:
        InvalidArgumentError: `lam` is not a real number in [0, 1).

    References: DistiLLM, arXiv 2402.03898.
    """
    exact = _parameter("lam", lam, lambda x: 0 <= x < 1, "a real number in [0, 1)")
    b, c = float(exact), float(1 - exact)
    per_ratio = _SkewSlope(exact)

    def expr(sympy: Any, u: sympy.Symbol) -> sympy.Expr:
        share = sympy.Rational(exact)
        return u * sympy.log(u / (share * u + (1 - share)))

    def curvature(t: Tensor) -> Tensor:
        if not exact:
            return torch.exp(t)
        mixture = b * torch.exp(t.clamp(max=0.0)) + c * torch.exp(-t.clamp(min=0.0))
        return (c * torch.exp(-t.abs() / 2) / mixture) ** 2

    return member(
        "skew_forward_kl",
        expr,
        generator=Form(lambda t: mul_exp(-log_mixture(-t, c, b), t), 0.0, _INF),
        log_slope=Form(lambda t: mul_exp(per_ratio(t), t), 0.0, _INF),
        weight=Form(lambda t: c * mixture_ratio(t, b, c), 0.0, _float((1 - exact) / exact) if exact else _INF),
        curvature=Form(curvature, 0.0, 0.0 if exact else _INF),
        curvature_slope=lambda t: curvature(t) * (c * _inverse_mixture(t, b, c) - b * mixture_ratio(t, b, c)),
        remainder=Form(lambda t: _forward_remainder(t, c, log_mixture(-t, c, b)), c, _INF),
        centred_weight=Form(
            lambda t: c * torch.expm1(-log_mixture(-t, c, b)), -c, _float((1 - exact) ** 2 / exact) if exact else _INF
        ),
        slope_at_infinity=-_log(exact) if exact else _INF,
        reference="arXiv 2402.03898",
        parameters={"lam": float(lam)},
    )


@family(sought=(0.0, 1.0 - 1e-3), drawn=(0.0, 0.95), examples=(0.0, 0.3))
def skew_reverse_kl(lam: float) -> Divergence:
    r"""Skew reverse KL, $D = KL(p \,\|\, \lambda p + (1-\lambda) q)$.

    $$f = -\log(\lambda + (1-\lambda) u)$$

    The reverse KL at $\lambda = 0$. Range $[0, -\log\lambda]$, not symmetric.

    Args:
        lam: the student's share of the mixture, in [0, 1).

    Raises:
        InvalidArgumentError: `lam` is not a real number in [0, 1).

    References: DistiLLM, arXiv 2402.03898.
    """
    exact = _parameter("lam", lam, lambda x: 0 <= x < 1, "a real number in [0, 1)")
    b, c = float(exact), float(1 - exact)
    per_ratio = _SkewSlope(exact)

    def expr(sympy: Any, u: sympy.Symbol) -> sympy.Expr:
        share = sympy.Rational(exact)
        return -sympy.log(share + (1 - share) * u)

    def curvature(t: Tensor) -> Tensor:
        return (c * mixture_ratio(t, c, b)) ** 2

    least = float(exp_remainder(torch.tensor(_log(exact), dtype=torch.float64))) if exact else _INF

    def centred_weight(t: Tensor) -> Tensor:
        log_mass = log_mixture(t, c, b)  # of the mixture, over the student's
        near = log_mass.clamp(min=-1.0)
        far = log_mass + b * (_inverse_mixture(t, c, b) - 1) if exact else t
        return torch.where(log_mass > -0.5, exp_remainder(-near) - c * torch.expm1(-near), far)

    return member(
        "skew_reverse_kl",
        expr,
        generator=Form(lambda t: -log_mixture(t, c, b), -_log(exact) if exact else _INF, -_INF),
        log_slope=Form(lambda t: -c * mixture_ratio(t, c, b), 0.0 if exact else -1.0, -1.0),
        weight=Form(lambda t: -per_ratio(-t), _log(exact) if exact else -_INF, _INF),
        curvature=Form(curvature, 0.0 if exact else 1.0, 1.0),
        curvature_slope=lambda t: 2 * b * curvature(t) * _inverse_mixture(t, c, b),
        remainder=Form(lambda t: exp_remainder(log_mixture(t, c, b)), least, _INF),
        centred_weight=Form(centred_weight, -least, _INF),
        slope_at_infinity=0.0,
        reference="arXiv 2402.03898",
        parameters={"lam": float(lam)},
    )


def _inverse_mixture(t: Tensor, a: float, b: float) -> Tensor:
    """The reciprocal `1 / (a e^t + b)`."""
    return mixture_ratio(-t, b, a)


class _SkewSlope:
    r"""The slope $f'(u) = 1 - \lambda/v - \log v$ of the skew forward KL, $v = \lambda + (1-\lambda)/u$.

    It has an irrational root $v_*$. With $\kappa = 1 - \lambda/v_*$ and $\tau = \log(v/v_*)$ it equals
    $\kappa (e^{-\tau} - 1) - (e^{-\tau} - 1 + \tau)$, which is free of cancellation for $u \le 1$.
    """

    def __init__(self, lam: Fraction) -> None:
        self._lam = lam
        self._b, self._c = float(lam), float(1 - lam)

    def __call__(self, t: Tensor) -> Tensor:
        root, kappa, rest = _skew_root(self._lam)
        below = t.clamp(max=0.0)
        log_v = log_mixture((root.hi - below) + root.lo, kappa, rest)
        near = kappa * torch.expm1(-log_v) - exp_remainder(-log_v)
        far = self._c * mixture_ratio(-t, self._c, self._b) - log_mixture(-t, self._c, self._b)
        return torch.where(t <= 0, near, far)


@functools.lru_cache(maxsize=256)
def _skew_root(lam: Fraction) -> tuple[TwoFloat, float, float]:
    """The root as `log u` in two floats, kappa, and 1 - kappa."""
    with localcontext() as context:
        context.prec = 90
        share = Decimal(lam.numerator) / Decimal(lam.denominator)
        # The slope falls in v on [1, 3], from 1 - lam > 0 to below zero, with one root.
        low, high = 1.0, 3.0
        for _ in range(53):
            middle = (low + high) / 2
            low, high = (middle, high) if 1 - float(lam) / middle - math.log(middle) > 0 else (low, middle)
        # Newton doubles the digits each time: three steps would do.
        v = Decimal(low)
        for _ in range(5):
            v -= (1 - share / v - v.ln()) / (share / v**2 - 1 / v)
        root = -((v - share) / (1 - share)).ln()
        ratio = share / v
        # About 85 digits are right; fewer are kept, so that a rational root comes out exact.
        context.prec = 70
        return TwoFloat.of(Fraction(+root)), float(1 - ratio), float(ratio)


def _float(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return _INF if value > 0 else -_INF


def _log(value: Fraction) -> float:
    """The logarithm of an exact positive value; a float near one would have lost the digits that count."""
    return math.log1p(float(value - 1)) if value > Fraction(1, 2) else math.log(float(value))


def _parameter(name: str, value: object, valid: Callable[[float], bool], wanted: str) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not valid(float(value)):
        raise InvalidArgumentError(name, f"must be {wanted}, got {value!r}")
    return Fraction(repr(float(value)))
