"""Two steps of two tokens in symbols: the generator and the distributions, functions of a parameter, are undefined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

__all__ = ["TwoSteps", "two_steps", "weight_at"]


def weight_at(f: Any, at: sympy.Expr) -> sympy.Expr:
    r"""$w_f = u f'(u) - f(u)$ of an undefined generator."""
    u = sympy.Symbol("u", positive=True)
    return at * sympy.diff(f(u), u).subs(u, at) - f(at)


@dataclasses.dataclass(frozen=True)
class TwoSteps:
    """Probability, ratio and score of each token of each sequence, and the symbols in them."""

    sequences: list[tuple[list[sympy.Expr], list[sympy.Expr]]]
    theta: sympy.Symbol
    f: Any

    def w(self, at: sympy.Expr) -> sympy.Expr:
        """The weight of the generator."""
        return weight_at(self.f, at)

    def score(self, p: sympy.Expr) -> sympy.Expr:
        """The derivative of a log-probability."""
        return sympy.diff(sympy.log(p), self.theta)

    def expect(self, what: Callable[[list[sympy.Expr], list[sympy.Expr]], sympy.Expr]) -> sympy.Expr:
        """The mean of a function of probabilities and ratios."""
        return sum(sympy.Mul(*p) * what(p, u) for p, u in self.sequences)

    def zero(self, expr: sympy.Expr) -> bool:
        """Whether an expression is zero: every coefficient of a value of `f` or `f'` is."""
        done = sympy.expand(expr.doit())
        found = [x for x in done.atoms(AppliedUndef, sympy.Subs) if isinstance(x, sympy.Subs) or x.func == self.f]
        if not found:
            return sympy.simplify(done) == 0
        named = {x: sympy.Dummy() for x in found}
        linear = sympy.Poly(done.subs(named), *named.values())
        return all(sympy.simplify(c) == 0 for c in linear.coeffs())


def two_steps(ends: bool = False, environment: bool = False) -> TwoSteps:
    """The two steps; with `ends`, a first token 0 ends the sequence; with `environment`, it writes a token between."""
    theta = sympy.Symbol("theta", real=True)
    names = ("a", "b0", "b1", "b2", "b3")
    probabilities = [sympy.Function(name, positive=True)(theta) for name in names]
    teacher = sympy.symbols("q_a q_0 q_1 q_2 q_3", positive=True)
    world = iter(sympy.symbols("k_0:4", positive=True))
    rest = iter(range(1, len(names)))

    def both(i: int) -> list[tuple[sympy.Expr, sympy.Expr]]:
        p, q = probabilities[i], teacher[i]
        return [(p, q / p), (1 - p, (1 - q) / (1 - p))]

    sequences = []
    for i, (p, u) in enumerate(both(0)):
        if ends and i == 0:
            sequences.append(([p], [u]))
            continue
        # The environment has two tokens, with any probabilities.
        for _ in range(2 if environment else 1):
            middle: list[list[sympy.Expr]] = [[next(world)], [sympy.S.One]] if environment else [[], []]
            sequences += [([p, *middle[0], p2], [u, *middle[1], u2]) for p2, u2 in both(next(rest))]
    return TwoSteps(sequences, theta, sympy.Function("f"))
