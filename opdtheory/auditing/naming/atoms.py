r"""The functions of $u$ that recovered weights are combined from, each with its implied generator in closed form.

A weight is linear in its atoms, and so is $V[w](u) = u\int_1^u (w(t) - w(1))/t^2\,\mathrm{d}t$ (T4). The generator of a
fitted weight is therefore the same combination of the atoms' generators, and an audit integrates nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from opdtheory.divergences import Divergence, symbol, weight_of
from opdtheory.divergences.registry import parameter_free

if TYPE_CHECKING:
    import sympy

__all__ = ["PARAMETRIC", "Atom", "as_number", "catalogue_atom", "catalogue_atoms", "fixed_atoms"]

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Atom:
    r"""One function of the ratio.

    Attributes:
        label: name such as `u log u`, or a catalogue name.
        values: the function of $\log u$, elementwise on float64 arrays.
        expr: returns the sympy expression in `u`, without an additive constant.
        generator: returns the implied generator, in the gauge $f(1) = f'(1) = 0$; None if there is no closed form.
    """

    label: str
    values: Callable[[Array], Array]
    expr: Callable[[], sympy.Expr]
    generator: Callable[[], sympy.Expr]


def as_number(value: float) -> sympy.Expr:
    """A float as a fraction with a small denominator if it equals one, else as it is."""
    import sympy

    fraction = sympy.Rational(value).limit_denominator(1000)
    return fraction if abs(float(fraction) - value) <= 1e-15 * max(1.0, abs(value)) else sympy.Float(value)


def catalogue_atom(divergence: Divergence) -> Atom:
    """The exact weight $w_f$ of a divergence, whose implied generator is $f$ in the gauge $f'(1) = 0$."""

    def values(log_u: Array) -> Array:
        return divergence.weight(torch.from_numpy(np.ascontiguousarray(log_u))).numpy()

    def expr() -> sympy.Expr:
        if divergence.name == "total_variation":
            return _sign(_log(symbol())) / 2
        return weight_of(divergence.expr).as_independent(symbol(), as_Add=True)[1]

    def generator() -> sympy.Expr:
        u, f = symbol(), divergence.expr
        return f - f.diff(u).subs(u, 1) * (u - 1)

    return Atom(divergence.label, values, expr, generator)


def catalogue_atoms() -> tuple[Atom, ...]:
    """The weights of the catalogue entries that have no parameter."""
    return _atoms(parameter_free())


@functools.lru_cache(maxsize=2)
def _atoms(entries: tuple[Divergence, ...]) -> tuple[Atom, ...]:
    return tuple(map(catalogue_atom, entries))


@functools.cache
def fixed_atoms() -> tuple[Atom, ...]:
    """The dictionary: powers, logarithms and their products, and what stop-gradient estimators are made of."""
    half = np.log(2.0)
    return (
        _atom("log u", lambda t: t, lambda u, L: L, lambda u, L: u - 1 - L),
        _atom("log^2 u", lambda t: t**2, lambda u, L: L**2, lambda u, L: 2 * u - L**2 - 2 * L - 2),
        _atom("log^3 u", lambda t: t**3, lambda u, L: L**3, lambda u, L: 6 * u - L**3 - 3 * L**2 - 6 * L - 6),
        _power("u", 1.0),
        _atom("u log u", lambda t: t * np.exp(t), lambda u, L: u * L, lambda u, L: u * L**2 / 2),
        _atom("u log^2 u", lambda t: t**2 * np.exp(t), lambda u, L: u * L**2, lambda u, L: u * L**3 / 3),
        _power("u^2", 2.0),
        _atom("u^2 log u", lambda t: t * np.exp(2 * t), lambda u, L: u**2 * L, lambda u, L: u * (u * L - u + 1)),
        _power("1/u", -1.0),
        _atom("log(u)/u", lambda t: t * np.exp(-t), lambda u, L: L / u, lambda u, L: u / 4 - (2 * L + 1) / (4 * u)),
        _power("sqrt(u)", 0.5),
        _power("1/sqrt(u)", -0.5),
        _atom("log(1 + u)", lambda t: np.logaddexp(0.0, t), lambda u, L: _log((1 + u) / 2), _log_half_generator),
        _atom(
            "u log((1 + u)/2)",
            lambda t: np.exp(t) * (np.logaddexp(0.0, t) - half),
            lambda u, L: u * _log((1 + u) / 2),
            _u_log_half_generator,
        ),
        _atom(
            "(1 + u) log((1 + u)/2)",
            lambda t: (1 + np.exp(t)) * (np.logaddexp(0.0, t) - half),
            lambda u, L: (1 + u) * _log((1 + u) / 2),
            lambda u, L: _log_half_generator(u, L) + _u_log_half_generator(u, L),
        ),
        _atom(
            "u/(1 + u)",
            lambda t: 1 / (1 + np.exp(-t)),
            lambda u, L: u / (1 + u),
            lambda u, L: u * _log(2 * u / (1 + u)) + (1 - u) / 2,
        ),
        _atom(
            "1/(1 + u)^2",
            lambda t: (1 + np.exp(t)) ** -2.0,
            lambda u, L: (1 + u) ** -2,
            lambda u, L: u * (2 * _log((1 + u) / (2 * u)) - 1 / (1 + u) + as_number(1.25)) - as_number(0.75),
        ),
        _atom("sign(log u)", np.sign, lambda u, L: _sign(L), lambda u, L: abs(u - 1)),
        _atom("|log u|", np.abs, lambda u, L: abs(L), lambda u, L: _sign(L) * (u - 1 - L)),
        _atom(
            "|u - 1|",
            lambda t: np.abs(np.expm1(t)),
            lambda u, L: abs(u - 1),
            lambda u, L: _sign(L) * (u * L - u + 1),
        ),
    )


def _power(label: str, exponent: float) -> Atom:
    def generator(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
        a = as_number(exponent)
        return u * log_u - u + 1 if a == 1 else (u**a - u) / (a - 1) + 1 - u

    return _atom(label, lambda t: np.exp(exponent * t), lambda u, L: u ** as_number(exponent), generator)


def _log_mixture(beta: float) -> Atom:
    return _atom(
        f"log({_mixture(beta)})",
        lambda t: np.logaddexp(np.log(beta) + t, np.log1p(-beta)),
        lambda u, L: _log(_mixed(u, as_number(beta))),
        lambda u, L: _log_mixture_generator(u, as_number(beta)),
    )


def _mixture_log_mixture(beta: float) -> Atom:
    def values(t: Array) -> Array:
        mixed = _mixed(np.exp(t), beta)
        return mixed * np.log(mixed)

    def expr(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
        mixed = _mixed(u, as_number(beta))
        return mixed * _log(mixed)

    def generator(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
        b = as_number(beta)
        c = 1 - b
        times_u = u * (_log(c) * log_u - _dilogarithm(-b * u / c) + _dilogarithm(-b / c))
        return b * times_u + c * _log_mixture_generator(u, b)

    return _atom(f"({_mixture(beta)}) log({_mixture(beta)})", values, expr, generator)


def _ratio_mixture(beta: float) -> Atom:
    def generator(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
        b = as_number(beta)
        return u * _log(u / _mixed(u, b)) / (1 - b) + 1 - u

    return _atom(
        f"u/({_mixture(beta)})",
        lambda t: np.exp(t) / _mixed(np.exp(t), beta),
        lambda u, L: u / _mixed(u, as_number(beta)),
        generator,
    )


def _mixture(beta: float) -> str:
    return f"{beta:.6g} u + {1 - beta:.6g}"


def _mixed(u: Any, beta: Any) -> Any:
    """The mixture of `u` and 1, of floats or of expressions."""
    return beta * u + 1 - beta


def _free_power(alpha: float) -> Atom:
    return _power(f"u^{alpha:.6g}", alpha)


def _tempered(scale: float) -> Atom:
    """tanh(k log u): bounded and monotone; its generator is computed by quadrature."""

    def expr(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
        import sympy

        return sympy.tanh(as_number(scale) * log_u)

    label = "tanh(log u)" if scale == 1 else f"tanh({scale:.6g} log u)"
    return _atom(label, lambda t: np.tanh(scale * t), expr, lambda u, L: None)


# Functions with one parameter, and the interval in which it is sought.
PARAMETRIC: dict[str, tuple[Callable[[float], Atom], float, float]] = {
    "power": (_free_power, -4.0, 4.0),
    "log of a mixture": (_log_mixture, 1e-3, 1.0 - 1e-3),
    "mixture log mixture": (_mixture_log_mixture, 1e-3, 1.0 - 1e-3),
    "ratio to a mixture": (_ratio_mixture, 1e-3, 1.0 - 1e-3),
    "tanh": (_tempered, 0.05, 4.0),
}

_Maker = Callable[..., Any]


def _atom(label: str, values: Callable[[Array], Array], expr: _Maker, generator: _Maker) -> Atom:
    """An atom whose expressions are made from `u` and `log u`."""

    def make(maker: _Maker) -> Callable[[], sympy.Expr]:
        return lambda: maker(symbol(), _log(symbol()))

    return Atom(label, values, make(expr), make(generator))


def _log_half_generator(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
    return u * _log(2 * u / (1 + u)) - _log((1 + u) / 2)


def _u_log_half_generator(u: sympy.Expr, log_u: sympy.Expr) -> sympy.Expr:
    return u * (_dilogarithm(-1) - _dilogarithm(-u) - _log(2) * log_u)


def _log_mixture_generator(u: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return b / (1 - b) * u * _log(u / _mixed(u, b)) - _log(_mixed(u, b))


# sympy takes a second to import, so nothing imports it before it is called.


def _log(x: sympy.Expr | int) -> sympy.Expr:
    import sympy

    return sympy.log(x)


def _sign(x: sympy.Expr) -> sympy.Expr:
    import sympy

    return sympy.sign(x)


def _dilogarithm(x: sympy.Expr | int) -> sympy.Expr:
    import sympy

    return sympy.polylog(2, x)
