"""Weights, implied generators, gauge, scale and convexity: the corollaries of T4 and their false twins."""

from __future__ import annotations

from itertools import pairwise

import pytest
import sympy
import torch
from sympy import Abs, Max, Min, Rational, exp, log, sign, sqrt

from opdtheory import divergences
from opdtheory.divergences import (
    convexity,
    divergence,
    implied_generator,
    is_convex,
    same_divergence,
    same_up_to_scale,
    weight_of,
)
from opdtheory.divergences.transform import on_tensors
from opdtheory.errors import InvalidArgumentError
from tests.sparse import some
from tests.tolerances import ALGEBRA

u = divergences.u
plain = sympy.Symbol("u")  # without assumptions

CATALOGUE = (
    *(d for d in map(lambda n: getattr(divergences, n), divergences.names()) if not callable(d)),
    divergence("skew_jsd", beta=0.1),
    divergence("alpha", alpha=0.3),
    divergence("alpha", alpha=0.0),
    divergence("alpha", alpha=1.0),
    divergence("skew_forward_kl", lam=0.1),
    divergence("skew_reverse_kl", lam=0.1),
)

COROLLARIES = {
    "k1 as loss": (sympy.Integer(0), sympy.Integer(0), True),
    "k2 as loss": (log(u), u - 1 - log(u), True),
    "k3 as loss": (u, u * log(u) - u + 1, True),
    "k3 as reward": (log(u) - u + 1, -log(u) - u * log(u) + 2 * u - 2, False),
    "OPD forward KL": (-u * log(u), -u * log(u) ** 2 / 2, False),
    "OPD chi2": (-((u - 1) ** 2), 2 * u * log(u) - u**2 + 1, False),
    "Box-Cox 1/2": (2 * (sqrt(u) - 1), divergence("alpha", alpha=0.5).expr, True),
    "Box-Cox -1": (1 - 1 / u, divergence("alpha", alpha=-1.0).expr, True),
    "sign": (sign(log(u)), Abs(u - 1), True),
    "OPD JSD": (
        -divergence("jsd").expr,
        None,
        False,
    ),
    "OPD JSD, gauge -log(2)/2": (-divergence("jsd").expr + log(2) / 2 * (u - 1), None, True),
    "OPD hellinger, gauge -1": (-divergence("hellinger").expr + (u - 1), None, True),
}


@pytest.mark.parametrize(("weight", "generator", "convex"), some(COROLLARIES.values(), ids=COROLLARIES))
def test_corollaries_of_t4(weight: sympy.Expr, generator: sympy.Expr | None, convex: bool) -> None:
    implied = implied_generator(weight)
    if generator is not None:
        assert same_divergence(implied, generator)
    assert is_convex(implied) is convex
    assert implied.subs(u, 1) == 0


def test_clipped_weight_is_a_genuine_divergence() -> None:
    implied = implied_generator(Max(-2, Min(2, log(u))))
    assert is_convex(implied)
    # Between the clips the reverse KL, beyond them a multiple of u plus a constant: no curvature.
    assert same_divergence(implied.subs(u, 2), (u - 1 - log(u)).subs(u, 2))
    assert sympy.diff(implied, u, 2).subs(u, 100) == 0
    assert not same_divergence(implied, u - 1 - log(u))
    recovered = weight_of(implied)
    assert [recovered.subs(u, x) for x in (exp(-3), 1, 2, exp(3))] == [-2, 0, log(2), 2]


@pytest.mark.parametrize("d", some(CATALOGUE, ids=(d.label for d in CATALOGUE)))
def test_implied_generator_inverts_weight_of(d: divergences.Divergence) -> None:
    implied = implied_generator(weight_of(d.expr))
    assert same_divergence(implied, d.expr)
    assert not same_divergence(implied, d.expr + (u - 1) ** 2)
    assert not same_divergence(implied, -implied)
    assert is_convex(d.expr)


@pytest.mark.parametrize("d", some(CATALOGUE), ids=lambda d: d.label)
def test_weight_of_inverts_implied_generator_up_to_a_constant(d: divergences.Divergence) -> None:
    weight = d.expr  # any function of u serves as a weight
    difference = weight_of(implied_generator(weight)) - weight
    for k in (Rational(1, 3), Rational(5, 2), 7):
        assert abs(sympy.N((difference - difference.subs(u, 1)).subs(u, k), 40)) < 1e-35


def test_gauge_of_implied_generator() -> None:
    implied = implied_generator(u**2 + 5)
    assert implied.subs(u, 1) == 0 and sympy.diff(implied, u).subs(u, 1) == 0


def test_symbols_called_u_are_one() -> None:
    assert weight_of(plain * log(plain)) == u
    assert implied_generator(log(plain)) == u - log(u) - 1
    assert same_divergence(plain * log(plain), u * log(u))


def test_symbolic_exponent() -> None:
    a = sympy.Symbol("a")
    implied = implied_generator((u**a - 1) / a)
    for value in (Rational(1, 2), Rational(3), Rational(-2)):
        assert same_divergence(implied.subs(a, value), divergence("alpha", alpha=float(value)).expr)


def test_same_divergence_is_gauge_only() -> None:
    assert same_divergence(-log(u), u - 1 - log(u))
    assert same_divergence(Abs(u - 1), 2 * Max(0, u - 1))
    assert not same_divergence(u * log(u), -log(u))
    assert not same_divergence(u * log(u), u * log(u) + 1)
    assert not same_divergence(2 * u * log(u), u * log(u))
    assert not same_divergence(Abs(u - 1), Max(0, u - 1))
    assert not same_divergence(u * log(u), u * log(u) + (u - 1) * Rational(1, 10**12) * log(u))


def test_same_up_to_scale() -> None:
    assert same_up_to_scale(2 * u * log(u) + 3 * (u - 1), u * log(u)) == 2
    assert same_up_to_scale(divergence("alpha", alpha=0.5).expr, divergence("hellinger").expr) == 2
    assert same_up_to_scale(Abs(u - 1) / 2, Max(0, u - 1)) == 1
    assert same_up_to_scale(u * log(u), -log(u)) is None
    assert same_up_to_scale(-u * log(u), u * log(u)) is None
    assert same_up_to_scale(u - 1, 2 * (u - 1)) == 1


@pytest.mark.parametrize(
    ("expr", "convex"),
    (
        (u * log(u), True),
        (-log(u), True),
        (Abs(u - 1), True),
        (Max(0, u - 3, 2 * u - 9), True),
        (sqrt(u), False),
        (Min(0, u - 3), False),
        (u * log(u) ** 2 / 2, False),
        (u * log(u) + log(u), False),
        (u**2 + sympy.sin(3 * u) / 8, False),
        (u**2 + sympy.sin(3 * u) / 5, True),
    ),
    ids=str,
)
def test_is_convex(expr: sympy.Expr, convex: bool) -> None:
    if expr.has(sympy.sin):
        # f'' = 2 - 9 a sin 3u: negative somewhere only if 9 a > 2.
        convex = float(expr.coeff(sympy.sin(3 * u))) * 9 <= 2
    assert is_convex(expr) is convex


@pytest.mark.parametrize("function", (weight_of, implied_generator, is_convex))
@pytest.mark.parametrize("argument", ("log(u)", None, [1]), ids=str)
def test_what_is_no_expression_is_refused(function: object, argument: object) -> None:
    with pytest.raises(InvalidArgumentError, match="must be a sympy expression in u, got "):
        function(argument)


def test_weights_without_an_implied_generator_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at u = 1"):
        implied_generator(1 / (u - 1))
    with pytest.raises(InvalidArgumentError, match="no integral"):
        implied_generator(sympy.Function("g")(u))


def test_a_dent_beside_one_and_one_far_away_are_found() -> None:
    # f'' = 1 - 2 w^3/((u - 1)^2 + w^2)^(3/2): negative for |u - 1| < 0.77 w only.
    width = Rational(1, 10**4)
    assert not is_convex((u - 1) ** 2 / 2 - 2 * width * sqrt((u - 1) ** 2 + width**2))
    assert is_convex((u - 1) ** 2 / 2 - width * sqrt((u - 1) ** 2 + width**2) / 2)
    points = convexity._grid()
    assert points[0] == -points[-1] and points == sorted(points)
    points = [t for t in points if abs(t) <= 60]
    assert points[0] == -60 and points[-1] == 60
    assert max(b - a for a, b in pairwise(points)) < 0.125


@pytest.mark.parametrize(
    "expression",
    [
        u * log(u) - log(2) * sqrt(u) + exp(-u) * sympy.E,
        sympy.tanh(u) + sign(u - 1) * Abs(u - Rational(3, 2)) + u**0.3,
        sympy.Piecewise((1 - u * log(2), u < Rational(1, 2)), (log(u), u < 2), (u - sympy.E, True)),
    ],
)
def test_an_expression_is_evaluated_on_tensors(expression: sympy.Expr) -> None:
    points = [0.1, 0.5, 1.25, 2.0, 7.0]
    found = on_tensors(u, expression)(torch.tensor(points, dtype=torch.float64))
    wanted = [float(expression.subs(u, Rational(point)).evalf(30)) for point in points]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=ALGEBRA, atol=0.0)
