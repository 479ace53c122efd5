"""T16: several teachers of one student."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv

from opdtheory import divergences
from opdtheory.theorems.instances.cases import RATIONAL, at_atoms, at_kink, perspective
from opdtheory.theorems.instances.one_sample import in_logits, kl, mean_gradient, weights
from opdtheory.theorems.teachers.mixtures import descent, enclosed, groups, power_mean, weighted_sum
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, overlap, same

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T16."""
    return [_several()]


def _several() -> Theorem:
    return Theorem(
        number="T16",
        name="several teachers",
        meaning=(
            "A weighted sum of reverse KLs to several teachers is, up to a constant, the reverse KL to one teacher:"
            " their normalised geometric mixture. For the forward KL that one teacher is the arithmetic mixture. For"
            r" any divergence the weights $w_f(q_k/p)$ of the teachers add up, each times its share $\lambda_k$."
        ),
        statement=(
            r"\textstyle\sum_k \lambda_k\,\mathrm{KL}(p\|q_k) = \mathrm{KL}(p\|m) - \log\sum_a\prod_k"
            r" q_k(a)^{\lambda_k},\ m \propto \prod_k q_k^{\lambda_k};\quad \textstyle\nabla\sum_k"
            r" \lambda_k\,\mathrm{KL}(q_k\|p) = \nabla\,\mathrm{KL}(\sum_k\lambda_k q_k\|p);\quad"
            r" \textstyle\nabla\sum_k\lambda_k D_f(q_k\|p) = -E_p[\sum_k\lambda_k w_f(q_k/p)\,s]"
        ),
        hypotheses=(
            r"the shares $\lambda_k$ are positive and sum to one",
            "every teacher is positive where another is",
        ),
        source="the α-mixtures: Amari, Integration of Stochastic Models (2007); the rest derived here",
        advice=(
            "With the reverse KL the student goes to the normalised geometric mixture of its teachers, with the"
            " forward KL to the arithmetic one. Add weights, not log-ratios, for any other divergence: the minimiser"
            " is then neither mixture."
        ),
        derivation=(
            Step(
                r"\textstyle\sum_k \lambda_k\log(p/q_k) = \log(p/m) - \log Z,\quad m = \prod_k q_k^{\lambda_k}/Z",
                "the shares sum to one, so $p$ keeps the power one, and the powers of the teachers make up the"
                " mixture. The last term does not depend on the student. Sympy confirms it for two teachers",
                _geometric,
            ),
            Step(
                r"\partial_p\,\textstyle\sum_k\lambda_k\,q_k\log(q_k/p) = -\sum_k\lambda_k q_k/p = -m/p",
                "the forward KL is linear in the teacher, except for a term without the student; so in the slope only"
                r" the mixture $m = \sum_k\lambda_k q_k$ is left",
                _arithmetic,
            ),
            Step(
                r"\partial_p\,\textstyle\sum_k\lambda_k\,p f(q_k/p) = -\sum_k\lambda_k w_f(q_k/p)",
                "apply T1 to each teacher, and add. This holds for any $f$, because sympy treats it as an undefined"
                " function",
                _weights_add,
            ),
            Step(
                r"w_f = u^\alpha/\alpha + \text{const}:\quad \textstyle\sum_k \lambda_k (q_k/p)^\alpha \text{ is"
                r" constant} \iff p \propto (\sum_k\lambda_k q_k^\alpha)^{1/\alpha}",
                "the gradient in the logits vanishes exactly if the weight is the same for every token. For a power"
                " of the ratio, the power mean of the teachers solves this",
                _power_mean,
            ),
        ),
        identities=(
            Identity(
                "reverse KL: the value",
                r"\textstyle\sum_k \lambda_k\,\mathrm{KL}(p\|q_k) = \mathrm{KL}(p\|m) - \log Z",
                _check_reverse_value,
                lambda to_mixture, z: to_mixture - iv.log(z),
                {
                    "the mixture's alone": lambda to_mixture, z: to_mixture,
                    "sign flipped": lambda to_mixture, z: to_mixture + iv.log(z),
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "what each divergence's teachers become",
                r"\nabla\textstyle\sum_k\lambda_k D(q_k\|p) = \nabla D(m\|p):\ m \text{ geometric for the reverse KL, "
                r"arithmetic for the forward KL}",
                _check_mixtures,
                {"reverse_kl": 0, "forward_kl": 1},
                {
                    "arithmetic for both": {"reverse_kl": 1, "forward_kl": 1},
                    "geometric for both": {"reverse_kl": 0, "forward_kl": 0},
                    "JSD: arithmetic": {"jsd": 1},
                    "JSD: geometric": {"jsd": 0},
                    "chi2: the mean of squares": {"chi2": 2},
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "the weights add",
                r"\nabla\textstyle\sum_k\lambda_k D_f(q_k\|p) = -E_p[\sum_k\lambda_k w_f(q_k/p)\,s]",
                _check_weights_add,
                lambda name, p, shares, teachers: weighted_sum(shares, [weights(name, p, q) for q in teachers]),
                {
                    "the weight of the mean teacher": lambda name, p, shares, teachers: weights(
                        name, p, tuple(weighted_sum(shares, teachers))
                    ),
                    "shares left out": lambda name, p, shares, teachers: weighted_sum(
                        [Fraction(1)] * len(teachers), [weights(name, p, q) for q in teachers]
                    ),
                    "the first teacher's": lambda name, p, shares, teachers: weights(name, p, teachers[0]),
                },
                "exact",
            ),
            Identity(
                "the minimiser is a power mean",
                r"p \propto (\textstyle\sum_k\lambda_k q_k^\alpha)^{1/\alpha}:\ \nabla\sum_k\lambda_k D(q_k\|p) = 0",
                _check_minimisers,
                {
                    "reverse_kl": Fraction(0),
                    "forward_kl": Fraction(1),
                    "chi2": Fraction(2),
                    "neyman_chi2": Fraction(-1),
                    "hellinger": Fraction(1, 2),
                },
                {
                    "chi2: arithmetic": {"chi2": Fraction(1)},
                    "chi2: geometric": {"chi2": Fraction(0)},
                    "Neyman: arithmetic": {"neyman_chi2": Fraction(1)},
                    "Hellinger: arithmetic": {"hellinger": Fraction(1)},
                    "JSD: arithmetic": {"jsd": Fraction(1)},
                    "JSD: geometric": {"jsd": Fraction(0)},
                },
                "rigorous",
                1e-40,
            ),
        ),
    )


def _check_reverse_value(claim: Callable[[Any, Any], Any]) -> Cases:
    """The sum of the reverse KLs against that to the mixture."""
    for label, p, shares, teachers in enclosed():
        mixture, z = power_mean(shares, teachers, Fraction(0))
        total = sum((c * kl(p, q) for c, q in zip(shares, teachers, strict=True)), iv.mpf(0))
        yield overlap(total, claim(kl(p, mixture), z), label)


def _check_mixtures(powers: dict[str, int]) -> Cases:
    """The teachers' gradients, added, against that of one teacher in their place."""
    for name, power in powers.items():
        for label, p, shares, teachers in enclosed():
            mixture, _ = power_mean(shares, teachers, Fraction(power))
            added = weighted_sum(shares, [descent(name, p, q) for q in teachers])
            for k, (left, right) in enumerate(zip(added, descent(name, p, mixture), strict=True)):
                yield overlap(left, right, name, label, f"logit {k}")


def _check_weights_add(weight: Callable[..., list[Fraction]]) -> Cases:
    """The slope of each teacher's divergence by definition, added, against one weight."""
    for name in RATIONAL:
        divergence = divergences.divergence(name)
        term, in_p, _ = perspective(divergence.expr)
        slope = sympy.diff(term, in_p).doit()
        for p, shares, teachers in groups():
            if any(at_kink(divergence, p, q) for q in teachers):
                continue
            added = weighted_sum(shares, [in_logits(p, at_atoms(slope, p, q)) for q in teachers])
            yield same(added, mean_gradient(p, weight(name, p, shares, teachers)), name, p, shares)


def _check_minimisers(powers: dict[str, Fraction]) -> Cases:
    """Whether the teachers' gradients cancel at a mixture of them."""
    for name, power in powers.items():
        for label, _, shares, teachers in enclosed():
            p, _ = power_mean(shares, teachers, power)
            added = weighted_sum(shares, [descent(name, p, q) for q in teachers])
            for k, entry in enumerate(added):
                yield overlap(entry, iv.mpf(0), name, label, f"logit {k}")


# The derivation.


def _geometric() -> bool:
    p, first, second, z = sympy.symbols("p q1 q2 Z", positive=True)
    share = sympy.Symbol("lambda", positive=True)
    m = first**share * second ** (1 - share) / z
    left = share * sympy.log(p / first) + (1 - share) * sympy.log(p / second)
    return sympy.simplify(sympy.expand_log(left - sympy.log(p / m) + sympy.log(z), force=True)) == 0


def _arithmetic() -> bool:
    p, first, second, share = sympy.symbols("p q1 q2 lambda", positive=True)
    total = share * first * sympy.log(first / p) + (1 - share) * second * sympy.log(second / p)
    return sympy.simplify(sympy.diff(total, p) + (share * first + (1 - share) * second) / p) == 0


def _weights_add() -> bool:
    p, first, second, share, u = sympy.symbols("p q1 q2 lambda u", positive=True)
    f = sympy.Function("f")
    w = u * sympy.diff(f(u), u) - f(u)
    total = share * p * f(first / p) + (1 - share) * p * f(second / p)
    weights_at = share * w.subs(u, first / p) + (1 - share) * w.subs(u, second / p)
    return sympy.simplify((sympy.diff(total, p) + weights_at).doit()) == 0


def _power_mean() -> bool:
    p, first, second, share, alpha, level = sympy.symbols("p q1 q2 lambda alpha c", positive=True)
    total = share * (first / p) ** alpha + (1 - share) * (second / p) ** alpha
    powers = share * first**alpha + (1 - share) * second**alpha
    of_p = sympy.simplify(sympy.expand_power_base(total) * p**alpha - powers) == 0  # total = powers / p^alpha
    solution = (sympy.Symbol("S", positive=True) / level) ** (1 / alpha)  # the only one: p^alpha is monotone
    return of_p and sympy.simplify(solution**alpha - sympy.Symbol("S", positive=True) / level) == 0
