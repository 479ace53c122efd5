"""The primitives in log u against mpmath."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import pytest
import torch
from torch import Tensor

from opdtheory.divergences.logspace import (
    TwoFloat,
    _two_product,
    box_cox,
    exp_product,
    exp_remainder,
    expm1_product,
    log_mixture,
    mixture_ratio,
    mul_exp,
    sigmoid,
    xlogx_remainder,
)
from tests.sparse import some

_SMALL = [s * 10.0**-k for k in (1, 2, 4, 8, 12, 16, 40, 140) for s in (-1, 1)]
GRID = tuple([*torch.linspace(-700, 700, 141, dtype=torch.float64).tolist(), *_SMALL, *(k / 8 for k in range(-32, 33))])


def errors(function: Callable[[Tensor], Tensor], truth: Callable[[mpmath.mpf], mpmath.mpf]) -> float:
    """The largest relative error over the grid in units of 2**-53, where the true value is normal."""
    values = function(torch.tensor(GRID, dtype=torch.float64)).tolist()
    largest = 0.0
    for t, value in zip(GRID, values, strict=True):
        with mpmath.workdps(1000):
            exact = truth(mpmath.mpf(t))
            if not 2.0**-1022 <= mpmath.fabs(exact) < mpmath.mpf(2) ** 1024:
                assert not math.isnan(value) and (exact < 1 or math.isinf(value))
                continue
            largest = max(largest, float(mpmath.fabs(mpmath.mpf(value) - exact) / mpmath.fabs(exact)) * 2.0**53)
    return largest


def test_two_product_is_exact() -> None:
    ts = [0.1, -3.7, 123.456, 7e-9, -0.3333333333333333]
    for hi in (0.3, -2.7182818284590455, 1e-5, 1.1e151 / 1e151):
        product, error = _two_product(torch.tensor(ts, dtype=torch.float64), TwoFloat(hi, 0.0))
        for t, a, b in zip(ts, product.tolist(), error.tolist(), strict=True):
            assert Fraction(a) + Fraction(b) == Fraction(hi) * Fraction(t)
    for lo in (1e-17, -2e-18):
        _, error = _two_product(torch.tensor(ts, dtype=torch.float64), TwoFloat(0.5, lo))
        assert error.tolist() == [lo * t for t in ts]


def _mpf(value: Fraction) -> mpmath.mpf:
    return mpmath.mpf(value.numerator) / value.denominator


def test_exp_remainder() -> None:
    assert errors(exp_remainder, lambda t: mpmath.exp(t) - 1 - t) < 12
    assert errors(lambda t: torch.exp(t) - 1 - t, lambda t: mpmath.exp(t) - 1 - t) > 1e6


def test_xlogx_remainder() -> None:
    assert errors(xlogx_remainder, lambda t: t * mpmath.exp(t) - mpmath.exp(t) + 1) < 12


@pytest.mark.parametrize("a", some([0.0, 1e-300, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0]))
def test_mixtures(a: float) -> None:
    exact = Fraction(repr(a))
    b = float(1 - exact)
    weight, rest = _mpf_pair(exact)
    assert errors(lambda t: log_mixture(t, a, b), lambda t: mpmath.log(weight * mpmath.exp(t) + rest)) < 12
    assert errors(lambda t: mixture_ratio(t, a, b), lambda t: 1 / (weight + rest * mpmath.exp(-t))) < 12


def _mpf_pair(exact: Fraction) -> tuple[mpmath.mpf, mpmath.mpf]:
    with mpmath.workdps(1000):
        return _mpf(exact), _mpf(1 - exact)


def test_the_check_refutes_the_plain_logarithm() -> None:
    truth = lambda t: mpmath.log(mpmath.exp(t) / 2 + mpmath.mpf(1) / 2)  # noqa: E731
    assert errors(lambda t: torch.log(0.5 * torch.exp(t) + 0.5), truth) > 1e6


@pytest.mark.parametrize("a", (-3.7, -1e-12, 1e-12, 0.3, 0.999999999999, 1.7, 40.0))
def test_products_in_the_exponent(a: float) -> None:
    exact = Fraction(repr(a))
    pair = TwoFloat.of(exact)
    with mpmath.workdps(1000):
        order = _mpf(exact)
    assert abs(Fraction(pair.hi) + Fraction(pair.lo) - exact) <= abs(exact) * Fraction(2) ** -104
    assert errors(lambda t: exp_product(t, pair), lambda t: mpmath.exp(order * t)) < 12
    assert errors(lambda t: expm1_product(t, pair), lambda t: mpmath.expm1(order * t)) < 12
    assert errors(lambda t: box_cox(t, pair), lambda t: mpmath.expm1(order * t) / order) < 12


def test_the_check_refutes_a_rounded_exponent() -> None:
    assert (
        errors(lambda t: torch.exp(0.3141592653589793 * t), lambda t: mpmath.exp(mpmath.mpf("0.3141592653589793") * t))
        > 50
    )


def test_box_cox_at_zero_is_the_logarithm() -> None:
    t = torch.tensor(GRID, dtype=torch.float64)
    assert torch.equal(box_cox(t, TwoFloat(0.0, 0.0)), t)
    assert torch.equal(box_cox(t, TwoFloat(5e-324, 0.0)), t)


def test_mul_exp_keeps_what_e_to_the_t_would_lose() -> None:
    t = torch.tensor([-740.0, 712.0], dtype=torch.float64)
    factor = torch.tensor([1e30, 1e-30], dtype=torch.float64)
    got = mul_exp(factor, t).tolist()
    for value, x, f in zip(got, t.tolist(), factor.tolist(), strict=True):
        assert value == pytest.approx(float(mpmath.mpf(f) * mpmath.exp(x)), rel=1e-15)
    assert (factor * torch.exp(t)).tolist()[1] == math.inf


def test_sigmoid() -> None:
    assert errors(sigmoid, lambda t: 1 / (1 + mpmath.exp(-t))) < 8


def test_a_mixture_with_next_to_nothing_of_the_ratio() -> None:
    a, t = 1e-305, 701.0
    found = float(log_mixture(torch.tensor(t, dtype=torch.float64), a, 1.0))
    assert found == pytest.approx(float(t + mpmath.log(a + mpmath.exp(-t))), rel=1e-14)
    assert abs(found - float(t + mpmath.log(a))) > 1
