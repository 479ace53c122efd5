"""Weighted sums of divergences: as text, as objects, and what is no such sum."""

from __future__ import annotations

import math
import pickle

import pytest
import sympy
import torch

import opdtheory as opd
from opdtheory.divergences import divergence, hellinger, reverse_kl, weight_of
from opdtheory.divergences.divergence import weighted_sum
from opdtheory.errors import InvalidArgumentError
from tests.tolerances import ALGEBRA

SUMS = {
    "9*reverse_kl + forward_kl": ((9.0, "reverse_kl"), (1.0, "forward_kl")),
    "0.5 * skew_jsd(beta=0.1)+1e+1*chi2": ((0.5, "skew_jsd(beta=0.1)"), (10.0, "chi2")),
    "alpha(alpha=-.5) + .25*le_cam + 2.*hellinger": ((1.0, "alpha(alpha=-0.5)"), (0.25, "le_cam"), (2.0, "hellinger")),
    "3*jsd": ((3.0, "jsd"),),
}

FORMS = ("generator", "log_slope", "weight", "curvature")


@pytest.mark.parametrize("text", SUMS)
def test_a_sum_is_the_sum_of_its_terms(text):
    total = divergence(text)
    assert total.terms == tuple((weight, divergence(name)) for weight, name in SUMS[text])
    log_u = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64)
    for form in FORMS:
        by_hand = sum(weight * getattr(divergence(name), form)(log_u) for weight, name in SUMS[text])
        assert float((getattr(total, form)(log_u) - by_hand).abs().max()) <= ALGEBRA * float(by_hand.abs().max())


@pytest.mark.parametrize("text", SUMS)
def test_the_expression_is_the_second_route_to_the_forms(text):
    total, u = divergence(text), sympy.Symbol("u", positive=True)
    assert total.expr.subs(u, 1) == 0
    for expression, form in ((total.expr, "generator"), (weight_of(total.expr), "weight")):
        for log_u in (-1.5, 0.25, 2.0):
            by_sympy = float(expression.subs(u, sympy.exp(sympy.Rational(str(log_u)))).evalf(30))
            found = float(getattr(total, form)(torch.tensor(log_u, dtype=torch.float64)))
            assert abs(found - by_sympy) <= 1e-12 * max(1.0, abs(by_sympy))


def test_the_limits_of_a_sum():
    # Terms that grow with opposite signs: the forward KL's f grows faster than the reverse KL's falls.
    total = divergence("9*reverse_kl + forward_kl")
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    assert total.generator(ends).tolist() == [math.inf, math.inf]
    assert total.weight(ends).tolist() == [-math.inf, math.inf]
    assert (total.at_zero, total.slope_at_infinity) == (math.inf, math.inf)
    assert divergence("2*hellinger + reverse_kl").slope_at_infinity == 2 * hellinger.slope_at_infinity
    assert divergence("2*hellinger + reverse_kl").generator(ends).tolist() == [math.inf, math.inf]
    assert divergence("2*hellinger + 3*jsd").at_zero == 2 * hellinger.at_zero + 3 * divergence("jsd").at_zero


@pytest.mark.parametrize("text", SUMS)
def test_a_sum_is_given_back_by_its_label_and_by_pickle(text):
    total = divergence(text)
    assert divergence(total.label) == total == pickle.loads(pickle.dumps(total))
    assert hash(divergence(total.label)) == hash(total)
    assert repr(total) == total.label


def test_operators_and_text_agree():
    assert 9 * reverse_kl + divergence("forward_kl") == divergence("9*reverse_kl + forward_kl")
    assert 2 * (3 * reverse_kl + hellinger) == divergence("6*reverse_kl + 2*hellinger")
    assert reverse_kl + reverse_kl == divergence("2*reverse_kl") == reverse_kl * 2
    assert 1 * reverse_kl is divergence("1*reverse_kl") is reverse_kl
    assert divergence("reverse_kl + 0*chi2") is reverse_kl
    own = opd.Divergence.from_expr(sympy.sympify("(u - 1)**2/u").subs("u", sympy.Symbol("u")), name="mine")
    mixed = own + 2 * hellinger
    log_u = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    by_hand = own.weight(log_u) + 2 * hellinger.weight(log_u)
    assert float((mixed.weight(log_u) - by_hand).abs().max()) <= ALGEBRA * float(by_hand.abs().max())


@pytest.mark.parametrize(
    "text",
    ["9*", "reverse_kl +", "+chi2", "-1*chi2", "2 chi2", "chi2 - jsd", "chi2 + + jsd", "a*chi2", "1e999*chi2"]
    + ["0*chi2", "chi2 + nope", "chi2*2", "(chi2 + jsd)*2", "3**chi2", "nan*chi2", "skew_jsd + chi2", "", "+", "*"],
)
def test_what_is_no_sum_is_refused(text):
    with pytest.raises(InvalidArgumentError):
        divergence(text)


@pytest.mark.parametrize("weight", [-1, -0.5, math.inf, math.nan])
def test_weights_that_are_no_weights_are_refused(weight):
    with pytest.raises(InvalidArgumentError, match="weights of at least 0"):
        weight * reverse_kl
    with pytest.raises(InvalidArgumentError, match="weights of at least 0"):
        weighted_sum(((1.0, hellinger), (weight, reverse_kl)))


@pytest.mark.bad_input
@pytest.mark.parametrize("weight", ["2", True, None])
def test_only_numbers_multiply_a_divergence(weight):
    with pytest.raises(TypeError):
        weight * reverse_kl
    with pytest.raises(TypeError):
        reverse_kl + weight
