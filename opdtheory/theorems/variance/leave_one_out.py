"""T19c: what a leave-one-out baseline costs against a known constant."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import sympy
from torch import Tensor

from opdtheory.exact import least_variance, random_pair
from opdtheory.theorems.instances.cases import Distribution, sampled_variance_of_group
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    dot,
    expectation,
    jacobians,
    parameters_of,
    pushed_scores,
    spread,
    square,
    weighted,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

RATIONAL = ("forward_kl", "chi2", "le_cam")
SIZES = (2, 3, 4)


class Moments(NamedTuple):
    r"""Of one rollout: $E_p[w]$, $\mathrm{Var}_p(w)$, $E_p|s|^2$, $E_p[w|s|^2]$, $|g|^2$ and $\mathrm{tr\,Var}[ws]$."""

    mean: Any
    variance: Any
    norm: Any
    w_norm: Any
    gradient: Any
    plain: Any

    @property
    def best(self) -> Any:
        """The constant of least variance."""
        return self.w_norm / self.norm

    def at(self, c: Any) -> Any:
        r"""$\mathrm{tr\,Var}[(w-c)s]$."""
        return self.plain - 2 * c * self.w_norm + c * c * self.norm


OfMoments = Callable[[Moments, int], Any]


def theorems() -> list[Theorem]:
    """T19c."""
    return [
        Theorem(
            number="T19c",
            name="leave-one-out against a constant",
            meaning=(
                "A leave-one-out baseline subtracts from each token's weight the mean weight of the other tokens of"
                " its group of $G$. Against the best constant $c^*$, known in advance, this costs variance twice: the"
                " mean weight is not $c^*$, and learning it from the group costs a term in $1/(G-1)$."
            ),
            statement=(
                r"\hat g = \tfrac1G \textstyle\sum_i (w_i - \bar w_{-i})\,s_i;\quad G\,\mathrm{tr}\,\mathrm{Var}[\hat"
                r" g] = \mathrm{tr}\,\mathrm{Var}[(w - E_p w)s] + \frac{\mathrm{Var}_p(w)\,E_p|s|^2 + |E_p[w"
                r" s]|^2}{G-1};\quad G\,\mathrm{tr}\,\mathrm{Var}[\hat g] - \mathrm{tr}\,\mathrm{Var}[(w - c^*)s] ="
                r" (E_p w - c^*)^2 E_p|s|^2 + \frac{\mathrm{Var}_p(w)\,E_p|s|^2 + |E_p[w s]|^2}{G-1}"
            ),
            hypotheses=(
                r"there is one step: $G \ge 2$ independent tokens are drawn after one history; $\bar w_{-i}$ is the"
                " mean weight of all of them but the one numbered $i$",
                "$w$ is a function of the token; scores may be taken in any parameters, and $|s|^2$ in any metric",
                "$c^* = E_p[w|s|^2]/E_p|s|^2$ is known in advance (T7a)",
            ),
            source="the estimate is a sample covariance, whose variance is textbook; the comparison derived here",
            advice=(
                "A constant that is near the best, such as the centred weight's zero near the teacher, beats"
                " leave-one-out for small groups: the learned baseline costs $1/(G-1)$ of the weight's spread."
                " Leave-one-out never beats the best constant, however large the group. The group's own mean is the"
                " same estimate times $(G-1)/G$, so it only looks quieter."
            ),
            derivation=(
                Step(
                    r"\tfrac1G\textstyle\sum_i (w_i - \bar w_{-i}) s_i = \tfrac1G\sum_i (w_i - m) s_i - "
                    r"\tfrac{1}{G(G-1)}\sum_{i\ne j} (w_j - m)\,s_i",
                    "this holds for any number $m$, and below it is $m = E_p[w]$. Sympy confirms it for groups of two"
                    " to four",
                    _two_sums,
                ),
                Step(
                    r"E[\tilde w_1 s_1\cdot\tilde w_2 s_1] = E[\tilde w_1 s_1\cdot\tilde w_1 s_2] = 0;\quad E|\tilde"
                    r" w_2 s_1|^2 = \mathrm{Var}_p(w)\,E_p|s|^2;\quad E[\tilde w_2 s_1\cdot\tilde w_1 s_2] = |E_p[w"
                    " s]|^2",
                    r"write $\tilde w = w - E_p[w]$. The two tokens are independent, and both $\tilde w$ and the score"
                    " have mean zero. Sympy confirms the products for three tokens and one component of the score",
                    _products,
                ),
                Step(
                    r"\mathrm{tr}\,\mathrm{Var}[\hat g] = \tfrac1G\,\mathrm{tr}\,\mathrm{Var}[\tilde w s] +"
                    r" \tfrac{G(G-1)}{G^2(G-1)^2}\big(E|\tilde w_2 s_1|^2 + E[\tilde w_2 s_1\cdot\tilde w_1 s_2]\big)",
                    "the two sums are uncorrelated. Of the products of two terms of the second sum, $G(G-1)$ are a"
                    " term with itself, as many are a term with its mirror image, and the others have mean zero",
                    _counted,
                    in_words=True,
                ),
                Step(
                    r"\mathrm{tr}\,\mathrm{Var}[(w-E_p w)s] = \mathrm{tr}\,\mathrm{Var}[(w-c^*)s] + (E_p w - c^*)^2"
                    " E_p|s|^2",
                    "this is the parabola of T7a at $c = E_p[w]$",
                    _parabola,
                ),
            ),
            identities=(
                Identity(
                    "over every group",
                    r"G\,\mathrm{tr}\,\mathrm{Var}[\hat g] = \mathrm{tr}\,\mathrm{Var}[(w - E_p w)s] +"
                    r" \tfrac{1}{G-1}(\mathrm{Var}_p(w)\,E_p|s|^2 + |E_p[w s]|^2)",
                    _check_variance,
                    _claimed,
                    {
                        "as the best constant": lambda m, size: m.at(m.best),
                        "as the mean weight": lambda m, size: m.at(m.mean),
                        "the gradient's square dropped": lambda m, size: (
                            m.at(m.mean) + m.variance * m.norm / (size - 1)
                        ),
                        "1/G": lambda m, size: m.at(m.mean) + (m.variance * m.norm + m.gradient) / size,
                    },
                    "exact",
                ),
                Identity(
                    "what it costs against the best constant",
                    r"(E_p w - c^*)^2 E_p|s|^2 + \tfrac{1}{G-1}(\mathrm{Var}_p(w)\,E_p|s|^2 + |E_p[w s]|^2)",
                    _check_excess,
                    lambda m, size: (m.mean - m.best) ** 2 * m.norm + (m.variance * m.norm + m.gradient) / (size - 1),
                    {
                        "nothing": lambda m, size: Fraction(0),
                        "nothing but the learning": lambda m, size: (m.variance * m.norm + m.gradient) / (size - 1),
                        "nothing but the mean": lambda m, size: (m.mean - m.best) ** 2 * m.norm,
                    },
                    "exact",
                ),
                Identity(
                    "from which group on it beats a constant",
                    r"G - 1 > \frac{\mathrm{Var}_p(w)\,E_p|s|^2 + |E_p[w s]|^2}"
                    r"{((c - c^*)^2 - (E_p w - c^*)^2)\,E_p|s|^2} \text{ if } |c - c^*| > |E_p w - c^*|, "
                    r"\text{ never otherwise}",
                    _check_from_which_group,
                    lambda m, size, c: (
                        (size - 1) * ((c - m.best) ** 2 - (m.mean - m.best) ** 2) * m.norm
                        > m.variance * m.norm + m.gradient
                    ),
                    {
                        "never": lambda m, size, c: False,
                        "always": lambda m, size, c: True,
                        "if the mean is nearer to the best": lambda m, size, c: (
                            (c - m.best) ** 2 > (m.mean - m.best) ** 2
                        ),
                    },
                    "exact",
                ),
                Identity(
                    "the group's own mean",
                    r"\hat g_{\mathrm{mean}} = \tfrac{G-1}{G}\,\hat g:\ \mathrm{tr}\,\mathrm{Var}[\hat"
                    r" g_{\mathrm{mean}}] = \tfrac{(G-1)^2}{G^2}\,\mathrm{tr}\,\mathrm{Var}[\hat g]",
                    _check_group_mean,
                    lambda size: Fraction(size - 1, size) ** 2,
                    {
                        "the same": lambda size: Fraction(1),
                        "(G-1)/G": lambda size: Fraction(size - 1, size),
                        "1/G": lambda size: Fraction(1, size),
                    },
                    "exact",
                ),
                Identity(
                    "the library's leave-one-out as a black box",
                    r"G\,\mathrm{tr}\,\mathrm{Var}[\hat g] \text{ in closed form and over every group}",
                    _check_library,
                    "leave_one_out",
                    {"the best constant": "sampled", "the centred constant": "centred"},
                ),
            ),
        )
    ]


def _claimed(m: Moments, size: int) -> Any:
    return m.at(m.mean) + (m.variance * m.norm + m.gradient) / (size - 1)


def _moments(p: Sequence[Any], w: Sequence[Any], scores: Sequence[Sequence[Any]]) -> Moments:
    norms, mean = [square(s) for s in scores], expectation(p, w)
    terms = [[x * y for y in s] for x, s in zip(w, scores, strict=True)]
    gradient = square([dot(p, column) for column in zip(*terms, strict=True)])
    w_norm = dot(p, [x * n for x, n in zip(w, norms, strict=True)])
    variance = expectation(p, [(x - mean) ** 2 for x in w])
    return Moments(mean, variance, dot(p, norms), w_norm, gradient, spread(p, terms))


def _others(own: Sequence[Any], i: int) -> Any:
    return (sum(own) - own[i]) / (len(own) - 1)


def _everyone(own: Sequence[Any], i: int) -> Any:
    return sum(own) / len(own)


def _over_groups(
    p: Sequence[Any],
    w: Sequence[Any],
    scores: Sequence[Sequence[Any]],
    size: int,
    baseline: Callable[[Sequence[Any], int], Any] = _others,
) -> Any:
    """The variance of a group's gradient, from every group of tokens."""
    chances, estimates = [], []
    for group in itertools.product(range(len(p)), repeat=size):
        own = [w[a] for a in group]
        terms = [[(own[i] - baseline(own, i)) * x for x in scores[a]] for i, a in enumerate(group)]
        chances.append(math.prod((p[a] for a in group[1:]), start=p[group[0]]))
        estimates.append([sum(column) / size for column in zip(*terms, strict=True)])
    return spread(chances, estimates)


class Group(NamedTuple):
    """One row, its moments and the variance of its groups of one size."""

    name: str
    p: Distribution
    q: Distribution
    w: list[Fraction]
    scores: list[list[Fraction]]
    size: int
    moments: Moments
    variance: Fraction

    def where(self) -> tuple[object, ...]:
        """A label."""
        return self.name, self.p, self.q, f"G {self.size}", parameters_of(self.p, self.scores)


@functools.cache
def _groups() -> tuple[Group, ...]:
    """Every divergence, pair of laws, size and parameters."""
    found = []
    for name, p, q, w in weighted(RATIONAL, count=4):
        for jacobian in jacobians(len(p)):
            scores = pushed_scores(p, jacobian)
            for size in SIZES if len(p) == 2 else SIZES[:2]:
                variance = _over_groups(p, w, scores, size)
                found.append(Group(name, p, q, w, scores, size, _moments(p, w, scores), variance))
    return tuple(found)


def _check_variance(claim: OfMoments) -> Cases:
    for group in _groups():
        yield same(group.size * group.variance, claim(group.moments, group.size), *group.where())


def _check_excess(claim: OfMoments) -> Cases:
    for group in _groups():
        best = spread(
            group.p,
            [[(x - group.moments.best) * y for y in s] for x, s in zip(group.w, group.scores, strict=True)],
        )
        yield same(group.size * group.variance - best, claim(group.moments, group.size), *group.where())


def _check_from_which_group(claim: Callable[[Moments, int, Fraction], bool]) -> Cases:
    for group in _groups():
        for shift in (Fraction(0), Fraction(1, 4), Fraction(-1), Fraction(8)):
            c = group.moments.best + shift
            own = spread(group.p, [[(x - c) * y for y in s] for x, s in zip(group.w, group.scores, strict=True)])
            found = group.size * group.variance < own
            yield holds(found == claim(group.moments, group.size, c), *group.where(), f"c* + {shift}")


def _check_group_mean(share: Callable[[int], Fraction]) -> Cases:
    for group in _groups():
        if group.size < 4:
            found = _over_groups(group.p, group.w, group.scores, group.size, _everyone)
            yield same(found, share(group.size) * group.variance, *group.where())


def _check_library(which: str) -> Cases:
    """The estimator with a leave-one-out baseline, run on every group."""
    for name in SMOOTH:
        for seed, size in itertools.product((1, 2), (2, 3)):
            pair = random_pair(3, 1, scale=1.0, distance=1.0, seed=seed)
            student, teacher = (policy.logits[0] for policy in pair)
            claimed: Tensor = getattr(least_variance(student, teacher, name, group=size), which).variance[0]
            found = sampled_variance_of_group("opd_plus", name, pair, size, baseline="leave_one_out")
            yield close(size * found, claimed, name, f"seed {seed}", f"G {size}")


# The derivation.


def _two_sums() -> bool:
    m = sympy.Symbol("m")
    for size in SIZES:
        w, s = sympy.symbols(f"w0:{size}"), sympy.symbols(f"s0:{size}")
        left = sum((w[i] - _others(w, i)) * s[i] for i in range(size)) / size
        own = sum((w[i] - m) * s[i] for i in range(size)) / size
        crossed = sum((w[j] - m) * s[i] for i, j in itertools.permutations(range(size), 2)) / (size * (size - 1))
        if sympy.expand(left - own + crossed) != 0:
            return False
    return True


def _row() -> tuple[list[Any], list[Any], list[Any]]:
    """Three tokens: probabilities, weights of mean zero and scores of mean zero."""
    p = list(sympy.symbols("p0:2", positive=True))
    p.append(1 - sum(p))
    w, s = list(sympy.symbols("w0:2", real=True)), list(sympy.symbols("s0:2", real=True))
    return p, [*w, -dot(p[:2], w) / p[2]], [*s, -dot(p[:2], s) / p[2]]


def _products() -> bool:
    p, w, s = _row()
    tokens = range(3)

    def expected(product: Callable[[int, int], Any]) -> Any:
        return sum(p[a] * p[b] * product(a, b) for a in tokens for b in tokens)

    gradient = sum(p[a] * w[a] * s[a] for a in tokens)
    spreads = sum(p[a] * w[a] ** 2 for a in tokens) * sum(p[a] * s[a] ** 2 for a in tokens)
    gaps = (
        expected(lambda a, b: w[a] * s[a] * w[b] * s[a]),
        expected(lambda a, b: w[a] * s[a] * w[a] * s[b]),
        expected(lambda a, b: (w[b] * s[a]) ** 2) - spreads,
        expected(lambda a, b: w[b] * s[a] * w[a] * s[b]) - gradient**2,
    )
    return all(sympy.simplify(gap) == 0 for gap in gaps)


def _counted() -> bool:
    """The closed form of a group of two and of three, from every group of two tokens."""
    p = sympy.Symbol("p", positive=True)
    w, s = sympy.symbols("w0:2", real=True), sympy.Symbol("s", real=True)
    row, scores = [p, 1 - p], [[s], [-p * s / (1 - p)]]
    return all(
        sympy.simplify(size * _over_groups(row, w, scores, size) - _claimed(_moments(row, w, scores), size)) == 0
        for size in SIZES[:2]
    )


def _parabola() -> bool:
    plain, w_norm, mean = sympy.symbols("v x m", real=True)
    norm = sympy.Symbol("n", positive=True)
    m = Moments(mean, 0, norm, w_norm, 0, plain)
    return sympy.simplify(m.at(mean) - m.at(m.best) - (mean - m.best) ** 2 * norm) == 0
