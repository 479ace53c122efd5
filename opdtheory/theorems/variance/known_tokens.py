"""T19b: with the probabilities of some tokens known, what is unbiased, what is certain, and what is least."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import sympy
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import least_variance
from opdtheory.theorems.instances.cases import Distribution, distribution, pairs, sampled_variance
from opdtheory.theorems.instances.freedom import freedom
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    dot,
    first_rows,
    jacobians,
    parameters_of,
    projected,
    pushed_scores,
    score,
    simplex,
    spread,
    square,
    weight_of,
    weighted,
    weights,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

Vector = list[Any]
RATIONAL = ("forward_kl", "chi2", "le_cam")


class Parts(NamedTuple):
    r"""One row, split: $g_S$ and $g_T$ at the constant, $p(S)$, and the spreads given either event."""

    on_set: Vector
    on_tail: Vector
    chance: Any
    within_set: Any
    within_tail: Any


# The vector that the estimate on S is ahead of the one on T, from the parts; and the difference it makes.
Ahead = Callable[[Parts], Vector]
OfParts = Callable[[Parts], Any]


def theorems() -> list[Theorem]:
    """T19b."""
    return [
        Theorem(
            number="T19b",
            name="the least variance with some tokens known",
            meaning=(
                "When the probabilities of a set $S$ of tokens are known besides those of the sampled token, an"
                " unbiased estimate still has the weight of T1 less a constant on the rest $T$, and on $S$ only its"
                " mean is prescribed. Its variance is the sum of what varies within $S$, between $S$ and $T$, and"
                " within $T$. The mean on $S$ in place of the sampled token never adds variance, T13's split may, and"
                " the least variance takes the distributions on $T$ as well."
            ),
            statement=(
                r"\hat g = 1_S\,r_y + 1_T\,(k + A_y s_y);\quad \text{unbiased} \iff A = w_f - c,\ p_S E[r|S] + p_T k"
                r" = g_S;\quad \mathrm{tr}\,\mathrm{Var}[\hat g] = p_S\,\mathrm{tr}\,\mathrm{Var}[r|S] + p_S"
                r" p_T\,\big|E[r|S] - k - g_T/p_T\big|^2 + p_T\,\mathrm{tr}\,\mathrm{Var}[(w-c)s|T];\quad g_S ="
                r" E_p[1_S(w-c)s],\ g_T = E_p[1_T(w-c)s];\quad \text{the mean given } S\ (r = g_S/p_S,\ k = 0) \text{"
                r" saves } p_S\,\mathrm{tr}\,\mathrm{Var}[(w-c)s|S] \ge 0;\quad \text{T13's split } (r = k = g_S)"
                r" \text{ has } 2\,g_S\cdot g_T - \tfrac{p_T}{p_S}|g_S|^2 \text{ more than the mean given } S;\quad"
                r" \text{least: } r = E[r|S],\ E[r|S] - k = \Pi_S\,g_T/p_T"
            ),
            hypotheses=(
                "$S$ is chosen without looking at the sampled token $y$; neither $S$ nor its rest $T$ is empty, and"
                " $p_S$ and $p_T$ are their probabilities",
                "$r$, $k$ and $A$ depend on the probabilities of $S$, $r$ also on $y$, and $A$ also on $y$, $p_y$ and"
                " $q_y$; $r$ and $k$ are weighted sums of the scores of $S$; unbiased means: for all distributions"
                " with these probabilities on $S$",
                "for the uniqueness, scores are taken in the logits; for the variances, in any parameters",
                "$g_S$, $g_T$ and the spreads are taken at the constant $c$, which may depend on the probabilities of"
                " $S$",
                r"$\Pi_S$ projects on the scores of $S$; like the best constant, what it gives needs the"
                " distributions on $T$",
            ),
            source="the conditional mean is Rao-Blackwell's; the rest derived here",
            advice=(
                "Take T13's split with $c = w_f(q(T)/p(T))$, the weight of the rest as one token: it has no variance"
                " where the ratio is level on $T$. As a rule it has less than the sampled token alone, but not"
                " always; the mean given $S$ never has more, and is the sampled token alone if $S$ is one token. With"
                " both whole distributions sum over the vocabulary: nothing is left to chance."
            ),
            derivation=(
                Step(
                    r"\textstyle\sum_a x_a s_a = 0 \iff x \propto p",
                    "the scores of a softmax row satisfy one linear relation and no other; sympy shows it for three"
                    " tokens",
                    _one_relation,
                ),
                Step(
                    r"x_a = K_a - p_a w_a \text{ on } S,\ p_a (A_a - w_a) \text{ on } T:\quad x = -c\,p",
                    "let $K_a$ be the coefficients of $p_S E[r|S] + p_T k$ in the scores of $S$. The estimate is"
                    r" unbiased exactly if $\sum_a x_a s_a = 0$ for these $x_a$, which the first step turns into $x ="
                    r" -c\,p$. As $K_a$, $p_a$ and $w_a$ are known on $S$, so is $c$, and it is the constant of the"
                    " tail too",
                    lambda: freedom(3, 1) == freedom(2, 1) == 1,
                    in_words=True,
                ),
                Step(
                    r"\mathrm{Var}[\hat g] = p_S \mathrm{Var}[\hat g|S] + p_T \mathrm{Var}[\hat g|T] + "
                    r"p_S p_T |E[\hat g|S] - E[\hat g|T]|^2",
                    "this is the law of total variance for the events that $y$ is in $S$ or in $T$. Sympy confirms it"
                    " for two tokens in either event and one component; the trace adds the components up",
                    _total_variance,
                ),
                Step(
                    r"\tfrac{p_S}{p_T}|g_T|^2 - p_S p_T\,\big|\tfrac{g_S}{p_S} - \tfrac{g_T}{p_T}\big|^2 = "
                    r"2\,g_S\cdot g_T - \tfrac{p_T}{p_S}|g_S|^2",
                    "the two estimates differ in the middle term only, in which $E[r|S] - k$ is 0 for the split and"
                    " $g_S/p_S$ for the mean given $S$. The sampled token alone has the same middle term as the mean"
                    " given $S$, and the spread within $S$ besides, which is what the mean saves",
                    _split_against_mean,
                ),
                Step(
                    r"|v - \Lambda|^2 = |v - \Pi v|^2 + |\Pi v - \Lambda|^2",
                    r"here $v = g_T/p_T$, $\Lambda = E[r|S] - k$ is in the span of the scores of $S$, and $\Pi$ is the"
                    " projection on that span. The two parts are at right angles, so the middle term is least at"
                    r" $\Lambda = \Pi v$. Sympy confirms it for one direction and two components",
                    _projection,
                ),
                Step(
                    r"w = c \text{ on } T:\ g_T = 0,\ \mathrm{Var}[(w - c) s|T] = 0",
                    "where the weight is the constant $c$ on $T$, the last term of the variance is zero and so is"
                    " $g_T$. The split has $r = k$, one known vector, so the other two terms are zero as well",
                    _level_tail,
                ),
            ),
            identities=(
                Identity(
                    "how much freedom",
                    r"\text{one constant, on any number of tokens, as soon as one is known}",
                    _check_freedom,
                    lambda size, known: 1,
                    {
                        "one for the set and one for the tail": lambda size, known: 2,
                        "one for each known token": lambda size, known: known,
                        "none": lambda size, known: 0,
                    },
                    "exact",
                ),
                Identity(
                    "what is left to chance",
                    r"p_S\,\mathrm{tr}\,\mathrm{Var}[r|S] + p_S p_T\,|\Lambda - g_T/p_T|^2 +"
                    r" p_T\,\mathrm{tr}\,\mathrm{Var}[(w-c)s|T],\ \Lambda = E[r|S] - k",
                    _check_variance,
                    lambda parts, ahead, r: _within(parts, r) + _between(parts, ahead),
                    {
                        "the tail alone": lambda parts, ahead, r: _within(parts, r),
                        "the events as one": lambda parts, ahead, r: _between(parts, ahead),
                        "between the events as for the split": lambda parts, ahead, r: (
                            _within(parts, r) + _between(parts, [0 * x for x in ahead])
                        ),
                        "within the set left out": lambda parts, ahead, r: (
                            _within(parts, Fraction(0)) + _between(parts, ahead)
                        ),
                    },
                    "exact",
                ),
                Identity(
                    "what the mean given S saves",
                    r"\mathrm{tr}\,\mathrm{Var}[(w-c)s] - \mathrm{tr}\,\mathrm{Var}[1_S\,g_S/p_S + 1_T (w-c)s] ="
                    r" p_S\,\mathrm{tr}\,\mathrm{Var}[(w-c)s|S]",
                    _check_mean_given_set,
                    lambda parts: parts.chance * parts.within_set,
                    {
                        "nothing": lambda parts: Fraction(0),
                        "the second moment": lambda parts: (
                            parts.chance * parts.within_set + square(parts.on_set) / parts.chance
                        ),
                        "the spread itself": lambda parts: parts.within_set,
                    },
                    "exact",
                ),
                Identity(
                    "the split against the mean given S",
                    r"2\,g_S\cdot g_T - \tfrac{p_T}{p_S}|g_S|^2",
                    _check_split,
                    lambda parts: 2 * dot(parts.on_set, parts.on_tail) - _odds(parts) * square(parts.on_set),
                    {
                        "the cross term dropped": lambda parts: -_odds(parts) * square(parts.on_set),
                        "the chances dropped": lambda parts: (
                            2 * dot(parts.on_set, parts.on_tail) - square(parts.on_set)
                        ),
                        "the cross term's sign flipped": lambda parts: (
                            -2 * dot(parts.on_set, parts.on_tail) - _odds(parts) * square(parts.on_set)
                        ),
                    },
                    "exact",
                ),
                Identity(
                    "when the split is worse than the sampled token alone",
                    r"2\,g_S\cdot g_T > \tfrac{p_T}{p_S}|g_S|^2 + p_S\,\mathrm{tr}\,\mathrm{Var}[(w-c)s|S]",
                    _check_worse,
                    lambda parts: (
                        2 * dot(parts.on_set, parts.on_tail)
                        > _odds(parts) * square(parts.on_set) + parts.chance * parts.within_set
                    ),
                    {
                        "never": lambda parts: False,
                        "always": lambda parts: True,
                        "where the parts pull together": lambda parts: dot(parts.on_set, parts.on_tail) > 0,
                    },
                    "exact",
                ),
                Identity(
                    "the split is no bound with the best constants either",
                    r"p = \tfrac{1}{12}(1, 8, 3),\ q = \tfrac15(1, 1, 3),\ S = \{3\},\ \text{forward KL}",
                    _check_best_constants,
                    lambda first: first,
                    {"never worse": lambda first: False, "always worse": lambda first: True},
                    "exact",
                ),
                Identity(
                    "the best known vector",
                    r"\mathrm{tr}\,\mathrm{Var}(\Lambda) - \mathrm{tr}\,\mathrm{Var}(\Lambda^*) = p_S p_T\,|\Lambda -"
                    r" \Lambda^*|^2",
                    _check_projection,
                    lambda parts, known: projected([x / (1 - parts.chance) for x in parts.on_tail], known),
                    {
                        "none, the split": lambda parts, known: [0 * x for x in parts.on_set],
                        "the mean given S": lambda parts, known: [x / parts.chance for x in parts.on_set],
                        "not divided by the chance": lambda parts, known: projected(parts.on_tail, known),
                    },
                    "exact",
                ),
                Identity(
                    "a level tail",
                    r"u = q(T)/p(T) \text{ on } T,\ c = w_f(q(T)/p(T)):\ \mathrm{tr}\,\mathrm{Var} = 0 \text{ for the"
                    " split}",
                    _check_level_tail,
                    lambda level, at_one: level,
                    {"the centred constant": lambda level, at_one: at_one, "none": lambda level, at_one: Fraction(0)},
                    "exact",
                ),
                Identity(
                    "the library's split as a black box",
                    r"\text{the best constant, in closed form and over every token}",
                    _check_library,
                    "split",
                    {"the mean given S": "event", "the floor": "floor", "the sampled token alone": "sampled"},
                ),
            ),
        )
    ]


def _check_freedom(claim: Callable[[int, int], int]) -> Cases:
    for size, known in ((2, 1), (3, 1), (4, 1), (4, 2)):
        yield same(freedom(size, known), claim(size, known), f"{size} tokens", f"{known} known")


# In fractions.


class Row(NamedTuple):
    """One row, its divergence's weights less a constant, the scores in some parameters, and how many are known."""

    name: str
    p: Distribution
    q: Distribution
    w: list[Fraction]
    scores: list[Vector]
    k: int
    c: Fraction

    def where(self) -> tuple[object, ...]:
        """A label."""
        return self.name, self.p, self.q, f"k {self.k}", f"c {self.c}", parameters_of(self.p, self.scores)


def _rows() -> Iterator[Row]:
    for name, p, q, w in weighted(RATIONAL):
        at_one = Fraction(str(weight_of(name).subs(divergences.symbol(), 1)))
        for jacobian in jacobians(len(p)):
            scores = pushed_scores(p, jacobian)
            for k in range(1, len(p)):
                for c in (Fraction(0), at_one + Fraction(1, 5)):
                    yield Row(name, p, q, [x - c for x in w], scores, k, c)


def _sum(coefficients: Sequence[Any], vectors: Sequence[Vector]) -> Vector:
    return [dot(coefficients, column) for column in zip(*vectors, strict=True)]


def _parts(row: Row) -> Parts:
    terms = [[x * y for y in s] for x, s in zip(row.w, row.scores, strict=True)]
    k, chance = row.k, sum(row.p[: row.k])
    inside, outside = [a / chance for a in row.p[:k]], [a / (1 - chance) for a in row.p[k:]]
    return Parts(
        _sum(row.p[:k], terms[:k]),
        _sum(row.p[k:], terms[k:]),
        chance,
        spread(inside, terms[:k]),
        spread(outside, terms[k:]),
    )


def _odds(parts: Parts) -> Any:
    return (1 - parts.chance) / parts.chance


def _within(parts: Parts, r: Any) -> Any:
    return parts.chance * r + (1 - parts.chance) * parts.within_tail


def _between(parts: Parts, ahead: Vector) -> Any:
    gap = [x - y / (1 - parts.chance) for x, y in zip(ahead, parts.on_tail, strict=True)]
    return parts.chance * (1 - parts.chance) * square(gap)


def _spread_of(row: Row, ahead: Vector, noise: Sequence[Vector] | None = None) -> Any:
    """The variance over every token of the estimate that is so far ahead on S, and spread there by a noise."""
    parts = _parts(row)
    on_set = [x + (1 - parts.chance) * y for x, y in zip(parts.on_set, ahead, strict=True)]
    known = [x - parts.chance * y for x, y in zip(parts.on_set, ahead, strict=True)]
    estimates = []
    for a, (x, s) in enumerate(zip(row.w, row.scores, strict=True)):
        if a < row.k:
            estimates.append([y + z for y, z in zip(on_set, noise[a] if noise else [0] * len(s), strict=True)])
        else:
            estimates.append([y + x * z for y, z in zip(known, s, strict=True)])
    return spread(row.p, estimates)


def _noise(row: Row) -> tuple[list[Vector], Any]:
    """Vectors of mean zero on S, and their spread there."""
    chance = sum(row.p[: row.k])
    inside = [a / chance for a in row.p[: row.k]]
    own = [[Fraction((3 * a + j) % 4) for j in range(len(row.scores[0]))] for a in range(row.k)]
    mean = _sum(inside, own)
    centred = [[x - y for x, y in zip(each, mean, strict=True)] for each in own]
    return centred, spread(inside, centred)


def _check_variance(claim: Callable[[Parts, Vector, Any], Any]) -> Cases:
    """The variance over every token against the three terms, with and without noise on the set."""
    for row in _rows():
        parts = _parts(row)
        noise, size = _noise(row)
        for share in (Fraction(0), Fraction(2, 3)):
            ahead = [share * x / parts.chance for x in parts.on_set]
            yield same(_spread_of(row, ahead, noise), claim(parts, ahead, size), *row.where(), f"share {share}")


def _sampled_alone(row: Row) -> Any:
    return spread(row.p, [[x * y for y in s] for x, s in zip(row.w, row.scores, strict=True)])


def _given_set(parts: Parts) -> Vector:
    return [x / parts.chance for x in parts.on_set]


def _check_mean_given_set(saved: OfParts) -> Cases:
    for row in _rows():
        parts = _parts(row)
        yield same(_sampled_alone(row) - _spread_of(row, _given_set(parts)), saved(parts), *row.where())


def _check_split(more: OfParts) -> Cases:
    for row in _rows():
        parts = _parts(row)
        split = _spread_of(row, [Fraction(0)] * len(parts.on_set))
        yield same(split - _spread_of(row, _given_set(parts)), more(parts), *row.where())


def _check_worse(predicted: OfParts) -> Cases:
    for row in _rows():
        parts = _parts(row)
        worse = _spread_of(row, [Fraction(0)] * len(parts.on_set)) > _sampled_alone(row)
        yield holds(worse == bool(predicted(parts)), *row.where())


def _least(spread_at: Callable[[Fraction], Fraction]) -> Fraction:
    """The lowest point of a parabola, from three of its values."""
    low, middle, high = (spread_at(Fraction(c)) for c in (-1, 0, 1))
    curved, slope = (low + high - 2 * middle) / 2, (high - low) / 2
    return middle - slope**2 / (4 * curved)


def _forward_kl(p: Distribution, q: Distribution, c: Fraction, *, split: bool) -> Fraction:
    """The variance of the split, or of the sampled token alone; the first token is known."""
    w = [x - c for x in weights("forward_kl", p, q)]
    row = Row("forward_kl", p, q, w, [score(p, a) for a in range(len(p))], 1, c)
    return _spread_of(row, [Fraction(0)] * len(p)) if split else _sampled_alone(row)


def _check_best_constants(worse: Callable[[bool], bool]) -> Cases:
    """Both with the best constant: an instance where the split has the larger variance, and one where it has not."""
    d = distribution
    for p, q, first in ((d(3, 1, 8), d(3, 1, 1), True), (d(1, 2, 3, 4), d(7, 1, 1, 2), False)):
        alone, split = (_least(functools.partial(_forward_kl, p, q, split=way)) for way in (False, True))
        yield holds((split > alone) == worse(first), p, q)


def _check_projection(best: Callable[[Parts, Sequence[Vector]], Vector]) -> Cases:
    """What any other known vector adds to the variance of the best."""
    for row in _rows():
        parts, known = _parts(row), row.scores[: row.k]
        claimed = best(parts, known)
        for a, shift in enumerate(known):
            other = [x + Fraction(a + 1, 2) * y for x, y in zip(claimed, shift, strict=True)]
            added = _spread_of(row, other) - _spread_of(row, claimed)
            apart = [x - y for x, y in zip(other, claimed, strict=True)]
            yield same(added, parts.chance * (1 - parts.chance) * square(apart), *row.where(), f"score {a}")


def _check_level_tail(constant: Callable[[Fraction, Fraction], Fraction]) -> Cases:
    """A teacher whose ratio is one number on the tail: nothing is left to chance."""
    for name in RATIONAL:
        at_one = Fraction(str(weight_of(name).subs(divergences.symbol(), 1)))
        for p, first in ((distribution(1, 2, 3), Fraction(1, 2)), (distribution(4, 1, 3, 2), Fraction(1, 5))):
            level = (1 - first) / (1 - p[0])
            q = (first, *(level * a for a in p[1:]))
            w = weights(name, p, q)
            c = constant(w[1], at_one)
            row = Row(name, p, q, [x - c for x in w], [score(p, a) for a in range(len(p))], 1, c)
            yield same(_spread_of(row, [Fraction(0)] * len(p)), Fraction(0), name, p, q)


def _check_library(which: str) -> Cases:
    for name in SMOOTH:
        for pair in pairs()[:2]:
            row = first_rows(pair)
            student, teacher = (policy.logits[0] for policy in row)
            for k in range(1, student.shape[-1] - 1):
                claimed: Tensor = getattr(least_variance(student, teacher, name, k), which).variance[0]
                found = sampled_variance("topk_tail_sampled", name, row, k=k, baseline="optimal")
                yield close(found, claimed, name, row, f"k {k}")


# The derivation.


def _one_relation() -> bool:
    p = simplex("p")
    matrix = sympy.Matrix(3, 3, lambda j, a: score(p, a)[j])
    related = sympy.expand(matrix * sympy.Matrix(p)) == sympy.zeros(3, 1)
    return related and sympy.factor(matrix[:2, :2].det() - p[2]) == 0


def _total_variance() -> bool:
    """Four tokens, the first two in S; any numbers as estimates."""
    p = [*sympy.symbols("p0:3", positive=True)]
    p.append(1 - sum(p))
    x = sympy.symbols("x0:4", real=True)
    chance = p[0] + p[1]
    inside, outside = [a / chance for a in p[:2]], [a / (1 - chance) for a in p[2:]]
    within = chance * spread(inside, [[y] for y in x[:2]]) + (1 - chance) * spread(outside, [[y] for y in x[2:]])
    between = chance * (1 - chance) * (dot(inside, x[:2]) - dot(outside, x[2:])) ** 2
    return sympy.cancel(sympy.together(spread(p, [[y] for y in x]) - within - between)) == 0


def _split_against_mean() -> bool:
    chance = sympy.Symbol("p_S", positive=True)
    on_set, on_tail = sympy.symbols("g0:2", real=True), sympy.symbols("h0:2", real=True)
    parts = Parts(list(on_set), list(on_tail), chance, 0, 0)
    gap = _between(parts, [sympy.Integer(0)] * 2) - _between(parts, _given_set(parts))
    claimed = 2 * dot(on_set, on_tail) - _odds(parts) * square(on_set)
    return sympy.simplify(gap - claimed) == 0


def _projection() -> bool:
    v, d, length = sympy.symbols("v0:2", real=True), sympy.symbols("d0:2", real=True), sympy.Symbol("l", real=True)
    best = [dot(v, d) / square(d) * x for x in d]
    other = [length * x for x in d]
    parts = [square([x - y for x, y in zip(left, right, strict=True)]) for left, right in ((v, other), (v, best))]
    apart = square([x - y for x, y in zip(best, other, strict=True)])
    return sympy.simplify(parts[0] - parts[1] - apart) == 0


def _level_tail() -> bool:
    """Three tokens, the last two with the constant as their weight; two free components of the scores."""
    p, c = simplex("p"), sympy.Symbol("c", real=True)
    w = [sympy.Symbol("w0", real=True), c, c]
    scores = [list(sympy.symbols(f"s{a}_0:2", real=True)) for a in range(3)]
    terms = [[(x - c) * y for y in s] for x, s in zip(w, scores, strict=True)]
    known = _sum(p[:1], terms[:1])
    estimates = [known, *([x + y for x, y in zip(known, term, strict=True)] for term in terms[1:])]
    return sympy.simplify(spread(p, estimates)) == 0
