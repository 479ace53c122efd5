"""The instances that the checks run on: divergences, policies, rational distributions and interval evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.divergences.registry import parameter_free, parametric
from opdtheory.divergences.transform import has_kinks, is_zero, smooth_pieces
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, expected_gradient, gradient_moments, random_pair
from opdtheory.exact.tree import Tree

__all__ = [
    "RATIONAL",
    "Distribution",
    "Pair",
    "Weight",
    "at_atoms",
    "at_kink",
    "autograd_gradient",
    "catalogue",
    "descent",
    "descent_of_rows",
    "distribution",
    "enclose",
    "every_case",
    "interval",
    "irrational_cases",
    "kept",
    "kinked",
    "pairs",
    "perspective",
    "rational_cases",
    "rational_distributions",
    "right_of_kinks",
    "sampled_gradient",
    "sampled_variance",
    "sampled_variance_of_group",
    "smooth_catalogue",
    "strictly_convex",
    "two_atoms",
    "values_of",
]

Weight = Callable[[Divergence, Tensor], Tensor]
Pair = tuple[TabularPolicy, TabularPolicy]
Distribution = tuple[Fraction, ...]

# Entries whose generator and weight take rational numbers to rational numbers.
RATIONAL = ("chi2", "neyman_chi2", "le_cam", "total_variation")


def catalogue() -> list[Divergence]:
    """Every catalogue entry, families at their examples."""
    return [*parameter_free(), *(family(value) for family in parametric() for value in family.examples)]


def kinked(divergence: Divergence) -> bool:
    """Whether the generator has a kink, where its slope and the weight jump."""
    return has_kinks(divergence.expr)


def smooth_catalogue() -> list[Divergence]:
    """The catalogue without the generators that have a kink, such as the total variation's."""
    return [divergence for divergence in catalogue() if not kinked(divergence)]


def at_kink(divergence: Divergence, p: Distribution, q: Distribution) -> bool:
    """Whether a ratio of two distributions is where the generator has a kink."""
    edges = [high for _, high, _ in smooth_pieces("divergence", divergence.expr)[:-1]]
    return any(sympy.Rational(b / a) in edges for a, b in zip(p, q, strict=True))


def right_of_kinks(f: sympy.Expr) -> sympy.Expr:
    """The smooth branch of a generator for large `u`."""
    return smooth_pieces("f", f)[-1][2]


def strictly_convex(divergence: Divergence) -> bool:
    """Whether no piece of the convex generator is straight."""
    u = divergences.symbol()
    return not any(is_zero(sympy.diff(piece, u, 2)) for _, _, piece in smooth_pieces("divergence", divergence.expr))


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """Pairs with and without an end-of-sequence token, from nearly equal to far apart."""
    return (
        random_pair(4, 2, scale=1.0, distance=0.05, seed=1),
        random_pair(3, 3, scale=1.0, distance=1.0, seed=2),
        random_pair(3, 3, eos=0, scale=0.5, distance=1.5, seed=3),
        random_pair(2, 4, eos=1, scale=2.0, distance=1.0, seed=4),
    )


@functools.cache
def two_atoms() -> tuple[Pair, ...]:
    """One-step pairs on two tokens, where `u_1 < 1 < u_2`."""
    return tuple(random_pair(2, 1, scale=1.0, distance=1.0, seed=seed) for seed in range(8))


@functools.cache
def sampled_gradient(
    name: str,
    divergence: Divergence | str | None,
    pair: Pair,
    behavior: TabularPolicy | None = None,
    batch_size: int = 1,
    **options: Any,
) -> list[Tensor]:
    """Expected gradient of an estimator run as a black box; cached, since every twin needs it again."""
    loss = estimator(name, divergence, **options)
    return expected_gradient(loss, *pair, batch_size=batch_size, behavior=behavior)


@functools.cache
def sampled_variance(name: str, divergence: str, pair: Pair, **options: Any) -> Tensor:
    """Variance of an estimator's gradient on one rollout, run as a black box; cached as `sampled_gradient` is."""
    moments = gradient_moments(estimator(name, divergence, **options), *pair)
    return torch.tensor(moments.variance, dtype=torch.float64)


def sampled_variance_of_group(name: str, divergence: str, pair: Pair, size: int, **options: Any) -> Tensor:
    """Variance of an estimator's gradient on a group of rollouts, run on every group."""
    moments = gradient_moments(estimator(name, divergence, **options), *pair, batch_size=size)
    return torch.tensor(moments.variance, dtype=torch.float64)


def every_case() -> Iterator[tuple[Divergence, Pair]]:
    """Every divergence on every pair."""
    for divergence in catalogue():
        for pair in pairs():
            yield divergence, pair


def descent(pair: Pair, weight: Callable[[Tensor], Tensor]) -> list[Tensor]:
    r"""$-E_p[\sum_n A(u_n) s_n]$ in the logits, row by row: $-P(h)\,p_a (A(u_a) - E_p A)$."""
    return descent_of_rows(pair, lambda log_p, log_q: weight(log_q - log_p))


def descent_of_rows(pair: Pair, advantage: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """`descent` with an advantage of both models' rows of log-probabilities."""
    tree = Tree.build(*pair)
    levels = []
    for n in range(tree.horizon):
        p, values = tree.log_p[n].exp(), advantage(tree.log_p[n], tree.log_q[n])
        centred = values - (p * values).sum(-1, keepdim=True)
        levels.append(-tree.reach(n).unsqueeze(-1) * p * centred)
    return levels


def autograd_gradient(pair: Pair, value: Callable[..., Tensor], *arguments: Any) -> list[Tensor]:
    """Gradient of `value(student, *arguments)` in the student's logits, by automatic differentiation."""
    student = TabularPolicy([z.clone().requires_grad_() for z in pair[0].logits], eos=pair[0].eos)
    total = value(student, *arguments)
    return list(torch.autograd.grad(total, student.logits, allow_unused=True, materialize_grads=True))


def distribution(*parts: int | Fraction) -> Distribution:
    """Probabilities in the given proportions."""
    return tuple(Fraction(part) / sum(parts) for part in parts)


@functools.cache
def rational_distributions() -> tuple[tuple[Distribution, Distribution], ...]:
    """Pairs `(p, q)` of distributions on two to four atoms with rational probabilities, none of them zero."""
    return (
        (distribution(1, 2), distribution(2, 1)),
        (distribution(1, 3), distribution(2, 5)),
        (distribution(1, 2, 3), distribution(3, 2, 1)),
        (distribution(5, 1, 1), distribution(1, 4, 2)),
        (distribution(1, 2, 3, 4), distribution(7, 1, 1, 2)),
        (distribution(9, 1, 5, 3), distribution(2, 2, 3, 11)),
    )


def rational_cases() -> Iterator[tuple[Divergence, Distribution, Distribution]]:
    """Every divergence of `RATIONAL` on every pair of rational distributions."""
    for name in RATIONAL:
        for p, q in rational_distributions():
            yield divergences.divergence(name), p, q


def kept() -> Iterator[tuple[Distribution, Distribution, int]]:
    """Rational pairs with the number of leading atoms that make up the set S of a top-k loss."""
    for p, q in rational_distributions():
        for k in range(1, len(p)):
            yield p, q, k


def irrational_cases() -> Iterator[tuple[Divergence, Distribution, Distribution]]:
    """Every other divergence of the catalogue on every pair of rational distributions, away from its kinks.

    An interval around a kink's ratio holds both slopes there.
    """
    for divergence in catalogue():
        if divergence.name not in RATIONAL:
            for p, q in rational_distributions():
                if not at_kink(divergence, p, q):
                    yield divergence, p, q


def at_atoms(expr: sympy.Expr, p: Sequence[Any], q: Sequence[Any]) -> list[Any]:
    """An expression in `u`, `p` and `q` at each atom: fractions for fractions, intervals for intervals."""
    u, (in_p, in_q) = divergences.symbol(), sympy.symbols("p q", positive=True)
    evaluate = values_of if isinstance(p[0], Fraction) else enclose
    return [evaluate(expr, {u: b / a, in_p: a, in_q: b}) for a, b in zip(p, q, strict=True)]


def perspective(f: sympy.Expr) -> tuple[sympy.Expr, sympy.Symbol, sympy.Symbol]:
    """The term $p f(q/p)$ of an atom, and the symbols p and q in it."""
    p, q = sympy.symbols("p q", positive=True)
    return p * f.subs(divergences.symbol(), q / p), p, q


def values_of(expr: sympy.Expr, values: dict[sympy.Symbol, Fraction]) -> Fraction:
    """A rational function at rational arguments, without rounding."""
    exact = expr.subs({symbol: sympy.Rational(v.numerator, v.denominator) for symbol, v in values.items()}).doit()
    return Fraction(int(exact.p), int(exact.q))


def interval(value: Fraction | int) -> Any:
    """An `mpmath.iv` interval that encloses a rational number."""
    iv.dps = 60
    exact = Fraction(value)
    return iv.mpf(exact.numerator) / iv.mpf(exact.denominator)


def enclose(expr: sympy.Expr, values: dict[sympy.Symbol, Any]) -> Any:
    """An interval that encloses a sympy expression, given intervals for its symbols.

    Raises:
        TypeError: the expression contains anything but sums, products, powers, `log`, `exp`, and `Abs`, `Max`, `Min`
            with their slopes `sign` and `Heaviside`.
    """
    if expr.is_Rational:
        return interval(Fraction(int(expr.p), int(expr.q)))
    if expr.is_Symbol:
        return values[expr]
    parts = [enclose(argument, values) for argument in expr.args]
    if expr.is_Add:
        return functools.reduce(lambda a, b: a + b, parts)
    if expr.is_Mul:
        return functools.reduce(lambda a, b: a * b, parts)
    if expr.is_Pow and expr.exp.is_Integer:
        return parts[0] ** int(expr.exp)
    if expr.is_Pow:
        return iv.exp(parts[1] * iv.log(parts[0]))
    functions = {sympy.log: iv.log, sympy.exp: iv.exp, sympy.Abs: abs, sympy.sign: _sign}
    if expr.func in functions:
        return functions[expr.func](parts[0])
    if isinstance(expr, sympy.Heaviside):
        return (_sign(parts[0]) + 1) / 2
    if isinstance(expr, (sympy.Max, sympy.Min)):
        half = 1 if isinstance(expr, sympy.Max) else -1
        return functools.reduce(lambda a, b: (a + b + half * abs(a - b)) / 2, parts)
    raise TypeError(f"no interval rule for {expr.func}")


def _sign(value: Any) -> Any:
    """An interval that encloses the sign."""
    low, high = (int(end > 0) - int(end < 0) for end in (value.a, value.b))
    return iv.mpf([low, high])
