r"""The calculus of generators and weights, in sympy: $w_f = u f' - f$, its inverse $V[w]$, gauge, scale, convexity.

Expressions are in one symbol called `u`, whatever its assumptions; results are in `symbol()`, which is positive. The
functions import sympy and mpmath when they are called, so that the module does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from opdtheory.divergences.custom import number, numeric, symbol
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    import sympy
    from torch import Tensor

__all__ = [
    "centred",
    "differentiate",
    "forms",
    "has_kinks",
    "implied_generator",
    "is_zero",
    "limits",
    "numeric",
    "on_tensors",
    "only_u",
    "smooth_pieces",
    "same_divergence",
    "same_up_to_scale",
    "slope_at_infinity",
    "symbol",
    "weight_of",
]


def weight_of(expr: sympy.Expr) -> sympy.Expr:
    r"""The weight of a generator, $w_f(u) = u f'(u) - f(u)$ (T1), simplified.

    Raises:
        InvalidArgumentError: `expr` is not a sympy expression.

    Example:
        >>> import sympy
        >>> u = sympy.Symbol("u")
        >>> weight_of(u * sympy.log(u))
        u
    """
    f = _in_u("expr", expr)
    return _by_pieces(symbol() * differentiate(f) - f)


def implied_generator(weight_expr: sympy.Expr) -> sympy.Expr:
    r"""The generator whose exact weight is the given one, up to a constant (T4), in the gauge $f(1) = f'(1) = 0$.

    $$V[w](u) = u \int_1^u \frac{w(t) - w(1)}{t^2}\, \mathrm{d}t$$

    It is convex, so that an f-divergence is minimised, if and only if the weight is non-decreasing. Kinks and steps
    (`Abs`, `sign`, `Min`, `Max`, `Piecewise`) are integrated piece by piece. Where sympy finds no closed form,
    `implied_generator_values` integrates numerically, in the same gauge.

    Args:
        weight_expr: the local weight, an expression in `u`; where it is smooth it may hold other symbols too.

    Raises:
        InvalidArgumentError: `weight_expr` is not an expression in `u` or is infinite at 1, or sympy finds no integral.

    Example:
        >>> import sympy
        >>> u = sympy.Symbol("u", positive=True)
        >>> implied_generator(sympy.log(u))
        u - log(u) - 1
    """
    import sympy

    u = symbol()
    weight = _in_u("weight_expr", weight_expr)
    pieces = smooth_pieces("weight_expr", weight)
    at_one = weight.subs(u, 1)
    if at_one.is_finite is False or at_one is sympy.nan:
        raise InvalidArgumentError(
            "weight_expr", f"must be finite at u = 1, where the gauge is f'(1) = 0; got {at_one}"
        )
    primitives = [_primitive(sympy.expand(piece - at_one) / u**2) for _, _, piece in pieces]
    constants = _join_primitives(pieces, primitives)
    results = [
        _shortest(sympy.expand(u * (primitive - constant)))
        for primitive, constant in zip(primitives, constants, strict=True)
    ]
    if len(results) == 1:
        return results[0]
    branches = [(result, u < high) for result, (_, high, _) in zip(results[:-1], pieces[:-1], strict=True)]
    return sympy.Piecewise(*branches, (results[-1], True))


def same_divergence(expr_a: sympy.Expr, expr_b: sympy.Expr) -> bool:
    r"""Whether two generators differ only by a gauge $c(u - 1)$, so that $D_f$ is the same (T3).

    Raises:
        InvalidArgumentError: an argument is not a sympy expression in `u`.
    """
    import sympy

    u = symbol()
    difference = _in_u("expr_a", expr_a) - _in_u("expr_b", expr_b)
    pieces = [piece for _, _, piece in smooth_pieces("expr_a - expr_b", difference)]
    # The gauge is read off at a point of the last piece; it must then hold identically on every piece.
    gauge = sympy.simplify(pieces[-1].diff(u))
    if u in gauge.free_symbols:
        gauge = gauge.subs(u, sympy.Integer(10) ** 6)
    return all(is_zero(piece - gauge * (u - 1)) for piece in pieces)


def same_up_to_scale(expr_a: sympy.Expr, expr_b: sympy.Expr) -> sympy.Expr | None:
    r"""The scale $k > 0$ with $f_a = k f_b$ up to gauge, or `None` if there is none.

    Raises:
        InvalidArgumentError: an argument is not a sympy expression in `u`.
    """
    import sympy

    u = symbol()
    a, b = _in_u("expr_a", expr_a), _in_u("expr_b", expr_b)
    for low, high in ((sympy.Rational(1, 2), sympy.Integer(2)), (sympy.Rational(1, 7), sympy.Integer(5))):
        # f(high)/(high - 1) - f(low)/(low - 1) does not see the gauge.
        chord_a, chord_b = (f.subs(u, high) / (high - 1) - f.subs(u, low) / (low - 1) for f in (a, b))
        if is_zero(chord_b) or is_zero(chord_a):
            continue
        scale = sympy.simplify(chord_a / chord_b)
        if scale.is_positive and same_divergence(a, scale * b):
            return scale
        return None
    return sympy.Integer(1) if same_divergence(a, b) else None


def forms(generator: sympy.Expr) -> dict[str, sympy.Expr]:
    r"""The generator, $u f'$, $u f' - f$, $u^2 f''$ and its slope in $\log u$, away from kinks."""
    import sympy

    u = symbol()
    first = differentiate(generator)
    curvature = u**2 * differentiate(first)
    return {
        "generator": generator,
        "log_slope": u * _shortest(first),
        # The terms in u that slope and generator share must cancel in symbols: in numbers they would leave no digits.
        "weight": _by_pieces(u * first - generator),
        "curvature": curvature if has_kinks(curvature) else sympy.factor(curvature),
        "curvature_slope": u * differentiate(curvature),
    }


def centred(generator: sympy.Expr) -> tuple[float, sympy.Expr, sympy.Expr]:
    """The slope at one, and the generator and its weight in the gauge where that is zero."""
    import sympy

    u = symbol()
    slope = differentiate(generator).subs(u, 1)
    if not slope.is_finite or is_zero(slope):
        slope = sympy.Integer(0)
    remainder = generator - slope * (u - 1)
    return number(slope), remainder, _by_pieces(u * differentiate(remainder) - remainder)


def limits(form: sympy.Expr) -> tuple[float, float]:
    r"""The limits of an expression in `u` at $0^+$ and $\infty$; NaN where sympy finds none."""
    return _limit(form, False), _limit(form, True)


def slope_at_infinity(generator: sympy.Expr) -> float:
    r"""The limit $f'(\infty)$."""
    return _limit(differentiate(generator), True)


def _in_u(argument: str, expr: sympy.Expr) -> sympy.Expr:
    """The expression with every symbol that is called `u` replaced by the positive one."""
    import sympy

    try:
        expression = sympy.sympify(expr, strict=True)
    except (sympy.SympifyError, TypeError):
        raise InvalidArgumentError(argument, f"must be a sympy expression in u, got {type(expr).__name__}") from None
    if not isinstance(expression, sympy.Expr):
        raise InvalidArgumentError(argument, f"must be a sympy expression in u, got {type(expr).__name__}")
    return expression.xreplace({s: symbol() for s in expression.free_symbols if s.name == "u" and s != symbol()})


def only_u(expr: sympy.Expr) -> sympy.Expr:
    """An expression in `symbol()` alone.

    Raises:
        InvalidArgumentError: `expr` is not a sympy expression, or has another symbol.
    """
    expression = _in_u("expr", expr)
    others = sorted(str(s) for s in expression.free_symbols - {symbol()})
    if others:
        raise InvalidArgumentError("expr", f"must have no free symbol but u, got the free symbols {', '.join(others)}")
    return expression


def differentiate(expression: sympy.Expr) -> sympy.Expr:
    """The derivative away from kinks, without the delta functions that sympy puts there."""
    import sympy

    derivative = sympy.diff(expression, symbol())
    derivative = derivative.replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))
    return derivative.replace(
        lambda e: isinstance(e, sympy.polylog) and e.args[0] == 1, lambda e: -sympy.log(1 - e.args[1])
    )


def _shortest(expression: sympy.Expr) -> sympy.Expr:
    """The shortest of several forms as a rational function of `u` and its logarithms."""
    import sympy

    if has_kinks(expression):
        return expression
    split = expression.replace(sympy.log, _split_log)
    try:
        cancelled = sympy.cancel(sympy.together(split))
    except (NotImplementedError, sympy.PolynomialError):
        cancelled = split
    candidates = [expression, split, sympy.expand(split), cancelled, sympy.expand(cancelled)]
    return min(candidates, key=sympy.count_ops)


def _split_log(argument: sympy.Expr) -> sympy.Expr:
    """The logarithm of a product of positive factors as a sum, so that equal logarithms look equal."""
    import sympy

    return sympy.expand_log(sympy.log(sympy.factor(argument)))


def _by_pieces(expression: sympy.Expr) -> sympy.Expr:
    """The expression with each smooth piece in its shortest form; at a kink the mean of the two sides."""
    import sympy

    u = symbol()
    pieces = [(low, _shortest(piece)) for low, _, piece in smooth_pieces("expr", expression)]
    branches: list[tuple[sympy.Expr, Any]] = []
    for (_, left), (edge, right) in zip(pieces[:-1], pieces[1:], strict=True):
        branches += [(left, u < edge), ((left + right).subs(u, edge) / 2, sympy.Eq(u, edge))]
    return sympy.Piecewise(*branches, (pieces[-1][1], True)) if branches else pieces[0][1]


def has_kinks(expression: sympy.Expr) -> bool:
    """Whether the expression has a kink or a step, or is written in pieces."""
    import sympy

    return expression.has(sympy.Piecewise, sympy.Abs, sympy.sign, sympy.Heaviside, sympy.Max, sympy.Min)


def _limit(expression: sympy.Expr, at_infinity: bool) -> float:
    import sympy

    u = symbol()
    pieces = smooth_pieces("expr", expression)
    piece = pieces[-1][2] if at_infinity else pieces[0][2]
    try:
        value = sympy.limit(piece, u, sympy.oo if at_infinity else 0, "-" if at_infinity else "+")
    except (NotImplementedError, ValueError):
        return math.nan
    return number(value) if value.is_extended_real else math.nan


def is_zero(expression: sympy.Expr) -> bool:
    """Whether an expression vanishes identically: by expansion, else by its values at 60 digits."""
    import sympy

    if _shortest(expression) == 0:
        return True
    names = sorted(expression.free_symbols, key=str)
    for k in (sympy.Rational(1, 2), 3, 5, 7, 11):
        point = {name: sympy.root(k, i) for i, name in enumerate(names, start=2)}
        value = expression.subs(point)
        scale = sum(abs(sympy.N(term.subs(point), 60)) for term in sympy.Add.make_args(expression))
        if abs(sympy.N(value, 60, maxn=400)) > sympy.Float(10) ** -50 * max(1, scale):
            return False
    return True


def _primitive(expression: sympy.Expr) -> sympy.Expr:
    import sympy

    u = symbol()
    terms = sympy.Add.make_args(sympy.expand(expression.replace(sympy.log, _split_log)))
    dilogarithms = [_dilogarithm(term) for term in terms]
    plain = sympy.Add(*(term for term, found in zip(terms, dilogarithms, strict=True) if found is None))
    result = sympy.integrate(plain, u) + sympy.Add(*(found for found in dilogarithms if found is not None))
    if result.has(sympy.Piecewise):  # cases of another symbol, such as an exponent
        result = sympy.simplify(result)
    if result.has(sympy.Integral):
        raise InvalidArgumentError(
            "weight_expr",
            f"sympy finds no integral of {expression}; use implied_generator_values, which integrates numerically",
        )
    return result


def _dilogarithm(term: sympy.Expr) -> sympy.Expr | None:
    """The integral of `k log(a u + b) / u`, for which sympy is slow and splits into cases; None for other terms."""
    import sympy

    u = symbol()
    factor, rest = (term * u).as_independent(u)
    if not isinstance(rest, sympy.log):
        return None
    argument = sympy.expand(rest.args[0])
    slope, constant = argument.coeff(u, 1), argument.coeff(u, 0)
    if argument != slope * u + constant or not (slope.is_positive and constant.is_positive):
        return None
    return factor * (sympy.log(constant) * sympy.log(u) - sympy.polylog(2, -slope * u / constant))


def _join_primitives(pieces: list[Any], primitives: list[sympy.Expr]) -> list[sympy.Expr]:
    """The constants that make the primitives continuous, and zero at one."""
    u = symbol()
    constants = [primitives[0] * 0]
    for (_, edge, _), left, right in zip(pieces[:-1], primitives[:-1], primitives[1:], strict=True):
        constants.append(constants[-1] + right.subs(u, edge) - left.subs(u, edge))
    home = next(i for i, (_, high, _) in enumerate(pieces) if bool(high >= 1))
    shift = primitives[home].subs(u, 1) - constants[home]
    return [constant + shift for constant in constants]


def smooth_pieces(argument: str, expression: sympy.Expr) -> list[tuple[sympy.Expr, sympy.Expr, sympy.Expr]]:
    """The smooth pieces of an expression as `(low, high, piece)`, from zero to infinity."""
    import sympy

    u = symbol()
    if not has_kinks(expression):
        return [(sympy.Integer(0), sympy.oo, expression)]
    if expression.free_symbols - {u}:
        raise InvalidArgumentError(argument, "has kinks and symbols other than u; replace these by numbers")
    edges = _edges(expression)
    bounds = [sympy.Integer(0), *edges, sympy.oo]
    return [
        (low, high, _select(expression, _inside(low, high))) for low, high in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _edges(expression: sympy.Expr) -> list[sympy.Expr]:
    import sympy

    u = symbol()
    switches: set[sympy.Expr] = set()
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, (sympy.Abs, sympy.sign, sympy.Heaviside)):
            switches.add(node.args[0])
        elif isinstance(node, (sympy.Max, sympy.Min)):
            switches.update(a - b for i, a in enumerate(node.args) for b in node.args[:i])
        elif isinstance(node, sympy.core.relational.Relational):
            switches.add(node.lhs - node.rhs)
    roots: set[sympy.Expr] = set()
    for switch in switches:
        if u not in switch.free_symbols:
            continue
        for _, _, smooth in (
            [(0, 0, switch)] if not switch.has(sympy.Abs, sympy.Max, sympy.Min) else smooth_pieces("expr", switch)
        ):
            try:
                found = sympy.solve(smooth, u)
            except NotImplementedError:
                raise InvalidArgumentError("expr", f"sympy cannot solve {smooth} = 0 for its kinks") from None
            roots.update(root for root in found if root.is_positive)
    return sorted(roots, key=lambda root: float(root))


def _inside(low: sympy.Expr, high: sympy.Expr) -> sympy.Expr:
    import sympy

    return (low + high) / 2 if high != sympy.oo else low + 1


def _select(expression: sympy.Expr, point: sympy.Expr) -> sympy.Expr:
    """The smooth branch of an expression that applies at a point."""
    import sympy

    u = symbol()

    def value(node: sympy.Expr) -> float:
        return number(node.subs(u, point))

    def step(node: sympy.Expr) -> sympy.Expr:
        if not node.args:
            return node
        if isinstance(node, sympy.Piecewise):
            return next(step(e) for e, condition in node.args if bool(condition.subs(u, point)))
        arguments = [step(argument) for argument in node.args]
        if isinstance(node, sympy.Abs):
            return arguments[0] * (1 if value(arguments[0]) >= 0 else -1)
        if isinstance(node, sympy.sign):
            return sympy.Integer(1 if value(arguments[0]) > 0 else -1)
        if isinstance(node, sympy.Heaviside):
            return sympy.Integer(1 if value(arguments[0]) > 0 else 0)
        if isinstance(node, sympy.Max):
            return max(arguments, key=value)
        if isinstance(node, sympy.Min):
            return min(arguments, key=value)
        return node.func(*arguments)

    return step(expression)


def on_tensors(variable: sympy.Symbol, expression: sympy.Expr) -> Callable[[Tensor], Tensor]:
    """An expression as a function of tensors; a constant one returns a number.

    sympy prints for torch itself from 1.14 on, but torch 2.6 is installed with 1.13.
    """
    import sympy
    import torch

    def where(*pieces: Any) -> Any:
        (value, condition), *rest = pieces
        return sympy.Function("where")(condition, value, where(*rest)) if rest else value

    # Torch takes logarithms of tensors only: constants go in as numbers.
    parts = [x for x in sympy.preorder_traversal(expression) if getattr(x, "is_number", False) and not x.is_Rational]
    in_numbers = expression.xreplace({x: sympy.N(x, 20) for x in parts})
    # Python's own conditions, as which sympy would print these two, are not for tensors.
    in_calls = in_numbers.replace(sympy.Piecewise, where).replace(sympy.sign, sympy.Function("sgn"))
    names = {name: getattr(torch, name.lower()) for name in ("Abs", "exp", "log", "sgn", "sqrt", "tanh", "where")}
    function: Callable[[Tensor], Tensor] = sympy.lambdify(variable, in_calls, [names])
    return function
