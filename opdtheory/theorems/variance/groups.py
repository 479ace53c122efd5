"""T7e and T7f: groups of rollouts, with their mean, leave-one-out mean and standard deviation as baseline and scale."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

import sympy
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import exact_gradient, random_pair
from opdtheory.theorems.instances.cases import (
    Distribution,
    Pair,
    distribution,
    interval,
    rational_distributions,
    sampled_gradient,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    dot,
    expectation,
    intervals,
    log_rows,
    mean_gradient,
    row_gradient,
    score,
    square,
    variance,
    weighted,
    weights,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

GroupBaseline = Callable[[Sequence[Any], int], Any]
Baseline = Literal["leave_one_out", "group_mean"]
SIZES = (2, 3, 4)


def theorems() -> list[Theorem]:
    """T7e and T7f."""
    return [_group_baselines(), _independent()]


def _group_baselines() -> Theorem:
    one = Fraction(1)
    return Theorem(
        number="T7e",
        name="baselines and scales from a group",
        meaning=(
            "With several rollouts of one prompt, the mean of the others is a baseline that keeps the mean of the"
            " gradient. The mean of all of them, the rollout's own included, shrinks it by exactly $(G-1)/G$ if all"
            " rollouts have one length. Dividing by the group's standard deviation changes the direction in general."
        ),
        statement=(
            r"E[(A_i - \bar A_{-i})\,s_i] = E[A\,s];\quad"
            r" E[(A_i - \bar A)\,s_i] = \tfrac{G-1}{G}\,E[A\,s];\quad"
            r" E\big[\tfrac{A_i - \bar A}{\sigma}\,s_i\big] \not\parallel E[A\,s] \text{ in general}"
        ),
        hypotheses=(
            r"the $G$ rollouts are independent, and the advantage $A_i$ is a function of rollout $i$; $\bar A$ is the"
            r" mean of the group, $\bar A_{-i}$ that of the others, $\sigma$ the group's standard deviation",
            "for the group mean, all rollouts have one length; otherwise the number still running is random",
            "the last claim has exceptions, for which each of these is sufficient and not necessary: an advantage of"
            " two values, with $G = 2$ or $G = 3$, or with one step at any $G$; one step and an advantage of three"
            " equally spaced values, symmetrically distributed",
        ),
        source="RLOO, arXiv 2402.14740; GRPO, arXiv 2402.03300; derived here",
        advice=(
            "Use leave-one-out, or multiply the group mean's gradient by $G/(G-1)$; do not divide by the group's"
            " standard deviation if the direction matters."
        ),
        derivation=(
            Step(
                r"E[\bar A_{-i}\,s_i] = E[\bar A_{-i}]\,E[s_i] = 0",
                "the other rollouts are independent of this one, whose score has mean zero. Sympy sums over all"
                " groups of 2, 3 and 4 rollouts, with symbolic weights and scores",
                lambda: _expected_with(_others, lambda size: one),
            ),
            Step(
                r"E[\bar A\,s_i] = \tfrac1G\,E[A_i s_i]",
                "of the $G$ terms of the group's mean, only the rollout's own is correlated with its score. So the"
                " baseline takes away one part in $G$ of the gradient",
                lambda: _expected_with(_everyone, lambda size: Fraction(size - 1, size)),
            ),
            Step(
                r"\sigma^2 = \tfrac{k(G-k)}{G(G-1)}(b-a)^2 \text{ for } k \text{ of } G \text{ at } b",
                "let the advantage take two values, $a$ and $b$: the group's variance depends only on how many"
                " rollouts have which",
                _spread_of_two_values,
            ),
            Step(
                r"k(G-k) \text{ is the same for all } 0 < k < G \iff G \le 3",
                r"the product is $G - 1$ at $k = 1$ and $2(G - 2)$ at $k = 2$, which are equal for $G = 3$ only; for"
                r" $G = 2$ there is only $k = 1$. Up to three rollouts, $\sigma$ is therefore one constant in all"
                r" groups that have a spread, and dividing by it turns no direction",
                _one_spread_only_up_to_three,
                in_words=True,
            ),
            Step(
                r"A \in \{a, b\}:\ E\big[\tfrac{A_i - \bar A}{\sigma} \mid A_i\big] = \alpha + \beta A_i,\ \beta > 0",
                r"given $A_i$, the expected z-score is a function of two values, so it is affine, for any $G$. In"
                r" every group with a spread the z-score of the larger value is positive and that of the smaller one"
                r" negative, so $\beta > 0$. This slope depends on the distribution of $A$, which differs between"
                r" steps: hence the exception is for one step",
                _affine_on_two_values,
                in_words=True,
            ),
            Step(
                r"A \in \{-1, 0, 1\},\ P(A = 1) = P(A = -1):\ E[z_i \mid A_i = 0] = 0,\ E[z_i \mid A_i = -1] = -E[z_i"
                r" \mid A_i = 1]",
                r"$z_i = (A_i - \bar A)/\sigma$ is the z-score. If every advantage changes its sign, the groups have"
                r" the same distribution, so the expected z-score is an odd function of $A_i$, and an odd function of"
                r" three such values is affine. Sympy sums over all groups of 2 and 3 rollouts, with a symbolic"
                r" probability",
                _odd_on_symmetric_values,
            ),
        ),
        identities=(
            Identity(
                "leave-one-out in fractions",
                r"E[(A_i - \bar A_{-i}) s_i] = E[A s]",
                functools.partial(_check_scale, _others),
                lambda size: one,
                {"scaled by (G-1)/G": lambda size: Fraction(size - 1, size)},
                "exact",
            ),
            Identity(
                "group mean in fractions",
                r"E[(A_i - \bar A) s_i] = \tfrac{G-1}{G} E[A s]",
                functools.partial(_check_scale, _everyone),
                lambda size: Fraction(size - 1, size),
                {
                    "unbiased": lambda size: one,
                    "scaled by G/(G-1)": lambda size: Fraction(size, size - 1),
                    "scaled by 1/G": lambda size: Fraction(1, size),
                },
                "exact",
            ),
            Identity(
                "group baselines as black boxes",
                r"\text{factors } 1 \text{ and } (G-1)/G \text{ on two steps}",
                _check_library,
                {"leave_one_out": lambda size: 1.0, "group_mean": lambda size: (size - 1) / size},
                {
                    "group mean unbiased": {"group_mean": lambda size: 1.0},
                    "leave-one-out scaled": {"leave_one_out": lambda size: (size - 1) / size},
                },
            ),
            Identity(
                "with an end-of-sequence token",
                r"\text{leave-one-out keeps the direction when rollouts end early}",
                _check_variable_length,
                "leave_one_out",
                {"the group mean does": "group_mean"},
            ),
            Identity(
                "the z-score's direction",
                r"\text{kept if } A \text{ has two values and } (G \le 3 \text{ or one step}), "
                r"\text{ or is symmetric on three and one step; turned in the other instances}",
                _check_direction,
                lambda values, size, steps, symmetric: (
                    _two_values_keep(values, size, steps) or (symmetric and steps == 1)
                ),
                {
                    "always kept": lambda values, size, steps, symmetric: True,
                    "never kept": lambda values, size, steps, symmetric: False,
                    "kept for two values": lambda values, size, steps, symmetric: values == 2,
                    "kept on one step": lambda values, size, steps, symmetric: steps == 1,
                    "kept for two values alone": lambda values, size, steps, symmetric: _two_values_keep(
                        values, size, steps
                    ),
                },
                "rigorous",
            ),
            Identity(
                "two rollouts are compared by rank",
                r"G = 2:\ E\big[\tfrac{A_1 - \bar A}{\sigma}\mid A_1 = a\big] = "
                r"\tfrac{1}{\sqrt2}(P(A < a) - P(A > a))",
                _check_ranks,
                _rank,
                {"the sign flipped": lambda p, w: -_rank(p, w), "the weight itself": lambda p, w: w},
            ),
        ),
    )


def _independent() -> Theorem:
    return Theorem(
        number="T7f",
        name="averaging rollouts",
        meaning=(
            "The mean of $G$ independent rollouts has $1/G$ of the variance of one. A smaller variance can therefore"
            " be counted in rollouts."
        ),
        statement=r"\mathrm{Var}\big(\tfrac1G\textstyle\sum_i \hat g_i\big) = \tfrac1G\,\mathrm{Var}(\hat g)",
        hypotheses=("the $G$ rollouts are independent and from one distribution, and no baseline couples them",),
        source="textbook",
        advice="Compare estimators at equal cost: a variance $G$ times smaller is worth $G$ times the rollouts.",
        derivation=(
            Step(
                r"E|\tfrac1G\textstyle\sum_i X_i|^2 = \tfrac{1}{G^2}\sum_{i,j} E[X_i X_j] = \tfrac1G\,E|X|^2",
                "let $X_i$ be a rollout's gradient less its mean. The cross terms vanish because the rollouts are"
                " independent, and $G$ equal squares remain. Sympy sums over all groups of 2 and 3 rollouts",
                _variance_of_a_mean,
            ),
        ),
        identities=(
            Identity(
                "every group in fractions",
                r"\mathrm{Var}(\tfrac1G\textstyle\sum_i \hat g_i) = \mathrm{Var}(\hat g)/G",
                _check_mean_of_group,
                lambda size: Fraction(1, size),
                {
                    "1/G²": lambda size: Fraction(1, size**2),
                    "1/(G-1)": lambda size: Fraction(1, size - 1),
                    "no gain": lambda size: Fraction(1),
                },
                "exact",
            ),
        ),
    )


def _groups(p: Sequence[Any], size: int) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Every group of tokens with its probability."""
    for group in itertools.product(range(len(p)), repeat=size):
        yield group, math.prod((p[a] for a in group[1:]), start=p[group[0]])


def _group_gradient(p: Sequence[Any], w: Sequence[Any], size: int, baseline: GroupBaseline) -> list[Any]:
    r"""$-E[\frac1G\sum_i (A_i - b_i) s_i]$ over all groups."""
    total = [p[0] * 0] * len(p)
    for group, chance in _groups(p, size):
        own = [w[a] for a in group]
        for i, a in enumerate(group):
            advantage = own[i] - baseline(own, i)
            total = [t - chance * advantage * s / size for t, s in zip(total, score(p, a), strict=True)]
    return total


def _others(own: Sequence[Any], i: int) -> Any:
    return (sum(own) - own[i]) / (len(own) - 1)


def _everyone(own: Sequence[Any], i: int) -> Any:
    return sum(own) / len(own)


def _check_scale(baseline: GroupBaseline, scale: Callable[[int], Fraction]) -> Cases:
    """The expected gradient under a group baseline as a multiple of the exact one, in fractions."""
    for size in SIZES:
        for p, q in rational_distributions()[:4]:
            w = weights("chi2", p, q)
            expected = [scale(size) * g for g in mean_gradient(p, w)]
            yield same(_group_gradient(p, w, size, baseline), expected, f"G {size}", p, q)


def _check_library(scale: dict[Baseline, Callable[[int], float]]) -> Cases:
    """The library's group baselines on every batch: two steps of fixed length."""
    for name in SMOOTH:
        exact = exact_gradient(*_short_pair(None), name)
        for baseline, factor in scale.items():
            for size in (2, 3):
                mean = sampled_gradient("opd_plus", name, _short_pair(None), batch_size=size, baseline=baseline)
                yield close(mean, [factor(size) * level for level in exact], name, baseline, f"G {size}")


@functools.cache
def _short_pair(eos: int | None) -> Pair:
    return random_pair(2, 2, eos=eos, scale=1.0, distance=1.0, seed=5)


def _check_variable_length(baseline: Baseline) -> Cases:
    """With an end-of-sequence token the number of rollouts still running is random: the mean up to one factor."""
    for name in SMOOTH:
        exact = exact_gradient(*_short_pair(0), name)
        mean = sampled_gradient("opd_plus", name, _short_pair(0), batch_size=2, baseline=baseline)
        factor = float((mean[0] * exact[0]).sum() / exact[0].square().sum())
        yield close(mean, [factor * level for level in exact], name)


# Division by the standard deviation.


@functools.cache
def _z_scored(p: Distribution, w: Distribution, size: int) -> list[Any]:
    """The expected z-scored gradient as intervals; a group without spread counts zero."""
    total = [interval(0)] * len(p)
    for group, chance in _groups(p, size):
        own = [w[a] for a in group]
        mean = sum(own) / Fraction(size)
        spread = sum(((x - mean) ** 2 for x in own), start=Fraction(0))  # up to a factor, which turns no direction
        if spread == 0:
            continue
        for i, a in enumerate(group):
            advantage = interval(chance * (own[i] - mean) / size) / iv.sqrt(interval(spread))
            total = [t - advantage * s for t, s in zip(total, score(intervals(p), a), strict=True)]
    return total


def _may_be_parallel(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two interval vectors may point the same way; False is certain."""
    flat = all(0 in left[i] * right[j] - left[j] * right[i] for i, j in itertools.combinations(range(len(left)), 2))
    return flat and bool(dot(left, right).b > 0)


def _two_values_keep(values: int, size: int, steps: int) -> bool:
    return values == 2 and (size <= 3 or steps == 1)


def _check_direction(keeps: Callable[[int, int, int, bool], bool]) -> Cases:
    r"""Does the z-score keep the direction? Predicted from the values, the numbers of rollouts and of steps, symmetry.

    The two steps are two rows that are reached with certainty, whose gradients must be scaled alike. Intervals certify
    that vectors are not parallel; those that may be parallel agree to 40 digits.
    """
    uneven = distribution(1, 2, 3), distribution(3, 1, 1)
    even = distribution(1, 1, 1), distribution(2, 1, 2)
    instances = [(2, (1, -1, -1), uneven), (2, (0, 0, 5), uneven), (3, (3, 1, -1), uneven), (3, (9, 1, 0), uneven)]
    for values, w, rows in (*instances, (3, (-1, 0, 1), even), (3, (-1, 0, 1), uneven)):
        advantage = tuple(map(Fraction, w))
        for size in SIZES:
            found = [_z_scored(p, advantage, size) for p in rows]
            exact = [[interval(g) for g in mean_gradient(p, advantage)] for p in rows]
            for steps in (1, 2):
                kept = _may_be_parallel(*(list(itertools.chain(*each[:steps])) for each in (found, exact)))
                claimed = keeps(values, size, steps, rows is even)
                yield holds(kept == claimed, f"A {w}", f"p {rows[0]}", f"G {size}", f"{steps} steps")


def _check_ranks(weight: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """The library's z-score of two rollouts, run on every pair of them, one step."""
    for seed in (1, 2):
        log_p, log_q = log_rows(*_one_row(seed))
        p = log_p.exp()
        for name in SMOOTH:
            advantage = weight(p, divergences.divergence(name).weight(log_q - log_p))
            found = sampled_gradient("opd_plus", name, _one_row(seed), batch_size=2, zscore=True, eps=1e-300)
            yield close(found, [row_gradient(p, advantage)], f"seed {seed}", name)


@functools.cache
def _one_row(seed: int) -> Pair:
    return random_pair(4, 1, scale=1.0, distance=1.0, seed=seed)


def _rank(p: Tensor, w: Tensor) -> Tensor:
    return (p * (w.T - w).sign()).sum(-1) / math.sqrt(2.0)


# T7f: independent rollouts.


def _check_mean_of_group(share: Callable[[int], Fraction]) -> Cases:
    """The variance of a mean over every group, in fractions."""
    for name, p, q, w in weighted(count=3):
        for size in (2, 3):
            moment = Fraction(0)
            for group, chance in _groups(p, size):
                rows = [[w[a] * s for s in score(p, a)] for a in group]
                moment += chance * square([sum(column) / size for column in zip(*rows, strict=True)])
            found = moment - square(mean_gradient(p, w))
            yield same(found, share(size) * variance(p, w), name, p, q, f"G {size}")


# The derivation.


def _group_symbols() -> tuple[Any, Any, Any]:
    """Two atoms with symbolic probabilities, weights and scalar scores of mean zero."""
    p = sympy.Symbol("p", positive=True)
    w = sympy.symbols("w0:2", real=True)
    s = sympy.Symbol("s", real=True)
    return [p, 1 - p], w, [s, -p * s / (1 - p)]


def _expected_with(baseline: GroupBaseline, scale: Callable[[int], Fraction]) -> bool:
    for size in SIZES:
        p, w, s = _group_symbols()
        total = sum(
            chance * sum((w[a] - baseline([w[b] for b in group], i)) * s[a] for i, a in enumerate(group)) / size
            for group, chance in _groups(p, size)
        )
        factor = sympy.Rational(scale(size).numerator, scale(size).denominator)
        if sympy.simplify(total - factor * expectation(p, [x * y for x, y in zip(w, s, strict=True)])) != 0:
            return False
    return True


def _spread_of_two_values() -> bool:
    r"""With $k$ of $G$ at the upper of two values: $\sigma^2 = \frac{k(G-k)}{G(G-1)}(b-a)^2$."""
    k, size, a, b = sympy.symbols("k G a b")
    mean = (k * b + (size - k) * a) / size
    spread = (k * (b - mean) ** 2 + (size - k) * (a - mean) ** 2) / (size - 1)
    return sympy.simplify(spread - k * (size - k) / (size * (size - 1)) * (b - a) ** 2) == 0


def _one_spread_only_up_to_three() -> bool:
    """All mixed groups have the same k(G-k) for G = 2 and 3 only."""
    return [size for size in range(2, 9) if len({k * (size - k) for k in range(1, size)}) == 1] == [2, 3]


def _affine_on_two_values() -> bool:
    """On two values every function is an affine map."""
    a, b, at_a, at_b, x = sympy.symbols("a b A B x")
    line = at_a + (at_b - at_a) / (b - a) * (x - a)
    return sympy.simplify(line.subs(x, a) - at_a) == 0 and sympy.simplify(line.subs(x, b) - at_b) == 0


def _odd_on_symmetric_values() -> bool:
    """The expected z-score of a rollout given its advantage -1, 0 or 1, with probabilities x, 1 - 2x and x."""
    x = sympy.Symbol("x", positive=True)
    values, chances = (-1, 0, 1), (x, 1 - 2 * x, x)
    for size in (2, 3):
        expected = []
        for own in values:
            total = sympy.Integer(0)
            for rest in itertools.product(range(3), repeat=size - 1):
                group = [own, *(values[a] for a in rest)]
                mean = sympy.Rational(sum(group), size)
                spread = sum((y - mean) ** 2 for y in group)
                if spread != 0:
                    total += (
                        math.prod((chances[a] for a in rest), start=sympy.Integer(1))
                        * (own - mean)
                        / sympy.sqrt(spread)
                    )
            expected.append(sympy.simplify(total))
        if expected[1] != 0 or sympy.simplify(expected[0] + expected[2]) != 0 or expected[2] == 0:
            return False
    return True


def _variance_of_a_mean() -> bool:
    """Independent scalars of mean zero: the expected square of their mean, by the cross terms."""
    for size in (2, 3):
        p, w, _ = _group_symbols()
        x = [w[0], -p[0] * w[0] / p[1]]
        left = sum(chance * (sum(x[a] for a in group) / size) ** 2 for group, chance in _groups(p, size))
        if sympy.simplify(left - expectation(p, [y**2 for y in x]) / size) != 0:
            return False
    return True
