"""Numeric evaluation of generators given as expressions: in float64 by torch, and by mpmath where that loses digits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdtheory.divergences.logspace import polynomial

if TYPE_CHECKING:
    import sympy

__all__ = ["lambdify", "number", "numeric", "symbol"]

_CANCELLATION = 2.0**-10  # a sum this much smaller than its terms has lost too many digits
_SERIES_RADIUS, _SERIES_ORDER = 1 / 16, 18


@functools.cache
def symbol() -> sympy.Symbol:
    """The ratio $u = q/p$, teacher over student, as a positive sympy symbol."""
    import sympy

    return sympy.Symbol("u", positive=True)


def numeric(expression: sympy.Expr) -> Callable[[Tensor], Tensor]:
    """An expression in `u` as a function of float64 tensors of `log u`.

    Near `u = 1` a smooth expression is evaluated by its power series in `log u`. Elsewhere, mpmath evaluates the
    points at which an intermediate value overflows, underflows or cancels by more than 10 bits.
    """
    import sympy

    in_log = expression.subs(symbol(), sympy.exp(_log_symbol()))
    exact = functools.cache(lambda: _mpmath_function(in_log))
    series = functools.cache(lambda: _series(in_log))

    def function(t: Tensor) -> Tensor:
        evaluator = _TorchEvaluator(t)
        try:
            values, suspect = evaluator(in_log), evaluator.suspect
        except _UnknownFunctionError:
            values, suspect = torch.zeros_like(t), torch.ones_like(t, dtype=torch.bool)
        suspect = suspect & torch.isfinite(t)
        coefficients = series()
        if coefficients is not None:
            near = t.abs() < _SERIES_RADIUS
            values = torch.where(near, polynomial(t, coefficients), values)
            suspect = suspect & ~near
        if bool(suspect.any()):
            distinct, place = torch.unique(t[suspect], return_inverse=True)
            points = torch.tensor([exact()(point) for point in distinct.tolist()], dtype=t.dtype, device=t.device)
            values = values.masked_scatter(suspect, points[place])
        return values

    return function


class _UnknownFunctionError(Exception):
    pass


class _TorchEvaluator:
    """Evaluates an expression tree by torch and notes the points at which an intermediate value loses digits."""

    def __init__(self, t: Tensor) -> None:
        self.t = t
        self.suspect = torch.zeros_like(t, dtype=torch.bool)

    def __call__(self, node: sympy.Expr) -> Tensor:
        import sympy

        if node == _log_symbol():
            return self.t
        if not node.free_symbols:
            return torch.full_like(self.t, number(node))
        if isinstance(node, sympy.Piecewise):
            # Branches that are not taken may be infinite: only the chosen value counts.
            return self._piecewise(node)
        value = self._excess(node) if isinstance(node, sympy.Add) else None
        if value is None:
            value = self._apply(node, [self(argument) for argument in node.args])
        self.suspect = self.suspect | ~torch.isfinite(value)
        if isinstance(node, (sympy.exp, sympy.Pow)):
            self.suspect = self.suspect | (value.abs() < torch.finfo(value.dtype).tiny)
        if isinstance(node, sympy.log):
            # The argument is near one, and only its distance from one counts.
            self.suspect = self.suspect | (value.abs() < _CANCELLATION)
        return value

    def _excess(self, node: sympy.Add) -> Tensor | None:
        """The sum with its pair `k exp(x) - k` taken as `k expm1(x)`, or None if there is no such pair."""
        import sympy

        constant, rest = node.as_coeff_Add()
        for term in sympy.Add.make_args(rest):
            factor, power = term.as_coeff_Mul()
            if constant != 0 and factor == -constant and isinstance(power, sympy.exp):
                pair = number(factor) * torch.expm1(self(power.args[0]))
                others = rest - term
                return pair if others == 0 else self._apply(node, [pair, self(others)])
        return None

    def _apply(self, node: sympy.Expr, arguments: list[Tensor]) -> Tensor:
        import sympy

        if isinstance(node, sympy.Add):
            total = functools.reduce(torch.add, arguments)
            largest = functools.reduce(torch.maximum, [argument.abs() for argument in arguments])
            self.suspect = self.suspect | (total.abs() < _CANCELLATION * largest)
            return total
        if isinstance(node, sympy.Mul):
            return functools.reduce(torch.mul, arguments)
        if isinstance(node, sympy.Pow):
            return torch.pow(*arguments)
        if isinstance(node, sympy.Max):
            return functools.reduce(torch.maximum, arguments)
        if isinstance(node, sympy.Min):
            return functools.reduce(torch.minimum, arguments)
        if isinstance(node, sympy.Heaviside):
            return torch.heaviside(arguments[0], torch.full_like(arguments[0], 0.5))
        name = _TORCH_FUNCTIONS.get(type(node).__name__)
        if name is None:
            raise _UnknownFunctionError
        return getattr(torch, name)(*arguments)

    def _piecewise(self, node: sympy.Piecewise) -> Tensor:
        import sympy

        outer = self.suspect
        result = torch.full_like(self.t, math.nan)
        open_points = torch.ones_like(self.t, dtype=torch.bool)
        suspect = outer
        for expression, condition in node.args:
            if condition == sympy.true:
                holds = torch.ones_like(open_points)
            elif isinstance(condition, sympy.core.relational.Relational):
                gap = self(condition.lhs - condition.rhs)
                holds = _RELATIONS[condition.rel_op](gap)
            else:
                raise _UnknownFunctionError
            chosen = open_points & holds
            self.suspect = torch.zeros_like(outer)
            result = torch.where(chosen, self(expression), result)
            suspect = suspect | (chosen & self.suspect)
            open_points = open_points & ~holds
        self.suspect = suspect
        return result


_RELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "<": lambda gap: gap < 0,
    "<=": lambda gap: gap <= 0,
    ">": lambda gap: gap > 0,
    ">=": lambda gap: gap >= 0,
    "==": lambda gap: gap == 0,
    "!=": lambda gap: gap != 0,
}

_TORCH_FUNCTIONS = {
    "exp": "exp",
    "log": "log",
    "Abs": "abs",
    "sign": "sign",
    "sinh": "sinh",
    "cosh": "cosh",
    "tanh": "tanh",
    "sin": "sin",
    "cos": "cos",
    "tan": "tan",
    "atan": "atan",
    "asinh": "asinh",
    "erf": "erf",
    "erfc": "erfc",
}


def _mpmath_function(expression: sympy.Expr) -> Callable[[float], float]:
    import mpmath

    function = lambdify(_log_symbol(), expression)

    def evaluate(t: float) -> float:
        # The precision doubles until the value is stable; a value that shrinks with it is an exact zero.
        value, previous = mpmath.mpf(0), None
        for digits in (50, 100, 200, 400, 800):
            with mpmath.workdps(digits):
                try:
                    value = function(mpmath.mpf(t))
                except (ZeroDivisionError, OverflowError, ValueError):
                    previous = None
                    continue
                if previous is not None and value != 0 and mpmath.almosteq(value, previous, 1e-18, 0):
                    return _to_float(value)
                previous = value
        return math.nan if previous is None else _to_float(value)

    return evaluate


def _series(expression: sympy.Expr) -> tuple[float, ...] | None:
    """The Taylor coefficients at `t = 0`, or None if they do not reproduce the function on both sides."""
    import mpmath

    function = lambdify(_log_symbol(), expression)
    with mpmath.workdps(60):
        try:
            # Differences of high order lose digits: mpmath adds the digits they need.
            found = mpmath.taylor(function, 0, _SERIES_ORDER)
            coefficients = [mpmath.re(c) if abs(c) > mpmath.mpf("1e-40") else mpmath.mpf(0) for c in found]
            for t in (mpmath.mpf(k) * _SERIES_RADIUS / 8 for k in (-8, -5, -1, 1, 5, 8)):
                terms = [c * t**k for k, c in enumerate(coefficients)]
                expected = function(t)
                if abs(sum(terms) - expected) > abs(expected) * mpmath.mpf("1e-17"):
                    return None
                if abs(expected) < max(abs(term) for term in terms) / 2:  # a root nearby, where the series cancels
                    return None
        except (ArithmeticError, ValueError, TypeError):
            return None
        return tuple(_to_float(c) for c in coefficients)


def lambdify(variable: sympy.Symbol, expression: sympy.Expr) -> Callable[[Any], Any]:
    """An expression as a function of mpmath numbers."""
    import mpmath
    import sympy

    def heaviside(x: Any, at_zero: Any = None) -> Any:
        return mpmath.mpf(1 if x > 0 else 0) if x != 0 else mpmath.mpf("0.5") if at_zero is None else at_zero

    return sympy.lambdify(variable, expression, modules=[{"Heaviside": heaviside}, "mpmath"])


def _to_float(value: Any) -> float:
    import mpmath

    if isinstance(value, mpmath.mpc):
        if value.imag != 0:
            return math.nan
        value = value.real
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def number(constant: sympy.Expr) -> float:
    """A real constant in float64, possibly infinite."""
    import sympy

    if constant.is_infinite:
        return math.inf if constant.is_extended_positive else -math.inf
    return _to_float(sympy.N(constant, 30))


@functools.cache
def _log_symbol() -> sympy.Symbol:
    import sympy

    return sympy.Symbol("t", real=True)
