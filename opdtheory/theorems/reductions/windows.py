"""T17: micro-batches, windows of tokens, and denominators that come from other data."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from opdtheory.exact import exact_gradient, expected_gradient, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.batches import Atoms, Moments, batch_mean, first_order
from opdtheory.theorems.instances.cases import Pair, distribution, sampled_gradient
from opdtheory.theorems.reductions.means import mean_of_two
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

# What a step does with the rollouts of its micro-batches: numerators and lengths of each to one number.
Accumulate = Callable[[Sequence[Sequence[tuple[Fraction, int]]]], Fraction]
# The mean that an accumulation is claimed to have: from the atoms, micro-batches and rollouts in each.
Mean = Callable[[Atoms, int, int], Fraction]


def theorems() -> list[Theorem]:
    """T17."""
    return [
        Theorem(
            number="T17",
            name="micro-batches and windows",
            meaning=(
                "Averaging the token means of several micro-batches keeps the bias of a single micro-batch, however"
                " many there are. Dividing the sum over the whole window of micro-batches by the window's number of"
                " tokens leaves only the smaller bias of one large batch. A denominator from elsewhere only rescales"
                " the gradient if its inverse is uncorrelated with the summed gradient, and not otherwise."
            ),
            statement=(
                r"E\Big[\tfrac1M\sum_m \frac{\sum_{b\in m} N_b}{\sum_{b\in m} L_b}\Big] = E\Big[\frac{\sum_{b=1}^k"
                r" N_b}{\sum_{b=1}^k L_b}\Big] \text{ for } M \text{ micro-batches of } k;\quad E\Big[\frac{\sum_b"
                r" N_b}{\sum_b L_b}\Big] = \frac{\bar N}{\bar L} + O\big(\tfrac1{Mk}\big) \text{ over the whole"
                r" window};\quad E[N/D] = E[N]\,E[1/D] \iff \mathrm{Cov}(N, 1/D) = 0"
            ),
            hypotheses=(
                r"the rollouts are independent; $N_b$ is the gradient of rollout $b$ (or one entry of it) and $L_b \ge"
                r" 1$ its number of tokens, with means $\bar N$ and $\bar L$",
                "every micro-batch has the same number $k$ of rollouts",
                "the denominator $D$ is positive, and $N$ is the summed gradient that it divides",
            ),
            source="derived here",
            advice=(
                "Divide the sum of a whole window by the window's number of tokens: means of micro-batches keep the"
                " bias of a micro-batch's size however many there are. A denominator of other data only rescales if"
                " it does not depend on the rollouts."
            ),
            derivation=(
                Step(
                    r"E[\tfrac1M\textstyle\sum_m R_m] = E[R_1]",
                    "write $R_m$ for the token mean of micro-batch $m$. The mean is linear, and micro-batches of"
                    " equal size have the same distribution",
                    mean_of_two,
                ),
                Step(
                    r"\frac{n_1 + n_2}{l_1 + l_2} - \tfrac12\Big(\frac{n_1}{l_1} + \frac{n_2}{l_2}\Big) = \frac{(l_1 -"
                    r" l_2)(n_1 l_2 - n_2 l_1)}{2\,l_1 l_2 (l_1 + l_2)}",
                    "the ratio of the sums differs from the mean of the ratios by this amount, which is zero exactly"
                    " if the two lengths are equal or the two ratios are. A window is one batch of $Mk$ rollouts, to"
                    " which T11 applies",
                    _partition,
                ),
                Step(
                    r"E[N/D] - E[N]\,E[1/D] = \mathrm{Cov}(N, 1/D)",
                    "this is the definition of the covariance, and independence makes it zero. Sympy confirms both"
                    " for two values of $N$ and two of $D$",
                    _covariance,
                ),
            ),
            identities=(
                Identity(
                    "the mean of micro-batches",
                    r"E[\tfrac1M\textstyle\sum_m R_m] = E[R_1]",
                    _check_accumulated,
                    (_mean_of_means, lambda atoms, count, size: batch_mean(atoms, size, "token_mean")),
                    {
                        "the window's": (
                            _mean_of_means,
                            lambda atoms, count, size: batch_mean(atoms, count * size, "token_mean"),
                        ),
                        "the ratio of means": (
                            _mean_of_means,
                            lambda atoms, count, size: Moments.of(atoms).n / Moments.of(atoms).l,
                        ),
                        "a sum": (
                            _mean_of_means,
                            lambda atoms, count, size: count * batch_mean(atoms, size, "token_mean"),
                        ),
                    },
                    "exact",
                ),
                Identity(
                    "the window's mean",
                    r"\textstyle\sum_m N_m / \sum_m L_m \text{ whatever the partition}",
                    _check_accumulated,
                    (_of_window, lambda atoms, count, size: batch_mean(atoms, count * size, "token_mean")),
                    {
                        "a micro-batch's": (
                            _of_window,
                            lambda atoms, count, size: batch_mean(atoms, size, "token_mean"),
                        ),
                    },
                    "exact",
                ),
                Identity(
                    "of the same rollouts",
                    r"\text{another partition of the same rollouts: the same mean of the window, another mean of"
                    " means}",
                    _check_partitions,
                    {_of_window: True, _mean_of_means: False},
                    {
                        "a mean of means has no partition either": {_mean_of_means: True},
                        "a window has one": {_of_window: False},
                    },
                    "exact",
                ),
                Identity(
                    "the bias that is left",
                    r"B\,(E[R] - \bar N/\bar L) \to -\tfrac{\mathrm{Cov}(N,L)}{\bar L^2} + "
                    r"\tfrac{\bar N\,\mathrm{Var}(L)}{\bar L^3},\ B = Mk \text{ for a window, } k \text{ for a mean "
                    r"of means}",
                    _check_bias,
                    {"window": lambda count, size: count * size, "means": lambda count, size: size},
                    {
                        "means: as the window's": {"means": lambda count, size: count * size},
                        "window: as a micro-batch's": {"window": lambda count, size: size},
                    },
                    "exact",
                ),
                Identity(
                    "a denominator of other data",
                    r"E[N/D] = E[N]\,E[1/D] \iff \mathrm{Cov}(N, 1/D) = 0",
                    _check_denominators,
                    {"reference answers": True, "padded to the longest rollout": False},
                    {
                        "the longest rollout of the batch as well": {"padded to the longest rollout": True},
                        "reference answers do not": {"reference answers": False},
                    },
                    "exact",
                ),
                Identity(
                    "black boxes",
                    r"E[\nabla \tfrac1M\textstyle\sum_m \ell_m] = E[\nabla \ell_1],\ \ell_m \text{ a token mean of } k"
                    r" \text{ rollouts}",
                    _check_black_box,
                    "micro-batch",
                    {"the window's": "window", "the exact gradient": "exact"},
                ),
            ),
        )
    ]


def _mean_of_means(batches: Sequence[Sequence[tuple[Fraction, int]]]) -> Fraction:
    """The mean over micro-batches of each one's token mean."""
    means = [sum((n for n, _ in batch), Fraction(0)) / sum(k for _, k in batch) for batch in batches]
    return sum(means, Fraction(0)) / len(means)


def _of_window(batches: Sequence[Sequence[tuple[Fraction, int]]]) -> Fraction:
    """The sum over a window of micro-batches, over its number of tokens."""
    return _mean_of_means([[rollout for batch in batches for rollout in batch]])


@functools.cache
def _atoms() -> tuple[Atoms, ...]:
    F = Fraction
    return (
        Atoms((F(1), F(-2)), (1, 3), distribution(1, 2)),
        Atoms((F(2), F(1), F(-1)), (2, 3, 5), distribution(2, 1, 1)),
    )


def _expected(atoms: Atoms, count: int, size: int, accumulate: Accumulate) -> Fraction:
    """The mean over every window of so many micro-batches, enumerated."""
    rollouts = list(zip(atoms.numerators, atoms.lengths, atoms.chances, strict=True))
    total = Fraction(0)
    for window in itertools.product(rollouts, repeat=count * size):
        batches = [[(n, k) for n, k, _ in window[m * size : (m + 1) * size]] for m in range(count)]
        total += math.prod((c for _, _, c in window), start=Fraction(1)) * accumulate(batches)
    return total


def _check_accumulated(claim: tuple[Accumulate, Mean]) -> Cases:
    """What a step accumulates, enumerated window by window, against the mean of one batch."""
    accumulate, mean = claim
    for atoms in _atoms():
        for count, size in ((2, 1), (2, 2), (3, 1), (4, 1), (3, 2)):
            if len(atoms.chances) ** (count * size) <= 1000:
                found = _expected(atoms, count, size, accumulate)
                yield same(found, mean(atoms, count, size), atoms, f"{count} micro-batches of {size}")


def _check_partitions(alike: dict[Accumulate, bool]) -> Cases:
    """Four rollouts in two micro-batches, in each of the three ways."""
    F = Fraction
    rollouts = [(F(1), 1), (F(-2), 3), (F(5), 2), (F(1, 3), 7)]
    for accumulate, expected in alike.items():
        values = {
            accumulate([[rollouts[0], rollouts[j]], [r for i, r in enumerate(rollouts) if i not in (0, j)]])
            for j in (1, 2, 3)
        }
        yield holds((len(values) == 1) == expected, accumulate.__name__)


def _check_bias(sizes: dict[str, Callable[[int, int], int]]) -> Cases:
    """The bias times the claimed number of rollouts approaches its coefficient, halving what is left with the size."""
    for atoms in _atoms():
        m = Moments.of(atoms)
        for kind, claimed in sizes.items():
            left, steps = [], ((2, 16), (2, 32))
            for count, size in steps:
                # By the identities above, the mean of means has the law of one micro-batch.
                found = batch_mean(atoms, count * size if kind == "window" else size, "token_mean")
                left.append((found - m.n / m.l) * claimed(count, size) - first_order(m))
            yield holds(left[1] != 0 and abs(left[0] / left[1] / 2 - 1) < Fraction(1, 8), atoms, kind)


def _check_denominators(rescales: dict[str, bool]) -> Cases:
    """Two rollouts and a denominator, all enumerated: whether the mean is that of the sum, rescaled."""
    for atoms in _atoms():
        rollouts = list(zip(atoms.numerators, atoms.lengths, atoms.chances, strict=True))
        others = [(3, Fraction(1, 4)), (10, Fraction(3, 4))]
        for kind, expected in rescales.items():
            found, inverse, total = Fraction(0), Fraction(0), Fraction(0)
            for (n, k, c), (n2, k2, c2), (other, c3) in itertools.product(rollouts, rollouts, others):
                chance = c * c2 * c3
                size = other if kind == "reference answers" else 2 * max(k, k2)
                found += chance * (n + n2) / size
                inverse += chance / size
                total += chance * (n + n2)
            yield holds((found == total * inverse) == expected, atoms, kind)


# As black boxes, on policies whose rollouts end early.


@functools.cache
def _pairs() -> tuple[Pair, ...]:
    return (random_pair(2, 2, eos=0, distance=1.0, seed=5), random_pair(2, 2, eos=1, scale=0.5, seed=6))


@functools.cache
def _accumulated(name: str, pair: Pair) -> list[Tensor]:
    """The expected gradient of two micro-batches of two rollouts, as a black box on batches of four."""

    def loss(r: Rollouts) -> Tensor:
        values = {"k2": r.log_u.square() / 2, "reward": -r.log_u.detach() * r.student_logprobs}[name] * r.mask
        halves = zip(values.split(2), r.mask.split(2), strict=True)
        return torch.stack([each.sum() / mask.sum() for each, mask in halves]).mean()

    return expected_gradient(loss, *pair, batch_size=4)


def _check_black_box(kind: str) -> Cases:
    """Against the library's own token mean of one micro-batch."""
    for pair in _pairs():
        if kind == "exact":
            claimed = exact_gradient(*pair, "reverse_kl")
        else:
            size = {"micro-batch": 2, "window": 4}[kind]
            claimed = sampled_gradient("k2_loss", None, pair, batch_size=size, reduction="token_mean")
        for name in ("k2", "reward"):
            yield close(_accumulated(name, pair), claimed, name, pair)


# The derivation.


def _partition() -> bool:
    n1, n2 = sympy.symbols("n1 n2", real=True)
    l1, l2 = sympy.symbols("l1 l2", positive=True)
    gap = (n1 + n2) / (l1 + l2) - (n1 / l1 + n2 / l2) / 2
    return sympy.simplify(gap - (l1 - l2) * (n1 * l2 - n2 * l1) / (2 * l1 * l2 * (l1 + l2))) == 0


def _covariance() -> bool:
    """A joint law of two values each; independence factorises it."""
    n, d = sympy.symbols("n0:2"), sympy.symbols("d0:2", positive=True)
    joint = sympy.Matrix(2, 2, sympy.symbols("j0:4"))
    of_n = [joint[i, 0] + joint[i, 1] for i in range(2)]
    of_d = [joint[0, i] + joint[1, i] for i in range(2)]

    def apart(law: sympy.Matrix) -> sympy.Expr:
        return sum((law[i, j] - of_n[i] * of_d[j]) * n[i] / d[j] for i in range(2) for j in range(2))

    total = sum(joint[i, j] * n[i] / d[j] for i in range(2) for j in range(2))
    product = sum(of_n[i] * n[i] for i in range(2)) * sum(of_d[j] / d[j] for j in range(2))
    independent = sympy.Matrix(2, 2, lambda i, j: of_n[i] * of_d[j])
    return sympy.simplify(total - product - apart(joint)) == 0 and sympy.simplify(apart(independent)) == 0
