"""What `Divergence.from_expr` refuses, by name and within seconds, and what it accepts."""

from __future__ import annotations

import time

import numpy as np
import pytest
import sympy
from sympy import Abs, Eq, Float, I, Max, Piecewise, Rational, Symbol, cosh, exp, log, nan, oo, sqrt, tan, zoo

import opdtheory as opd
from opdtheory.divergences import convexity
from opdtheory.divergences.intervals import enclosures
from opdtheory.errors import InvalidArgumentError
from tests.sparse import some

u = opd.u
SECONDS = 10.0  # twice the promise, for a machine that is busy


SHALLOW = Rational(1, 1000)


def dent(at, width, depth=SHALLOW):
    """A parabola with a narrow dent, deep enough for a negative curvature."""
    return (u - 1) ** 2 * (1 - depth * exp(-(((u - at) / width) ** 2)))


REFUSED = {
    "a jump down": (Piecewise(((u - 1) ** 2, u < 7), ((u - 1) ** 2 - 5, True)), "jumps from 31.* to 36"),
    "a jump up": (Piecewise(((u - 1) ** 2, u < 7), ((u - 1) ** 2 + 5, True)), "jumps from 36.* to 41"),
    "a small jump": (Piecewise((-log(u), u < 3), (-log(u) - Rational(1, 10**9), True)), "jumps"),
    "a jump below one": (Piecewise((5 - u, u < Rational(1, 9)), ((u - 1) ** 2, True)), "jumps"),
    "one point off": (Piecewise(((u - 1) ** 2, u < 7), (50, Eq(u, 7)), ((u - 1) ** 2, True)), "jumps from 36.* to 50"),
    "a slope that falls": (Piecewise((2 * (u - 1), u < 2), (u, True)), "f' falls by 1.* at u = 2"),
    "a fall beyond the grid": (u * log(u) - exp(-160) * u**2 + exp(-160), "f''.* < 0"),
    "a fall far beyond it": (u * log(u) - exp(-1500) * (u**2 - 1), "f''.* < 0"),
    "a fall towards zero": (-log(u) - exp(-150) * (1 / u - 1), "f''|f' falls"),
    "a slow fall": (u * log(u) - (u * log(u) ** 2) / 400, "f''.* < 0"),
    "nan": (nan, "finite coefficients, got nan"),
    "nan in a term": (nan * u + log(u), "finite coefficients, got nan"),
    "complex infinity": (zoo * u, "finite coefficients, got zoo"),
    "infinity": (oo * (u - 1), "finite coefficients, got oo"),
    "minus infinity": (-oo * (u - 1), "finite coefficients, got -?oo"),
    "imaginary": (I * (u - 1) ** 2, "real, got the imaginary unit"),
    "complex beside": ((u - 1) ** 2 + I * log(u), "real, got the imaginary unit"),
    "complex below one": ((u - 1) * sqrt(u - Rational(1, 2)), "not real|not finite"),
    "a free symbol": (Symbol("v") * (u - 1) ** 2, "free symbols? v"),
    "a dent of 1e-4": (dent(3, Rational(1, 10**4)), "f''.* < 0"),
    "a dent of 1e-6": (dent(20, Rational(1, 10**6)), "f''.* < 0"),
    "a dent below one": (dent(Rational(3, 10), Rational(1, 10**5)), "f''.* < 0"),
    "a rational dent": (
        (u - 1) ** 2 - Rational(1, 10**8) * (u - 1) ** 2 / ((u - 3) ** 2 + Rational(1, 10**9)),
        "f''.* < 0",
    ),
    "a dent in floats": (
        (u - 1) ** 2 - Float(1e-3) * (u - 1) ** 2 * exp(-Float(1e8) * (u - Float(3.3)) ** 2),
        "f''.* < 0",
    ),
    "a dent in a piece": (Piecewise((1 - u, u < 1), (dent(3, Rational(1, 10**4)), True)), "f''.* < 0"),
    "a pole": (1 / (u - 5) ** 2 - Rational(1, 16), "not finite at u = 5"),
    "a logarithmic pole": (-log(Abs(u - 5)) + log(4), "not finite at u = 5"),
    "poles of the tangent": (tan(u) - tan(1), "f''|f' falls"),
    "steps": (sympy.floor(u) - 1, "step function"),
    "a tower of powers": (exp(exp(u)) - exp(exp(1)), "exponent of an exponent"),
}


@pytest.mark.parametrize(("expr", "problem"), some(REFUSED.values(), ids=REFUSED))
def test_what_is_no_generator_is_refused_in_time(expr: sympy.Expr, problem: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidArgumentError, match=problem):
        opd.Divergence.from_expr(expr)
    assert time.monotonic() - start < SECONDS


ACCEPTED = {
    "total variation": Abs(u - 1) / 2,
    "total variation in pieces": Piecewise(((1 - u) / 2, u < 1), ((u - 1) / 2, True)),
    "two pieces": Piecewise((1 - u, u < 1), ((u - 1) ** 2, True)),
    "Huber": Piecewise(((u - 1) ** 2, u < 2), (2 * u - 3, True)),
    "hockey stick": Max(0, u - 3, 2 * u - 9),
    "flat at one": sympy.expand((u - 1) ** 4),
    "two KLs": 3 * u * log(u) - 2 * log(u),
    "square root": 1 - sqrt(u),
    "hyperbolic": cosh(u - 1) - 1,
    "exponential": exp(u) - exp(1),
    "a dent too shallow": dent(3, Rational(1, 100), Rational(1, 10**7)),
    "a fall that is outweighed": u * log(u) + exp(-160) * (u**2 - 1),
    "a root that cancels": (u**2 - 1) * (u - 1) ** 2 / (u + 1) / (u - 1) + (u - 1) ** 2,
}


@pytest.mark.parametrize("expr", ACCEPTED.values(), ids=ACCEPTED)
def test_generators_are_accepted(expr: sympy.Expr) -> None:
    assert convexity.check_generator(expr) == expr


@pytest.mark.parametrize("name", some(["jsd", "jeffreys", "chi2", "le_cam", "skew_jsd(beta=0.3)", "alpha(alpha=2.7)"]))
def test_entries_are_accepted_and_their_negatives_are_not(name: str) -> None:
    expr = opd.divergence(name).expr
    convexity.check_generator(expr)
    with pytest.raises(InvalidArgumentError, match="convexity"):
        convexity.check_generator(-expr)


@pytest.mark.parametrize(
    "expr",
    [1 / u - 1 / (u + 1), log(u) ** 2 / u**3, exp(-((u - 2) ** 2)) * (u - 1), u**-1.5 + (u - 3) ** 3, sqrt(u + 2) / u],
    ids=str,
)
def test_enclosures_hold_every_value(expr: sympy.Expr) -> None:
    left = np.linspace(-20, 20, 81)
    for width in (0.5, 1e-3, 0.0):
        low, high, _ = enclosures(expr, left, left + width)
        for a, lower, upper in zip(left, low, high, strict=True):
            for t in (a, a + width / 3, a + width):
                value = float(sympy.N(expr.subs(u, sympy.exp(Float(t, 40))), 30))
                assert lower <= value <= upper


def test_an_enclosure_that_forgets_an_end_is_noticed() -> None:
    # The square of an interval around zero reaches zero, not only the squares of its ends.
    low, high, _ = enclosures((u - 1) ** 2, np.array([-1.0]), np.array([1.0]))
    assert low[0] == 0.0 and high[0] >= (np.e - 1) ** 2
