r"""Divergences in a few passes over probabilities: the value and its gradient in the student's logits (T1).

With $u = q/p$, a form leaves $h$ in a buffer, and the gradient is

$$\frac{\partial D}{\partial z_a} = c\, p_a (E_p h - h_a) \quad\text{or}\quad c\,(p_a \textstyle\sum_b h_b - h_a)$$

depending on whether `h` is the weight $w_f(u)$ or the mass $p\,w_f(u)$, up to the factor $c$ and a constant in the
weight. Values and means are sums over the vocabulary, so that the sums over its parts add up.

The forms compute in the dtype of the buffers. Three choices keep digits near $u = 1$: values are summed in the gauge
$f'(1) = 0$, in which an error of a normaliser counts only to second order (T3); squares are products with $q - p$; and
at $p = q$ gradients are exactly zero. Logits of `-inf` and probabilities that underflow give finite results where
$f(0)$ and $f'(\infty)$ are finite, and else a result that is not finite, but never a wrong one.

A divergence without a form here is evaluated by its own functions (`opdtheory.kernels.reference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.kernels.distributions import Distributions, Row, affine, row_dot, row_sum

__all__ = ["Filled", "Form", "fast_form"]

# Outside, rounding would lose relevant differences, and the reference form takes over.
_SHARE = 1 / 16
_LARGEST_ORDER = 4.0


class Filled(NamedTuple):
    """The result of a form: `h`, and for each row the value and the sum of `h` under `p` (of `h` itself, if a mass)."""

    h: Tensor
    value: Row
    mean: Row


@dataclass(frozen=True)
class Form:
    r"""How a divergence is evaluated on a chunk.

    Attributes:
        kind: whether `h` is a weight or a mass.
        factor: the $c$ of the gradient.
        fill: computes `h`, value and mean from the distributions, all times their total except a weight.
        guardable: whether guarded quotients make every result finite.
        by_log_ratio: whether `fill` uses log-ratios.
    """

    kind: Literal["weight", "mass"]
    factor: float
    fill: Callable[[Distributions], Filled]
    guardable: bool = False
    by_log_ratio: bool = False


def fast_form(divergence: Divergence) -> Form | None:
    """The form of a divergence, or None if there is none or only the reference form is accurate."""
    if divergence._own_expr is not None:
        return None
    if divergence.name in _FIXED:
        return _FIXED[divergence.name]
    make = _BY_PARAMETER.get(divergence.name)
    return None if make is None else make(*divergence.parameters.values())


def _forward_kl(distributions: Distributions) -> Filled:
    # p w = q; without p, which is constant in w: q - p. The value is that of u log u - u + 1.
    log_u, missing = distributions.log_ratio()
    terms = row_dot(distributions.q, log_u) + missing * row_sum(distributions.q)
    excess = distributions.excess()
    mean = row_sum(excess)
    return Filled(excess, terms - mean, mean)


def _reverse_kl(distributions: Distributions) -> Filled:
    # w = log u up to a constant; the value is that of u - 1 - log u.
    log_u, missing = distributions.log_ratio()
    mean = row_dot(distributions.p, log_u)
    return Filled(log_u, row_sum(distributions.excess()) - mean - missing * row_sum(distributions.p), mean)


def _jeffreys(distributions: Distributions) -> Filled:
    # p w = (q - p) + p log u, and D is the sum of (q - p) log u.
    log_u, excess = distributions.log_ratio()[0], distributions.excess()
    value = row_dot(excess, log_u)
    mean = row_sum(excess) + row_dot(distributions.p, log_u)
    return Filled(torch.addcmul(excess, distributions.p, log_u, out=log_u), value, mean)


def _chi2(distributions: Distributions) -> Filled:
    # p (u^2 - 1) = (q - p)(u + 1), and D is the sum of (q - p)(u - 1).
    ratio, excess = distributions.log_ratio()[0].exp_(), distributions.excess()
    product, difference = row_dot(excess, ratio), row_sum(excess)
    return Filled(torch.addcmul(excess, excess, ratio, out=ratio), product - difference, product + difference)


def _neyman_chi2(distributions: Distributions) -> Filled:
    # p (1 - 1/u) = (q - p)/u, and D is the sum of (q - p)(1 - 1/u).
    inverse, excess = distributions.log_ratio()[0].neg_().exp_(), distributions.excess()
    mean = row_dot(excess, inverse)
    return Filled(inverse.mul_(excess), row_sum(excess) - mean, mean)


def _hellinger(distributions: Distributions) -> Filled:
    # p (sqrt(u) - 1) = sqrt(p) (sqrt(q) - sqrt(p))
    root = torch.sqrt(distributions.p, out=distributions.buffers.h)
    difference = torch.sqrt(distributions.q, out=distributions.buffers.x).sub_(root)
    value = row_dot(difference, difference)
    mass = root.mul_(difference)
    return Filled(mass, value, row_sum(mass))


def _total_variation(distributions: Distributions) -> Filled:
    excess = distributions.excess()
    sign = torch.sign(excess, out=distributions.buffers.h)
    return Filled(sign, row_dot(excess, sign) / 2, row_dot(distributions.p, sign))


def _le_cam(distributions: Distributions) -> Filled:
    # With r = (q - p)/(q + p): w = r (r + 2), and D is the sum of (q - p) r.
    excess, total = distributions.excess(), torch.add(distributions.p, distributions.q, out=distributions.buffers.h)
    ratio = torch.div(excess, distributions.guard(total), out=total)
    value = row_dot(excess, ratio)
    weight = ratio.addcmul_(ratio, ratio, value=0.5)
    return Filled(weight, value, row_dot(distributions.p, weight))


def _inside(share: float) -> bool:
    return _SHARE <= share <= 1 - _SHARE


def _skew_jsd(beta: float) -> Form | None:
    return _mixed(beta) if _inside(beta) else None


def _mixed(beta: float) -> Form:
    rest = 1.0 - beta

    def fill(distributions: Distributions) -> Filled:
        # log u and log(m/p) come from the same quotient, whose rounding counts only to second order.
        ratio = distributions.teacher_over(distributions.student_divisor())
        teacher = distributions.teacher_sum(torch.log(ratio, out=distributions.buffers.x))
        weight = affine(ratio, beta, rest).log_()
        mean = row_dot(distributions.p, weight)
        return Filled(weight, beta * (teacher - distributions.teacher_sum(weight)) - rest * mean, mean)

    return Form("weight", rest, fill, guardable=True)


def _skew_forward_kl(lam: float) -> Form | None:
    if lam == 0.0:
        return _FIXED["forward_kl"]
    if not _inside(lam):
        return None
    rest = 1.0 - lam

    def fill(distributions: Distributions) -> Filled:
        # With r = q/m: w = (1 - lam) r; the value is that of f - (1 - lam)(u - 1).
        difference = row_sum(distributions.excess())
        mixture = torch.lerp(distributions.p, distributions.q, lam, out=distributions.buffers.h)
        ratio = distributions.teacher_over(distributions.guard(mixture))
        value = row_dot(distributions.q, torch.log(ratio, out=distributions.buffers.x)) - rest * difference
        weight = ratio.sub_(1.0)
        return Filled(weight, value, row_dot(distributions.p, weight))

    return Form("weight", rest, fill, guardable=True)


def _skew_reverse_kl(lam: float) -> Form | None:
    if lam == 0.0:
        return _FIXED["reverse_kl"]
    if not _inside(lam):
        return None
    rest = 1.0 - lam

    def fill(distributions: Distributions) -> Filled:
        # With v = m/p: w = log v + lam/v - 1; the value is that of f + (1 - lam)(u - 1).
        difference = row_sum(distributions.excess())
        mixture = distributions.teacher_over(distributions.student_divisor())
        mixture = affine(mixture, rest, lam)
        log_mixture = torch.log(mixture, out=distributions.buffers.x)
        value = rest * difference - row_dot(distributions.p, log_mixture)
        weight = log_mixture.add_(mixture.reciprocal_().sub_(1.0), alpha=lam)
        return Filled(weight, value, row_dot(distributions.p, weight))

    return Form("weight", 1.0, fill, guardable=True)


def _alpha(order: float) -> Form | None:
    if order in _ORDERS:
        name, multiple = _ORDERS[order]
        return _multiple(_FIXED[name], multiple)
    if abs(order) > _LARGEST_ORDER or min(abs(order), abs(order - 1)) < _SHARE:
        return None
    return _alpha_by_student(order) if order < 0.5 else _alpha_by_teacher(order)


def _alpha_by_student(order: float) -> Form:
    def fill(distributions: Distributions) -> Filled:
        # a w = u^a - 1, and D = E_p[w]/(a - 1).
        weight = _power(distributions, order)
        mean = row_dot(distributions.p, weight)
        difference = row_sum(distributions.excess())
        return Filled(weight, (mean / order - difference) / (order - 1), mean)

    return Form("weight", 1 / order, fill, by_log_ratio=True)


def _alpha_by_teacher(order: float) -> Form:
    def fill(distributions: Distributions) -> Filled:
        # a p w = (q - p) + q (u^(a-1) - 1)
        power = _power(distributions, order - 1)
        terms, excess = row_dot(distributions.q, power), distributions.excess()
        difference = row_sum(excess)
        mass = torch.addcmul(excess, distributions.q, power, out=power)
        return Filled(mass, (terms / (order - 1) - difference) / order, difference + terms)

    return Form("mass", 1 / order, fill, by_log_ratio=True)


def _power(distributions: Distributions, exponent: float) -> Tensor:
    """The difference `u**exponent - 1` in `h`."""
    log_u, missing = distributions.log_ratio()
    # The exponents are not small, so expm1, five times as slow, would gain digits only near u = 1.
    return affine(log_u, exponent, exponent * missing).exp_().sub_(1.0)


def _multiple(form: Form, factor: float) -> Form:
    def fill(distributions: Distributions) -> Filled:
        filled = form.fill(distributions)
        return filled._replace(value=factor * filled.value)

    return form if factor == 1.0 else dataclasses.replace(form, factor=factor * form.factor, fill=fill)


_FIXED: dict[str, Form] = {
    "reverse_kl": Form("weight", 1.0, _reverse_kl, by_log_ratio=True),
    "forward_kl": Form("mass", 1.0, _forward_kl, by_log_ratio=True),
    "jsd": _mixed(0.5),
    "chi2": Form("mass", 1.0, _chi2, by_log_ratio=True),
    "neyman_chi2": Form("mass", 2.0, _neyman_chi2, by_log_ratio=True),
    "hellinger": Form("mass", 1.0, _hellinger),
    "total_variation": Form("weight", 0.5, _total_variation),
    "le_cam": Form("weight", 2.0, _le_cam, guardable=True),
    "jeffreys": Form("mass", 1.0, _jeffreys, by_log_ratio=True),
}
_BY_PARAMETER: dict[str, Callable[[float], Form | None]] = {
    "alpha": _alpha,
    "skew_jsd": _skew_jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}
# Members of the power family that are multiples of other entries, up to gauge.
_ORDERS: dict[float, tuple[str, float]] = {
    -1.0: ("neyman_chi2", 0.5),
    0.0: ("reverse_kl", 1.0),
    0.5: ("hellinger", 2.0),
    1.0: ("forward_kl", 1.0),
    2.0: ("chi2", 0.5),
}
