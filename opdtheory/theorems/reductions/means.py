"""T11: what dividing by the number of tokens does to a gradient."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, expected_gradient, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.batches import Atoms, Moments, Reduction, batch_mean, first_order, second_order
from opdtheory.theorems.instances.cases import Pair, autograd_gradient, distribution, sampled_gradient
from opdtheory.theorems.instances.lengths import inverse_length, score_of_length
from opdtheory.theorems.instances.one_sample import SMOOTH
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["mean_of_two", "theorems"]


def theorems() -> list[Theorem]:
    """T11 and T11b."""
    return [_means(), _per_sequence()]


def _means() -> Theorem:
    return Theorem(
        number="T11",
        name="sum over tokens and mean over tokens",
        meaning=(
            "A batch's summed gradient divided by the number of rollouts has the right mean. Divided by the number of"
            " tokens, which is random, it tends to the mean gradient over the mean length, with a bias of order $1/B$"
            " in the number $B$ of rollouts. The leading terms of the bias come from the covariance of gradient and"
            " length and from the variance of the length."
        ),
        statement=(
            r"E\Big[\tfrac1B\sum_b N_b\Big] = \bar N;\quad E\Big[\frac{\sum_b N_b}{\sum_b L_b}\Big] = \frac{\bar"
            r" N}{\bar L} + \frac1B\Big[-\frac{\mathrm{Cov}(N, L)}{\bar L^2} + \frac{\bar N\,\mathrm{Var}(L)}{\bar"
            r" L^3}\Big] + O(B^{-2})"
        ),
        hypotheses=(
            r"the $B$ rollouts are independent; $N_b$ is the gradient of rollout $b$ (or one entry of it) and $L_b \ge"
            r" 1$ its number of tokens, with means $\bar N$ and $\bar L$",
            "lengths are bounded",
        ),
        source="ratio estimators: Cochran, Sampling Techniques; the rest derived here",
        advice=(
            "Sum over tokens and divide by a number that does not depend on the rollouts, such as $B$ times the"
            " length cap; with a mean over tokens, centre the weight and take a large batch."
        ),
        derivation=(
            Step(
                r"E[\tfrac1B\textstyle\sum_b N_b] = \bar N",
                "the mean is linear, so each rollout contributes its own mean. Sympy confirms it for two rollouts of"
                " two possible values",
                mean_of_two,
            ),
            Step(
                r"\frac{\bar N + \varepsilon n}{\bar L + \varepsilon l} = \frac{\bar N}{\bar L} + "
                r"\varepsilon\Big(\frac{n}{\bar L} - \frac{\bar N l}{\bar L^2}\Big) + "
                r"\varepsilon^2\Big(-\frac{n l}{\bar L^2} + \frac{\bar N l^2}{\bar L^3}\Big) + \dots",
                r"write $\varepsilon n$ and $\varepsilon l$ for the deviations of the batch's two means from $\bar N$"
                r" and $\bar L$, and expand the ratio of the two means in a Taylor series. Sympy confirms it to the"
                " fourth order",
                _step_series,
            ),
            Step(
                r"E[n l] = \mathrm{Cov}(N, L)/B,\quad E[l^2] = \mathrm{Var}(L)/B,\quad E[n l^2], E[l^3] = O(B^{-2})",
                "the deviations have mean zero and the rollouts are independent, so of the products only those in"
                " which no rollout stands alone have a mean other than zero. Inserted in the series, these means give"
                " the terms in $1/B$. Lengths are bounded, so the remainder of the series is of the order of its"
                " first term",
                _step_moments,
                in_words=True,
            ),
            Step(
                r"E[c\,S/L] = c\,\nabla E[1/L]",
                "a constant weight $c$ is no baseline under a mean over tokens. The sum $S$ of the scores is the"
                " gradient of the log-probability of the whole batch, so $E[S/L]$, with $L$ for the batch's number of"
                " tokens, is a gradient too: that of $E[1/L]$",
                score_of_length,
            ),
        ),
        identities=(
            Identity(
                "sum over tokens",
                r"E[\tfrac1B\textstyle\sum_b N_b] = \bar N",
                _check_sum,
                "token_sum",
                {"mean over tokens": "token_mean", "mean over each rollout": "sequence_mean"},
                "exact",
            ),
            Identity(
                "covariance with the length",
                r"E[R] = (\bar N - \mathrm{Cov}(R, \bar L_B))/\bar L,\quad R = \textstyle\sum_b N_b/\sum_b L_b,\ \bar"
                r" L_B = \tfrac1B\sum_b L_b",
                _check_covariance,
                -1,
                {"sign flipped": 1, "dropped": 0},
                "exact",
            ),
            Identity(
                "order 1/B",
                r"\text{what the expansion leaves falls fourfold when } B \text{ doubles}",
                _check_rate,
                (first_order,),
                {
                    "variance dropped": (lambda m: -m.nl / m.l**2,),
                    "covariance dropped": (lambda m: m.n * m.ll / m.l**3,),
                    "signs flipped": (lambda m: -first_order(m),),
                    "half of it": (lambda m: first_order(m) / 2,),
                },
                "exact",
            ),
            Identity(
                "order 1/B squared",
                r"\text{with the term in } 1/B^2 \text{ too, what is left falls eightfold}",
                _check_rate,
                (first_order, second_order),
                {
                    "third moments dropped": (
                        first_order,
                        lambda m: -3 * m.nl * m.ll / m.l**4 + 3 * m.n * m.ll**2 / m.l**5,
                    ),
                    "no next term": (first_order, lambda m: Fraction(0)),
                },
                "exact",
            ),
            Identity(
                "no bias",
                r"E[R] = \bar N/\bar L \text{ if } L \text{ is constant or } N/L \text{ is}",
                _check_unbiased_cases,
                True,
                {"neither": False},
                "exact",
            ),
            Identity(
                "losses as black boxes",
                r"E[\hat g] = \nabla J \text{ for batches of two rollouts of variable length}",
                _check_reduced_gradient,
                ("token_sum", False),
                {
                    "mean over tokens, up to scale": ("token_mean", True),
                    "mean over each rollout, up to scale": ("sequence_mean", True),
                },
            ),
            Identity(
                "a constant advantage is no baseline",
                r"E\Big[-c\,\frac{\sum_b S_b}{\sum_b L_b}\Big] = -c\,\nabla E\Big[\frac{1}{\sum_b L_b}\Big]",
                _check_constant_advantage,
                ("token_mean", -1.0),
                {"sign flipped": ("token_mean", 1.0), "nothing, as a baseline": ("token_mean", 0.0)},
            ),
            Identity(
                "centred weights at the teacher",
                r"p = q,\ A = w_f(u) - w_f(1): \quad E[\hat g] = 0 \text{ under every reduction}",
                _check_at_teacher,
                "opd_plus_centred",
                {"not centred": "opd_plus"},
            ),
        ),
    )


def _per_sequence() -> Theorem:
    return Theorem(
        number="T11b",
        name="mean over each rollout",
        meaning=(
            "If each rollout's gradient is divided by its own length, a rollout counts $1/L$ whatever the batch size:"
            " short rollouts count more. With the weight $w_f(U)$ of whole sequences the result is still an exact"
            " gradient, but that of another objective, in which each sequence's term of the divergence is divided by"
            " its length."
        ),
        statement=(
            r"E\Big[\tfrac1B\sum_b N_b/L_b\Big] = \sum_\ell \tfrac1\ell P(L = \ell)\,E[N \mid L = \ell];\quad"
            r" E\Big[\frac{-w_f(U)\,S}{L}\Big] = \nabla\sum_y \frac{p(y)}{L(y)}f(U(y))"
        ),
        hypotheses=(
            "rollouts are independent and have at least one token; $N$ is a rollout's gradient and $L$ its length",
            "lengths vary; otherwise the division is only a scale",
            "$U$ is the ratio of a whole sequence's probabilities, and $S$ the sum of its scores",
        ),
        source="derived here",
        advice=(
            "Do not divide by each rollout's length unless short rollouts should count more; if you do, centre the"
            " weight, or the teacher is not a fixed point."
        ),
        derivation=(
            Step(
                r"\partial_p\,[p f(q/p)/L] = -w_f(u)/L",
                "the length $L(y)$ is a number attached to the sequence $y$ and does not depend on the student's"
                " parameters, so T1 applies to the term of each $y$. This holds for any $f$, because sympy treats it"
                " as an undefined function",
                _step_per_atom,
            ),
            Step(
                r"E[c\,S/L] = c\,\nabla E[1/L]",
                "the sum $S$ of the scores is the gradient of the sequence's log-probability, so a constant weight"
                r" $c$ has an expected gradient. Neither a constant nor a gauge $c\,(U - 1)$ is free here: the gauge"
                r" changes the objective by $c\,(E_Q[1/L] - E_P[1/L])$, where $P$ and $Q$ are the distributions of"
                " whole sequences under student and teacher",
                score_of_length,
            ),
        ),
        identities=(
            Identity(
                "weights 1/L",
                r"E[\tfrac1B\textstyle\sum_b N_b/L_b] = E[N/L] \text{ at every } B",
                _check_sequence_mean,
                1,
                {"no weights (sum over tokens)": 0, "1/L squared": 2},
                "exact",
            ),
            Identity(
                "objective of the sequence weight",
                r"E[-w_f(U)\,S/L] = \nabla\textstyle\sum_y p(y) f(U(y))/L(y)",
                _check_weighted_sequence,
                1,
                {"the divergence itself": 0, "1/L squared": 2},
            ),
            Identity(
                "a constant advantage is no baseline",
                r"E[-c\,S/L] = -c\,\nabla E[1/L]",
                _check_constant_advantage,
                ("sequence_mean", -1.0),
                {"sign flipped": ("sequence_mean", 1.0), "nothing, as a baseline": ("sequence_mean", 0.0)},
            ),
        ),
    )


def _atoms() -> tuple[Atoms, ...]:
    F = Fraction
    return (
        Atoms((F(1), F(-2)), (1, 3), distribution(1, 2)),
        Atoms((F(2), F(1), F(-1)), (2, 3, 5), distribution(2, 1, 1)),
        Atoms((F(0), F(3), F(5)), (2, 3, 2), distribution(1, 2, 2)),
    )


# Exact enumerations of batches.


def _check_sum(reduction: Reduction) -> Cases:
    r"""$E[\mathrm{reduced}] = \bar N$ at every batch size."""
    for atoms in _atoms():
        for size in (1, 2, 3, 5):
            yield same(batch_mean(atoms, size, reduction), Moments.of(atoms).n, atoms, f"B {size}")


def _check_covariance(sign: int) -> Cases:
    r"""$E[R] = \bar N/\bar L - \mathrm{Cov}(R, L_B)/\bar L$ with $L_B$ the batch's mean length: no expansion."""
    for atoms in _atoms():
        m = Moments.of(atoms)
        for size in (1, 2, 4, 8):
            mean = batch_mean(atoms, size, "token_mean")
            covariance = batch_mean(atoms, size, "token_mean", with_length=True) - mean * m.l
            yield same(mean, m.n / m.l + sign * covariance / m.l, atoms, f"B {size}")


def _check_rate(claim: tuple[Callable[[Moments], Fraction], ...]) -> Cases:
    """Doubling the batch divides what the expansion leaves by `2^(terms + 1)`, on exact means."""
    for atoms in _atoms():
        m, left = Moments.of(atoms), []
        for size in (16, 32, 64):
            error = batch_mean(atoms, size, "token_mean") - m.n / m.l
            left.append(error - sum((term(m) / size**k for k, term in enumerate(claim, 1)), Fraction(0)))
        faster = 2 ** (len(claim) + 1)
        yield holds(0 not in left, atoms, "something is left")
        # The next order of the expansion moves the ratio from its limit by a multiple of 1/B, which halves in turn.
        gaps = [before / after / faster - 1 for before, after in itertools.pairwise(left) if after]
        yield holds(all(abs(gap) < Fraction(1, 8) for gap in gaps), atoms, "rate")
        halves = len(gaps) == 2 and Fraction(2, 5) * gaps[0] ** 2 < gaps[1] * gaps[0] < Fraction(3, 5) * gaps[0] ** 2
        yield holds(halves, atoms, "how the rate is approached")


def _check_unbiased_cases(constant: bool) -> Cases:
    r"""No bias at any batch size if all lengths are equal, or if every numerator is the same multiple of its length."""
    F, chances = Fraction, distribution(3, 2, 1)
    equal = Atoms((F(1), F(-2), F(7)), (3, 3, 3) if constant else (3, 3, 4), chances)
    proportional = Atoms(tuple(F(5, 2) * k for k in (1, 2, 5)), (1, 2, 5) if constant else (1, 3, 5), chances)
    for atoms in (equal, proportional):
        m = Moments.of(atoms)
        for size in (1, 2, 5):
            yield same(batch_mean(atoms, size, "token_mean"), m.n / m.l, atoms, f"B {size}")


def _check_sequence_mean(power: int) -> Cases:
    r"""$E[\mathrm{reduced}] = \sum_\ell \ell^{-1} P(L=\ell) E[N | L=\ell]$ at every batch size."""
    for atoms in _atoms():
        for size in (1, 2, 4):
            weighted = atoms.mean(lambda n, k: n / Fraction(k) ** power)
            yield same(batch_mean(atoms, size, "sequence_mean"), weighted, atoms, f"B {size}")


# Policies: the gradients themselves.


@functools.cache
def _pairs() -> tuple[Pair, ...]:
    return (random_pair(2, 3, eos=0, scale=0.5, distance=1.0, seed=5), random_pair(3, 2, eos=1, distance=1.0, seed=6))


def _check_reduced_gradient(claim: tuple[Reduction, bool]) -> Cases:
    """The library's loss on batches of two, as a black box; `up_to_scale` divides by the best factor."""
    reduction, up_to_scale = claim
    for divergence in ("reverse_kl", "forward_kl", "jsd"):
        for pair in _pairs():
            found = sampled_gradient("opd_plus", divergence, pair, batch_size=2, reduction=reduction)
            truth = exact_gradient(*pair, divergence)
            if up_to_scale:
                a, b = (torch.cat([g.flatten() for g in each]) for each in (found, truth))
                found = [g * float(a @ b / (a @ a)) for g in found]
            yield close(found, truth, divergence, pair)


def _check_constant_advantage(claim: tuple[Reduction, float]) -> Cases:
    r"""A constant advantage `c` descends $-c\,E[1/L]$: with `token_mean` of the batch, with `sequence_mean` of each."""
    reduction, factor = claim

    def loss(r: Rollouts) -> Tensor:
        values = -0.7 * r.student_logprobs
        return r.token_mean(values) if reduction == "token_mean" else r.sequence_mean(values)

    def value(student: TabularPolicy, teacher: TabularPolicy, count: int) -> Tensor:
        return factor * 0.7 * inverse_length(student, teacher, count)

    for pair in _pairs():
        for size in (1, 2, 3):
            slope = autograd_gradient(pair, value, pair[1], size if reduction == "token_mean" else 1)
            yield close(expected_gradient(loss, *pair, batch_size=size), slope, pair, f"B {size}")


def _check_weighted_sequence(power: int) -> Cases:
    r"""`sequence_mean` of the whole sequence's weight descends $\sum_y L(y)^{-1} p(y) f(q(y)/p(y))$."""

    def value(student: TabularPolicy, teacher: TabularPolicy, d: Divergence) -> Tensor:
        r = Enumeration.build(student, teacher).rollouts()
        chance = (r.mask * r.student_logprobs).sum(-1).exp()
        return (chance * d.generator((r.mask * r.log_u).sum(-1)) / r.mask.sum(-1) ** power).sum()

    for divergence in map(divergences.divergence, ("reverse_kl", "forward_kl", "chi2")):
        for pair in _pairs():
            found = sampled_gradient("sequence_opd_plus", divergence, pair, reduction="sequence_mean")
            yield close(found, autograd_gradient(pair, value, pair[1], divergence), divergence, pair)


def _check_at_teacher(name: str) -> Cases:
    """At the teacher a mean over tokens leaves the centred weight without gradient, for every generator."""
    for divergence in SMOOTH:
        for reduction in ("token_mean", "sequence_mean"):
            for student, _ in _pairs():
                found = sampled_gradient(name, divergence, (student, student), batch_size=2, reduction=reduction)
                yield close(found, [torch.zeros_like(g) for g in found], divergence, reduction, student)


# The derivation.


def mean_of_two() -> bool:
    """Means of sums: two rollouts of an undefined two-point distribution."""
    c, a, b = sympy.symbols("c a b")
    mean = c * a + (1 - c) * b
    pair = sum(x * y * (n + m) / 2 for x, n in ((c, a), (1 - c, b)) for y, m in ((c, a), (1 - c, b)))
    return sympy.expand(pair - mean) == 0


def _step_series() -> bool:
    """The Taylor series of the ratio, with deviations of order ε."""
    eps, n, k = sympy.symbols("epsilon n l", real=True)
    big_n, big_l = sympy.symbols("N L", positive=True)
    series = sympy.series((big_n + eps * n) / (big_l + eps * k), eps, 0, 5).removeO()
    claimed = (
        big_n / big_l
        + eps * (n / big_l - big_n * k / big_l**2)
        + eps**2 * (-n * k / big_l**2 + big_n * k**2 / big_l**3)
        + eps**3 * (n * k**2 / big_l**3 - big_n * k**3 / big_l**4)
        + eps**4 * (-n * k**3 / big_l**4 + big_n * k**4 / big_l**5)
    )
    return sympy.simplify(series - claimed) == 0


def _step_moments() -> bool:
    r"""Moments of a mean over `B` centred rollouts: a product counts only if no rollout stands alone in it."""
    size = sympy.Symbol("B", positive=True)
    n, k = sympy.symbols("n l")
    moment = {key: sympy.Symbol(f"mu_{key[0]}{key[1]}") for key in ((1, 1), (0, 2), (1, 2), (0, 3), (1, 3), (0, 4))}

    def of_mean(i: int, j: int) -> sympy.Expr:
        factors = [n] * i + [k] * j
        total = sympy.S.Zero
        for blocks in sympy.utilities.iterables.multiset_partitions(list(range(i + j))):
            if any(len(block) == 1 for block in blocks):
                continue
            keys = [(sum(factors[x] == n for x in block), sum(factors[x] == k for x in block)) for block in blocks]
            total += sympy.ff(size, len(blocks)) * sympy.Mul(*(moment[key] for key in keys))
        return total / size ** (i + j)

    m, v = moment, {"N": sympy.Symbol("N"), "L": sympy.Symbol("L", positive=True)}
    mean = (
        -of_mean(1, 1) / v["L"] ** 2
        + v["N"] * of_mean(0, 2) / v["L"] ** 3
        + of_mean(1, 2) / v["L"] ** 3
        - v["N"] * of_mean(0, 3) / v["L"] ** 4
        - of_mean(1, 3) / v["L"] ** 4
        + v["N"] * of_mean(0, 4) / v["L"] ** 5
    )
    held = Moments(v["N"], v["L"], m[1, 1], m[0, 2], m[1, 2], m[0, 3])
    in_inverse = sympy.expand(mean.expand(func=True).subs(size, 1 / sympy.Symbol("h", positive=True)))
    h = sympy.Symbol("h", positive=True)
    return all(
        sympy.simplify(sympy.expand(in_inverse).coeff(h, order) - claimed(held)) == 0
        for order, claimed in ((1, first_order), (2, second_order))
    )


def _step_per_atom() -> bool:
    p, q, u, k = sympy.symbols("p q u l", positive=True)
    f = sympy.Function("f")
    w = u * sympy.diff(f(u), u) - f(u)
    return sympy.simplify(sympy.diff(p * f(q / p) / k, p).doit() + (w.subs(u, q / p) / k).doit()) == 0
