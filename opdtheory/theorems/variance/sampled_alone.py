"""T19: of a sampled token's two log-probabilities, the only unbiased weights are the exact one less a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import least_variance
from opdtheory.theorems.instances.cases import Distribution, pairs, sampled_variance
from opdtheory.theorems.instances.freedom import freedom, laws
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    dot,
    expectation,
    first_rows,
    jacobians,
    mean_gradient,
    optimal_baseline,
    parameters_of,
    pushed_scores,
    score,
    simplex,
    spread,
    square,
    three_atoms,
    weight_of,
    weighted,
    weights,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

RATIONAL = ("forward_kl", "chi2", "neyman_chi2", "le_cam")
_THIRD = Fraction(1, 3)

# What is added to the exact weight, given the token, its probabilities and the number of tokens.
Extra = Callable[[int, Fraction, Fraction], Fraction]
EXTRAS: dict[str, Extra] = {
    "a constant": lambda a, x, y: _THIRD,
    "of p alone": lambda a, x, y: x,
    "of q alone": lambda a, x, y: y / 2,
    "of the ratio": lambda a, x, y: y / x - 1,
    "of the token": lambda a, x, y: Fraction(a == 0),
    "p (1 - p)": lambda a, x, y: x * (1 - x),
    "q (1 - q)": lambda a, x, y: y * (1 - y),
}
SYMMETRIC = ("p (1 - p)", "q (1 - q)")


def theorems() -> list[Theorem]:
    """T19."""
    return [
        Theorem(
            number="T19",
            name="the least variance of a sampled token alone",
            meaning=(
                "Say that a loss knows nothing but the student's and the teacher's log-probability of the sampled"
                " token. The only weights that are unbiased for all students and teachers are then that of T1 less a"
                " constant $c$. The variance is a parabola in $c$, and its lowest point $c^*$ depends on both whole"
                " distributions, so no one constant is the best for all of them."
            ),
            statement=(
                r"\big(\forall p, q:\ E_p[A(y, p_y, q_y)\,s_y] = E_p[w_f(u)\,s]\big) \iff A = w_f(q_y/p_y) - c;\quad"
                r" \mathrm{tr}\,\mathrm{Var}(c) = \mathrm{tr}\,\mathrm{Var}(c^*) + (c - c^*)^2 E_p|s|^2;\quad c^* ="
                r" \frac{E_p[w|s|^2]}{E_p|s|^2};\quad \mathrm{tr}\,\mathrm{Var}(0) - \mathrm{tr}\,\mathrm{Var}(c^*) ="
                r" \frac{E_p[w|s|^2]^2}{E_p|s|^2};\quad \text{no } c \text{ is } c^* \text{ for all } p, q"
            ),
            hypotheses=(
                r"the loss is a function of the sampled token $y$, $\log p_y$ and $\log q_y$, so that its gradient is"
                " a weight $A$ times the score $s_y$",
                "there are three or more tokens, $p$ and $q$ are any distributions that give each a positive"
                " probability, and the scores are taken in the logits",
                "$c$ may depend on the history, but not on the token; on two tokens there are other weights",
                r"$\mathrm{tr}\,\mathrm{Var}(c)$ is the trace of the covariance of $(w - c)\,s$, in which the scores"
                " may be taken in any parameters and $|s|^2$ in any metric",
                "for the last claim, $w_f$ is not constant, and it is bounded near 1",
            ),
            source="the parabola is T7a's; the rest derived here",
            advice=(
                "With the sampled token alone, the constant is all that you can choose. The best one takes both whole"
                " distributions; the centred weight $w_f(u) - w_f(1)$ is the only fixed choice without variance at"
                " the teacher."
            ),
            derivation=(
                Step(
                    r"\partial_\theta\,\ell(\log p_y) = \ell'(\log p_y)\,s_y",
                    "by the chain rule, the gradient of a loss of the sampled token's log-probabilities is a weight"
                    " on the token's score",
                    _chain_rule,
                ),
                Step(
                    r"E_p[B s] = 0 \iff B_a = B_b \text{ for all tokens } a, b",
                    "write $B = A - w_f$ for what is added to the exact weight. Up to its sign, the gradient of a"
                    " softmax row is $p_a (B_a - E_p B)$ in the logits, which vanishes exactly if $B$ is the same at"
                    " all tokens; sympy shows it for three",
                    _level,
                ),
                Step(
                    r"B_a(x, y) = B_b(\epsilon, \delta) = B_a(x', y')",
                    "write $B_a(x, y)$ for its value at token $a$ with $p_a = x$ and $q_a = y$. Of three tokens, two"
                    r" may have any probabilities that leave some to the third, and small enough $\epsilon$ and"
                    r" $\delta$ go with $(x, y)$ and with $(x', y')$; so $B$ is one constant for all tokens. On two"
                    " tokens $p_b = 1 - p_a$, and $B_a(x, y) = B_b(1 - x, 1 - y)$ is all that is asked",
                    lambda: freedom(3, 0) == 1,
                    in_words=True,
                ),
                Step(
                    r"E_p[(w-c)^2|s|^2] = E_p[(w-c^*)^2|s|^2] + (c-c^*)^2 E_p|s|^2",
                    "complete the square in $c$; the squared scores $|s|^2$ may be any positive numbers, so the"
                    " metric does not matter. The value at $c = 0$ gives the saving",
                    _parabola,
                ),
                Step(
                    r"p = (\epsilon,\ 1 - \epsilon - \epsilon^2,\ \epsilon^2):\quad "
                    r"\lim_{\epsilon\to0} c^* = w(u_1)",
                    "the token that is almost certain has almost no score, so the first token, which is rare,"
                    " decides. Its ratio $u_1$ may be anything while the ratios of the others stay near one",
                    _rare_token_decides,
                ),
            ),
            identities=(
                Identity(
                    "how much freedom",
                    r"\dim\{B:\ E_p[B s] = 0\ \forall p, q\} = 1 \text{ on three and four tokens, } \text{as many as"
                    " pairs of distributions on two}",
                    _check_freedom,
                    lambda size, count: 1 if size > 2 else count,
                    {
                        "two tokens are enough": lambda size, count: 1,
                        "a constant for each token": lambda size, count: size if size > 2 else count,
                        "one for each pair of laws": lambda size, count: count,
                        "none": lambda size, count: 0,
                    },
                    "exact",
                ),
                Identity(
                    "which weights are unbiased",
                    r"w_f + \tfrac13;\ \text{ on two tokens also } w_f + p(1-p),\ w_f + q(1-q)",
                    _check_extras,
                    lambda kind, size: kind == "a constant" or (size == 2 and kind in SYMMETRIC),
                    {
                        "symmetric ones on any number of tokens": lambda kind, size: kind in ("a constant", *SYMMETRIC),
                        "on two tokens only the constant": lambda kind, size: kind == "a constant",
                        "any function of p": lambda kind, size: kind in ("a constant", "of p alone"),
                        "none": lambda kind, size: False,
                    },
                    "exact",
                ),
                Identity(
                    "the best constant in any parameters",
                    r"\mathrm{tr}\,\mathrm{Var}(c^* + 1) = \mathrm{tr}\,\mathrm{Var}(c^* - 1)",
                    _check_best,
                    lambda p, w, norms: _best(p, w, norms),
                    {
                        "that of the logits": lambda p, w, norms: optimal_baseline(p, w),
                        "the mean of the weight": lambda p, w, norms: expectation(p, w),
                        "none": lambda p, w, norms: Fraction(0),
                    },
                    "exact",
                ),
                Identity(
                    "what it saves",
                    r"\mathrm{tr}\,\mathrm{Var}(0) - \mathrm{tr}\,\mathrm{Var}(c^*) = E_p[w|s|^2]^2 / E_p|s|^2",
                    _check_saving,
                    lambda p, w, norms: _best(p, w, norms) ** 2 * expectation(p, norms),
                    {
                        "the best constant's square": lambda p, w, norms: _best(p, w, norms) ** 2,
                        "by the mean weight": lambda p, w, norms: expectation(p, w) ** 2 * expectation(p, norms),
                        "nothing": lambda p, w, norms: Fraction(0),
                    },
                    "exact",
                ),
                Identity(
                    "no constant is best for all laws",
                    r"|c^* - w(u_1)| < \tfrac{1}{100} \text{ for } p_1 = \epsilon \text{ small, } u_1 = \tfrac12, 2, 3",
                    _check_rare_token,
                    lambda p, w, at_one: w[0],
                    {
                        "the centred constant": lambda p, w, at_one: at_one,
                        "the mean of the weight": lambda p, w, at_one: expectation(p, w),
                        "none": lambda p, w, at_one: Fraction(0),
                    },
                    "exact",
                ),
                Identity(
                    "the library's optimal baseline as a black box",
                    r"\mathrm{tr}\,\mathrm{Var}(c^*) \text{ in closed form and over every token}",
                    _check_library,
                    "sampled",
                    {"the centred constant": "centred", "by leave-one-out": "leave_one_out"},
                ),
            ),
        )
    ]


def _check_freedom(claim: Callable[[int, int], int]) -> Cases:
    """The dimension of what no expected gradient shows, against the claim, with the number of pairs of laws."""
    for size in (2, 3, 4):
        count = len(list(laws(size, size + 3))) ** 2
        yield same(freedom(size, 0), claim(size, count), f"{size} tokens")


def _grid(size: int) -> Iterator[tuple[Distribution, Distribution]]:
    """Every pair of laws in a few equal parts."""
    parts = size + 2
    for student in laws(size, parts):
        for teacher in laws(size, parts):
            p, q = (tuple(Fraction(x, parts) for x in law) for law in (student, teacher))
            yield p, q


def _check_extras(unbiased: Callable[[str, int], bool]) -> Cases:
    """Whether a weight has the exact gradient for all laws of a grid."""
    for size in (2, 3):
        for name in RATIONAL:
            instances = [(p, q, weights(name, p, q)) for p, q in _grid(size)]
            for kind, extra in EXTRAS.items():
                found = all(
                    mean_gradient(p, [x + extra(a, p[a], q[a]) for a, x in enumerate(w)]) == mean_gradient(p, w)
                    for p, q, w in instances
                )
                yield holds(found == unbiased(kind, size), name, kind, f"{size} tokens")


# Of the law, the weights and the squares of the scores.
Formula = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]


def _best(p: Sequence[Any], w: Sequence[Any], norms: Sequence[Any]) -> Any:
    return dot(p, [x * n for x, n in zip(w, norms, strict=True)]) / dot(p, norms)


def _instances() -> Iterator[tuple[str, Distribution, Distribution, list[Fraction], list[list[Fraction]]]]:
    """Each divergence and pair of laws in the logits and in two other parameters: weights and scores."""
    for name, p, q, w in weighted(RATIONAL):
        for jacobian in jacobians(len(p)):
            yield name, p, q, w, pushed_scores(p, jacobian)


def _at(p: Distribution, w: Sequence[Fraction], scores: list[list[Fraction]], c: Fraction) -> Fraction:
    r"""$\mathrm{tr\,Var}[(w - c)\,s]$, from the estimates of every token."""
    return spread(p, [[(x - c) * y for y in s] for x, s in zip(w, scores, strict=True)])


def _check_best(best: Formula) -> Cases:
    """A parabola takes equal values on either side of its lowest point."""
    for name, p, q, w, scores in _instances():
        c = best(p, w, [square(s) for s in scores])
        yield same(_at(p, w, scores, c + 1), _at(p, w, scores, c - 1), name, p, q, parameters_of(p, scores))


def _check_saving(saved: Formula) -> Cases:
    for name, p, q, w, scores in _instances():
        norms = [square(s) for s in scores]
        found = _at(p, w, scores, Fraction(0)) - _at(p, w, scores, _best(p, w, norms))
        yield same(found, saved(p, w, norms), name, p, q, parameters_of(p, scores))


def _check_rare_token(limit: Callable[[Distribution, list[Fraction], Fraction], Fraction]) -> Cases:
    """One rare token of a free ratio beside one that is almost certain and one that is rarer still."""
    rare = Fraction(1, 10**5)
    p = (rare, 1 - rare - rare**2, rare**2)
    for name in RATIONAL:
        at_one = Fraction(str(weight_of(name).subs(divergences.symbol(), 1)))
        for ratio in (Fraction(1, 2), Fraction(2), Fraction(3)):
            q = (ratio * p[0], 1 - ratio * p[0] - p[2], p[2])
            w = weights(name, p, q)
            gap = abs(optimal_baseline(p, w) - limit(p, w, at_one))
            yield holds(gap < Fraction(1, 100), name, f"ratio {ratio}")


def _check_library(which: str) -> Cases:
    for name in SMOOTH:
        for number, pair in enumerate(pairs()):
            row = first_rows(pair)
            student, teacher = (policy.logits[0] for policy in row)
            claimed: Tensor = getattr(least_variance(student, teacher, name, 0), which).variance[0]
            found = sampled_variance("opd_plus", name, row, baseline="optimal")
            yield close(found, claimed, name, row, f"pair {number}")


# The derivation.


def _chain_rule() -> bool:
    t = sympy.Symbol("theta", real=True)
    p, loss, x = sympy.Function("p", positive=True)(t), sympy.Function("l"), sympy.Symbol("x")
    slope = sympy.diff(loss(x), x).subs(x, sympy.log(p))
    return sympy.simplify(sympy.diff(loss(sympy.log(p)), t).doit() - (slope * sympy.diff(sympy.log(p), t)).doit()) == 0


def _level() -> bool:
    """Three tokens: the map from $B$ to $E_p[B s]$ takes the ones to zero and has rank two."""
    p = simplex("p")
    matrix = sympy.Matrix(3, 3, lambda j, a: p[a] * score(p, a)[j])
    level = sympy.expand(matrix * sympy.ones(3, 1)) == sympy.zeros(3, 1)
    return level and sympy.factor(matrix[:2, :2].det() - p[0] * p[1] * p[2]) == 0


def _parabola() -> bool:
    p, w, _ = three_atoms()
    c, norms = sympy.Symbol("c", real=True), sympy.symbols("n0:3", positive=True)
    moment = sum(a * (x - c) ** 2 * n for a, x, n in zip(p, w, norms, strict=True))
    best, size = _best(p, w, norms), expectation(p, norms)
    gap = sympy.simplify(moment - moment.subs(c, best) - (c - best) ** 2 * size)
    return gap == 0 and sympy.simplify(moment.subs(c, 0) - moment.subs(c, best) - best**2 * size) == 0


def _rare_token_decides() -> bool:
    small, w = sympy.Symbol("epsilon", positive=True), sympy.symbols("w0:3", real=True)
    p = [small, 1 - small - small**2, small**2]
    best = sympy.cancel(optimal_baseline(p, list(w)))
    return sympy.simplify(sympy.limit(best, small, 0) - w[0]) == 0
