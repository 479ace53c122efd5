r"""One softmax row and one sampled token, in fractions, intervals or symbols.

The score of token $a$ in the logits is $s_a = e_a - p$.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import TabularPolicy
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    Pair,
    at_atoms,
    enclose,
    interval,
    rational_distributions,
)

__all__ = [
    "SMOOTH",
    "OfPair",
    "centred",
    "chi2",
    "covariance",
    "distance",
    "dot",
    "expectation",
    "first_rows",
    "in_logits",
    "intervals",
    "jacobians",
    "kl",
    "log_rows",
    "mean_gradient",
    "minus",
    "optimal_baseline",
    "parameters_of",
    "projected",
    "pushed_scores",
    "ratios",
    "row_gradient",
    "score",
    "score_norms",
    "second_moment",
    "simplex",
    "softmax",
    "spread",
    "square",
    "three_atoms",
    "vanishes",
    "variance",
    "weight_of",
    "weighted",
    "weights",
    "weights_enclosed",
]

OfPair = Callable[[Sequence[Any], Sequence[Any]], Any]

# The divergences of checks that run black boxes; the checks in fractions cover the rest.
SMOOTH = ("reverse_kl", "forward_kl", "jsd", "chi2")


def dot(left: Sequence[Any], right: Sequence[Any]) -> Any:
    r"""$x \cdot y$."""
    return sum(x * y for x, y in zip(left, right, strict=True))


def expectation(p: Sequence[Any], values: Sequence[Any]) -> Any:
    r"""$E_p[x]$."""
    return dot(p, values)


def centred(p: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    r"""$x - E_p[x]$."""
    mean = expectation(p, values)
    return [x - mean for x in values]


def minus(left: Sequence[Any], right: Sequence[Any]) -> list[Any]:
    r"""$x - y$."""
    return [x - y for x, y in zip(left, right, strict=True)]


def covariance(p: Sequence[Any], left: Sequence[Any], right: Sequence[Any]) -> Any:
    r"""$E_p[x y] - E_p[x]\,E_p[y]$."""
    products = [x * y for x, y in zip(left, right, strict=True)]
    return expectation(p, products) - expectation(p, left) * expectation(p, right)


def ratios(p: Sequence[Any], q: Sequence[Any]) -> list[Any]:
    r"""$u_a = q_a / p_a$."""
    return [b / a for a, b in zip(p, q, strict=True)]


def square(vector: Sequence[Any]) -> Any:
    r"""$|x|^2$."""
    return sum(x * x for x in vector)


def distance(p: Sequence[Any], q: Sequence[Any]) -> Any:
    r"""$|p - q|^2$, the square of the forward KL's gradient in the logits."""
    return square(minus(p, q))


def in_logits(p: Sequence[Any], slopes: Sequence[Any]) -> list[Any]:
    r"""$\partial/\partial z_a = p_a (\partial_a - \sum_b p_b \partial_b)$ from the derivatives in the probabilities."""
    return [a * slope for a, slope in zip(p, centred(p, slopes), strict=True)]


def row_gradient(p: Tensor, advantages: Tensor) -> Tensor:
    r"""$-E_p[A s]$ of rows of probabilities, in closed form: $-p_a (A_a - E_p A)$."""
    return -p * (advantages - (p * advantages).sum(-1, keepdim=True))


def score(p: Sequence[Any], token: int) -> list[Any]:
    r"""$s_a = e_a - p$, the gradient of $\log p_a$ in the logits."""
    return [(1 if k == token else 0) - x for k, x in enumerate(p)]


def score_norms(p: Sequence[Any]) -> list[Any]:
    r"""$|s_a|^2 = 1 - 2 p_a + |p|^2$, from the scores themselves."""
    return [square(score(p, a)) for a in range(len(p))]


def jacobians(size: int) -> Iterator[list[list[Fraction]]]:
    """The logits themselves, and two parameters that move all of them."""
    yield [[Fraction(i == j) for j in range(size)] for i in range(size)]
    yield [[Fraction((5 * i + 3 * j + i * j) % 7 - 2) for j in range(size)] for i in range(2)]


def pushed_scores(p: Sequence[Any], jacobian: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The score of each token in the parameters, one row of the Jacobian each."""
    return [[dot(row, score(p, a)) for row in jacobian] for a in range(len(p))]


def parameters_of(p: Sequence[Any], scores: Sequence[Sequence[Any]]) -> str:
    """A label: the logits, or how many other parameters."""
    in_logits = all(list(each) == score(p, a) for a, each in enumerate(scores))
    return "logits" if in_logits else f"{len(scores[0])} parameters"


def projected(vector: Sequence[Any], known: Sequence[Sequence[Any]]) -> list[Any]:
    """The projection on the span of some vectors, which may depend on each other."""
    basis: list[list[Any]] = []
    for each in known:
        own = list(each)
        for other in basis:
            own = [x - dot(own, other) / square(other) * y for x, y in zip(own, other, strict=True)]
        if square(own) != 0:
            basis.append(own)
    total = [0 * x for x in vector]
    for each in basis:
        share = dot(vector, each) / square(each)
        total = [x + share * y for x, y in zip(total, each, strict=True)]
    return total


def spread(chances: Sequence[Any], vectors: Sequence[Sequence[Any]]) -> Any:
    r"""$\mathrm{tr\,Var}$ of a vector that takes each of the values with its chance."""
    mean = [dot(chances, column) for column in zip(*vectors, strict=True)]
    return sum(chance * square(minus(each, mean)) for chance, each in zip(chances, vectors, strict=True))


def mean_gradient(p: Sequence[Any], advantages: Sequence[Any], mu: Sequence[Any] | None = None) -> list[Any]:
    r"""$-E_\mu[A s]$, summed token by token from the scores; $\mu$ is $p$ by default."""
    scores = [score(p, a) for a in range(len(p))]
    chances = p if mu is None else mu
    return [-expectation(chances, [w * s[k] for w, s in zip(advantages, scores, strict=True)]) for k in range(len(p))]


def second_moment(p: Sequence[Any], advantages: Sequence[Any]) -> Any:
    r"""$E_p[A^2 |s|^2]$."""
    return expectation(p, [w * w * n for w, n in zip(advantages, score_norms(p), strict=True)])


def variance(p: Sequence[Any], advantages: Sequence[Any]) -> Any:
    r"""$E_p[A^2 |s|^2] - |E_p[A s]|^2$, the trace of the covariance of one sample's gradient."""
    return second_moment(p, advantages) - square(mean_gradient(p, advantages))


def optimal_baseline(p: Sequence[Any], w: Sequence[Any]) -> Any:
    r"""$E_p[w|s|^2] / E_p[|s|^2]$ with the softmax norms $1 - 2p_a + |p|^2$."""
    norms = [1 - 2 * a + square(p) for a in p]
    return expectation(p, [x * n for x, n in zip(w, norms, strict=True)]) / expectation(p, norms)


@functools.cache
def first_rows(pair: Pair) -> Pair:
    """The pair cut to its first token."""
    student, teacher = (TabularPolicy([policy.logits[0]]) for policy in pair)
    return student, teacher


def log_rows(*policies: TabularPolicy) -> list[Tensor]:
    """The log-probabilities of each policy's first token, `(1, V)`."""
    return [policy.logits[0].log_softmax(-1) for policy in policies]


def kl(p: Sequence[Any], q: Sequence[Any]) -> Any:
    r"""$KL(p\|q)$ of intervals."""
    return expectation(p, [iv.log(a / b) for a, b in zip(p, q, strict=True)])


def chi2(p: Sequence[Any], q: Sequence[Any]) -> Any:
    r"""$\chi^2(q\|p) = E_p[(u-1)^2]$."""
    return expectation(p, [(u - 1) ** 2 for u in ratios(p, q)])


def weight_of(name: str) -> sympy.Expr:
    r"""$w_f = u f' - f$ of a catalogue entry, differentiated by sympy."""
    u, f = divergences.symbol(), divergences.divergence(name).expr
    return u * sympy.diff(f, u) - f


def weights(name: str, p: Distribution, q: Distribution) -> list[Fraction]:
    r"""$w_f(u_a)$ of a catalogue entry whose weight is rational."""
    return at_atoms(sympy.expand(weight_of(name)), p, q)


def weighted(
    names: Sequence[str] = RATIONAL, count: int | None = None
) -> Iterator[tuple[str, Distribution, Distribution, list[Fraction]]]:
    """Each divergence on the first rational pairs (default: all), with the weights of the tokens."""
    for name in names:
        for p, q in rational_distributions()[:count]:
            yield name, p, q, weights(name, p, q)


def intervals(distribution: Sequence[Fraction]) -> list[Any]:
    """Intervals that enclose the probabilities."""
    return [interval(x) for x in distribution]


def weights_enclosed(name: str, p: Distribution, q: Distribution) -> list[Any]:
    r"""Intervals around $w_f(u_a)$ of any smooth catalogue entry."""
    w = weight_of(name)
    return [enclose(w, {divergences.symbol(): interval(ratio)}) for ratio in ratios(p, q)]


def simplex(name: str) -> list[sympy.Expr]:
    """Three symbolic probabilities that sum to one."""
    first, second = sympy.symbols(f"{name}0 {name}1", positive=True)
    return [first, second, 1 - first - second]


def softmax() -> tuple[list[sympy.Symbol], list[sympy.Expr]]:
    """Three symbolic logits and their probabilities."""
    z = list(sympy.symbols("z0:3", real=True))
    total = sum(sympy.exp(x) for x in z)
    return z, [sympy.exp(x) / total for x in z]


def vanishes(expr: sympy.Expr) -> bool:
    """Whether sympy simplifies an expression with logarithms to zero."""
    return sympy.simplify(sympy.expand_log(sympy.expand(sympy.together(expr)), force=True)) == 0


def three_atoms() -> tuple[list[sympy.Expr], list[sympy.Symbol], list[list[sympy.Symbol]]]:
    r"""Symbols for three atoms: probabilities that sum to one, weights, and scores $s_a$ of two components.

    The scores are free, so what holds for them holds for any family, not only for softmax.
    """
    w = list(sympy.symbols("w0:3", real=True))
    return simplex("p"), w, [list(sympy.symbols(f"s{a}_0:2", real=True)) for a in range(3)]
