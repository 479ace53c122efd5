"""Generators from text: what is read exactly, and what is refused at once."""

from __future__ import annotations

import time

import pytest
from sympy import Abs, Max, Rational, exp, log, sqrt

import opdtheory as opd
from opdtheory.divergences.parsing import generator_from_text
from opdtheory.errors import InvalidArgumentError
from opdtheory.training.config import TrainConfig

u = opd.u

READ = {
    "u*log(u) - 7*(u-1)": u * log(u) - 7 * (u - 1),
    "u*log(u) + 1e-3*(u-1)": u * log(u) + Rational(1, 1000) * (u - 1),
    "2.5E+2*(u-1)**2": 250 * (u - 1) ** 2,
    "-log(u) + 0.1*(u - 1)": -log(u) + (u - 1) / 10,
    "Abs(u-1)/2": Abs(u - 1) / 2,
    "Max(0, u - 3, 2*u - 9)": Max(0, u - 3, 2 * u - 9),
    " +(1 - sqrt(u)) \n": 1 - sqrt(u),
    "exp(u-1) - 1": exp(u - 1) - 1,
    "(u**1.5 - 1.5*u + .5)*4/3": (u ** Rational(3, 2) - Rational(3, 2) * u + Rational(1, 2)) * 4 / 3,
    "1_000*(u-1)**2": 1000 * (u - 1) ** 2,
}


@pytest.mark.parametrize(("text", "expr"), READ.items())
def test_numbers_are_read_as_exact_fractions(text, expr):
    assert (generator_from_text(text) - expr).simplify() == 0


REFUSED = {
    "u*9**9**9": "exponents of at most 1000",
    "u*10**10**6": "exponents of at most 1000",
    "u**99999999": "exponents of at most 1000",
    "u*(2**1000)**1000": "numbers of at most",
    "u*exp(exp(exp(10)))": "numbers of at most",
    "u*1e999999999": "numbers of at most",
    "u*" + "9" * 1500: "numbers of at most",
    "u*" + "9" * 5000: "characters, got 5002",
    "u*" + "9" * 10**6: "characters",
    "u/0": "must not divide by zero",
    "u/(1/3 - 2/6)": "must not divide by zero",
    "u*0**-1": "must not divide by zero",
    "u*log(0)": "real and finite constants",
    "u*sqrt(-1)": "real and finite constants",
    "u*1j": "real numbers only",
    "u*True": "real numbers only",
    "u*'a'": "real numbers only",
    "u*log(u)\0": "printable",
    "u\x1b[31m": "printable",
    "__import__('os').system('true')*u": "must contain only u",
    "u.diff": "must contain only u",
    "u if u else 1": "must contain only u",
    "v*u": "got v",
    "u*log(u, 2)": "log 1 argument",
    "Max()*u": "at least 1 argument",
    "u!": "expression in u",
    "(" * 500 + "u" + ")" * 500: "expression in u",
    "u" + "+0" * 900: "expression in u",
}


@pytest.mark.parametrize(("text", "problem"), REFUSED.items(), ids=[text[:24] for text in REFUSED])
def test_other_text_is_refused_at_once(text, problem):
    start = time.monotonic()
    with pytest.raises(InvalidArgumentError, match=problem):
        generator_from_text(text)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize("text", ["u*9**9**9", "u/0", "u*10**10**6", "u*log(u)\0", "u*nan", "u*oo", "zoo*u"])
def test_a_configuration_refuses_it_too(text):
    with pytest.raises(InvalidArgumentError, match="divergence"):
        TrainConfig(divergence=text).loss()
