"""T16b: a teacher beside a base policy, followed beyond itself or not as far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv

from opdtheory.theorems.instances.one_sample import expectation, kl, mean_gradient
from opdtheory.theorems.teachers.mixtures import beside, descent, raised
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, overlap

__all__ = ["theorems"]

_POWERS = (Fraction(1, 2), Fraction(5, 4), Fraction(2))


def theorems() -> list[Theorem]:
    """T16b."""
    return [_extrapolated()]


def _extrapolated() -> Theorem:
    return Theorem(
        number="T16b",
        name="an extrapolated teacher",
        meaning=(
            "A reward for what the teacher $q$ prefers to a base policy $b$, less a penalty for leaving the base, is,"
            r" up to a constant, minus the reverse KL to a third distribution $m$. With $\lambda > 1$ that target is"
            r" an extrapolation beyond the teacher, with $0 < \lambda < 1$ it lies between base and teacher."
        ),
        statement=(
            r"E_p[\lambda\log(q/b) - \log(p/b)] = -\mathrm{KL}(p\|m) + \log\textstyle\sum_a q_a^\lambda"
            r" b_a^{1-\lambda},\ m \propto q^\lambda b^{1-\lambda}"
        ),
        hypotheses=(
            "teacher $q$ and base $b$ are positive on every token",
            r"the base is frozen; $\lambda$ is any number, above one to go beyond the teacher",
        ),
        source="derived here",
        advice=(
            r"A reward $\lambda\log(q/b)$ less a penalty $\log(p/b)$ is the reverse KL to $q^\lambda b^{1-\lambda}$:"
            r" the student goes past the teacher for $\lambda > 1$ and stays short of it for $\lambda < 1$; the"
            r" teacher itself is a fixed point only where $\lambda = 1$ or it equals the base."
        ),
        derivation=(
            Step(
                r"\lambda\log(q/b) - \log(p/b) = -\log(p/m) + \log Z",
                r"collect the powers of the base in $m = q^\lambda b^{1-\lambda}/Z$. The normaliser $Z$ does not"
                " depend on the student",
                _base_and_teacher,
            ),
            Step(
                r"p = q:\quad \lambda\log(q/b) - \log(q/b) = (\lambda - 1)\log(q/b)",
                r"at the teacher the weight is the same for every token only if $\lambda = 1$ or the base is the"
                " teacher; otherwise the teacher is no fixed point",
                _at_the_teacher,
            ),
        ),
        identities=(
            Identity(
                "the value",
                r"E_p[\lambda\log(q/b) - \log(p/b)] = -\mathrm{KL}(p\|m) + \log Z",
                _check_extrapolated_value,
                lambda shift: shift,
                {"the mixture's alone": lambda shift: 0 * shift, "sign flipped": lambda shift: -shift},
                "rigorous",
                1e-40,
            ),
            Identity(
                "the gradient",
                r"-E_p[(\lambda\log(q/b) - \log(p/b))\,s] = \nabla\,\mathrm{KL}(p\|m)",
                _check_extrapolated,
                lambda power: (power, 1 - power),
                {
                    "without the base": lambda power: (power, Fraction(0)),
                    "the teacher": lambda power: (Fraction(1), Fraction(0)),
                    "the base's power as the teacher's": lambda power: (power, power),
                    "the base's sign flipped": lambda power: (power, power - 1),
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "drift at the teacher",
                r"p = q:\ (1 - \lambda)\,E_q[\log(q/b)\,s]",
                _check_drift,
                lambda power: 1 - power,
                {"none": lambda power: Fraction(0), "sign flipped": lambda power: power - 1},
                "rigorous",
                1e-40,
            ),
        ),
    )


def _reward(p: Sequence[Any], q: Sequence[Any], base: Sequence[Any], power: Fraction) -> list[Any]:
    r"""$\lambda\log(q/b) - \log(p/b)$."""
    factor = iv.mpf(power.numerator) / power.denominator
    return [factor * iv.log(y / b) - iv.log(x / b) for x, y, b in zip(p, q, base, strict=True)]


def _between(q: Sequence[Any], base: Sequence[Any], powers: tuple[Fraction, Fraction]) -> tuple[list[Any], Any]:
    """The normalised product of powers of teacher and base, and its normaliser."""
    products = [raised(y, powers[0]) * raised(b, powers[1]) for y, b in zip(q, base, strict=True)]
    z = sum(products, iv.mpf(0))
    return [x / z for x in products], z


def _check_extrapolated_value(shift: Callable[[Any], Any]) -> Cases:
    for label, p, q, base in beside():
        for power in _POWERS:
            mixture, z = _between(q, base, (power, 1 - power))
            value = expectation(p, _reward(p, q, base, power))
            yield overlap(value, -kl(p, mixture) + shift(iv.log(z)), label, f"lambda {power}")


def _check_extrapolated(powers: Callable[[Fraction], tuple[Fraction, Fraction]]) -> Cases:
    """The sampled reward's expected gradient against the reverse KL to a product of powers."""
    for label, p, q, base in beside():
        for power in _POWERS:
            mixture, _ = _between(q, base, powers(power))
            found = mean_gradient(p, _reward(p, q, base, power))
            for k, (left, right) in enumerate(zip(found, descent("reverse_kl", p, mixture), strict=True)):
                yield overlap(left, right, label, f"lambda {power}", f"logit {k}")


def _check_drift(factor: Callable[[Fraction], Fraction]) -> Cases:
    for label, _, q, base in beside():
        for power in _POWERS:
            found = mean_gradient(q, _reward(q, q, base, power))
            left = factor(power)
            scaled = iv.mpf(left.numerator) / left.denominator
            # `mean_gradient` is that of the loss: minus the expectation of weight times score.
            claimed = [-scaled * x for x in mean_gradient(q, [iv.log(y / b) for y, b in zip(q, base, strict=True)])]
            for k, (a, b) in enumerate(zip(found, claimed, strict=True)):
                yield overlap(a, b, label, f"lambda {power}", f"logit {k}")


# The derivation.


def _base_and_teacher() -> bool:
    p, q, base, z = sympy.symbols("p q b Z", positive=True)
    power = sympy.Symbol("lambda", real=True)
    m = q**power * base ** (1 - power) / z
    gap = power * sympy.log(q / base) - sympy.log(p / base) + sympy.log(p / m) - sympy.log(z)
    return sympy.simplify(sympy.expand_log(gap, force=True)) == 0


def _at_the_teacher() -> bool:
    q, base = sympy.symbols("q b", positive=True)
    power = sympy.Symbol("lambda", real=True)
    reward = power * sympy.log(q / base) - sympy.log(q / base)
    return sympy.simplify(reward - (power - 1) * sympy.log(q / base)) == 0
