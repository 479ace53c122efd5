r"""One softmax row and one sampled token, in fractions or intervals: what the variance theorems (T7, T8) share.

The score of token $a$ in the logits is $s_a = e_a - p$. Every function takes fractions and `mpmath.iv` intervals alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv

from opdtheory import divergences
from opdtheory.exact import TabularPolicy
from opdtheory.theorems.instances.cases import Distribution, Pair, enclose, interval, values_of

__all__ = [
    "SMOOTH",
    "centred",
    "chi2",
    "covariance",
    "expectation",
    "first_rows",
    "intervals",
    "kl",
    "mean_gradient",
    "optimal_baseline",
    "ratios",
    "score",
    "score_norms",
    "second_moment",
    "square",
    "three_atoms",
    "variance",
    "weights",
    "weights_enclosed",
]

# Where a check runs black boxes, on these; the fractions cover the rest.
SMOOTH = ("reverse_kl", "forward_kl", "jsd", "chi2")


def expectation(p: Sequence[Any], values: Sequence[Any]) -> Any:
    r"""$E_p[x]$."""
    return sum(a * x for a, x in zip(p, values, strict=True))


def centred(p: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    r"""$x - E_p[x]$."""
    mean = expectation(p, values)
    return [x - mean for x in values]


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


def score(p: Sequence[Any], token: int) -> list[Any]:
    r"""$s_a = e_a - p$, the gradient of $\log p_a$ in the logits."""
    return [(1 if k == token else 0) - x for k, x in enumerate(p)]


def score_norms(p: Sequence[Any]) -> list[Any]:
    r"""$|s_a|^2 = 1 - 2 p_a + |p|^2$, from the scores themselves."""
    return [square(score(p, a)) for a in range(len(p))]


def mean_gradient(p: Sequence[Any], advantages: Sequence[Any]) -> list[Any]:
    r"""$-E_p[A s]$, summed token by token from the scores."""
    scores = [score(p, a) for a in range(len(p))]
    return [-expectation(p, [w * s[k] for w, s in zip(advantages, scores, strict=True)]) for k in range(len(p))]


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


def first_rows(pair: Pair) -> Pair:
    """The pair cut to its first token."""
    student, teacher = (TabularPolicy([policy.logits[0]]) for policy in pair)
    return student, teacher


def kl(p: Sequence[Any], q: Sequence[Any]) -> Any:
    r"""$KL(p\|q)$ of intervals."""
    return expectation(p, [iv.log(a / b) for a, b in zip(p, q, strict=True)])


def chi2(p: Sequence[Any], q: Sequence[Any]) -> Any:
    r"""$\chi^2(q\|p) = E_p[(u-1)^2]$."""
    return expectation(p, [(u - 1) ** 2 for u in ratios(p, q)])


def weights(name: str, p: Distribution, q: Distribution) -> list[Fraction]:
    r"""$w_f(u_a)$ of a catalogue entry whose weight is rational, differentiated by sympy."""
    u, f = divergences.symbol(), divergences.divergence(name).expr
    w = sympy.expand(u * sympy.diff(f, u) - f)
    return [values_of(w, {u: ratio}) for ratio in ratios(p, q)]


def intervals(distribution: Distribution) -> list[Any]:
    """Intervals that enclose the probabilities."""
    return [interval(x) for x in distribution]


def weights_enclosed(name: str, p: Distribution, q: Distribution) -> list[Any]:
    r"""Intervals around $w_f(u_a)$ of any smooth catalogue entry."""
    u, f = divergences.symbol(), divergences.divergence(name).expr
    return [enclose(u * sympy.diff(f, u) - f, {u: interval(ratio)}) for ratio in ratios(p, q)]


def three_atoms() -> tuple[Any, Any, Any]:
    r"""Sympy symbols for three atoms: probabilities that sum to one, weights, and scores $s_a$ of two components.

    The scores are free, so that what holds for them holds for any family, not only for softmax.
    """
    p0, p1 = sympy.symbols("p0 p1", positive=True)
    p = [p0, p1, 1 - p0 - p1]
    w = list(sympy.symbols("w0:3", real=True))
    return p, w, [list(sympy.symbols(f"s{a}_0:2", real=True)) for a in range(3)]


OfPair = Callable[[Sequence[Any], Sequence[Any]], Any]


def _dot(p: Sequence[Any], q: Sequence[Any]) -> Any:
    return sum(a * b for a, b in zip(p, q, strict=True))


def _apart(p: Sequence[Any], q: Sequence[Any]) -> Any:
    r"""$|p - q|^2$, the square of the forward KL's gradient in the logits."""
    return square([a - b for a, b in zip(p, q, strict=True)])
