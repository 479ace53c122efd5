"""Mixtures of several teachers, and products of powers of a teacher and a base, enclosed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv

from opdtheory import divergences
from opdtheory.theorems.instances.cases import Distribution, at_atoms, distribution, perspective, rational_distributions
from opdtheory.theorems.instances.one_sample import in_logits, intervals

__all__ = ["beside", "descent", "enclosed", "groups", "power_mean", "raised", "weighted_sum"]


def weighted_sum(shares: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[Any]:
    r"""$\sum_k \lambda_k x_k$, entry by entry."""
    return [sum(c * x for c, x in zip(shares, column, strict=True)) for column in zip(*rows, strict=True)]


@functools.cache
def groups() -> tuple[tuple[Distribution, tuple[Fraction, ...], tuple[Distribution, ...]], ...]:
    """A student, the shares and the teachers: two or three, of two to four tokens."""
    found: list[tuple[Distribution, tuple[Fraction, ...], tuple[Distribution, ...]]] = []
    for size in (2, 3, 4):
        rows = [row for pair in rational_distributions() for row in pair if len(row) == size]
        found.append((rows[0], distribution(1, 1), (rows[1], rows[2])))
        found.append((rows[1], distribution(1, 2, 3), (rows[0], rows[2], rows[3])))
    return tuple(found)


def raised(value: Any, power: Fraction) -> Any:
    """A positive interval to a rational power."""
    return iv.exp(iv.mpf(power.numerator) / power.denominator * iv.log(value))


def power_mean(shares: Sequence[Any], teachers: Sequence[Sequence[Any]], power: Fraction) -> tuple[list[Any], Any]:
    r"""The normalised $(\sum_k\lambda_k q_k^\alpha)^{1/\alpha}$, for 0 the geometric mixture, and its normaliser."""
    if power == 0:
        logs = weighted_sum(shares, [[iv.log(x) for x in row] for row in teachers])
        means = [iv.exp(x) for x in logs]
    else:
        sums = weighted_sum(shares, [[raised(x, power) for x in row] for row in teachers])
        means = [raised(x, 1 / power) for x in sums]
    z = sum(means, iv.mpf(0))
    return [x / z for x in means], z


def enclosed() -> Iterator[tuple[Distribution, Any, Any, Any]]:
    """Each group by its student, with student, shares and teachers as intervals."""
    for p, shares, teachers in groups():
        yield p, intervals(p), intervals(shares), [intervals(q) for q in teachers]


def descent(name: str, p: Sequence[Any], q: Sequence[Any]) -> list[Any]:
    r"""$\nabla D_f(q\|p)$ in the logits from the slope of $p f(q/p)$ by sympy, enclosed."""
    term, in_p, _ = perspective(divergences.divergence(name).expr)
    return in_logits(p, at_atoms(sympy.diff(term, in_p), p, q))


def beside() -> Iterator[tuple[Distribution, list[Any], list[Any], list[Any]]]:
    """Student, teacher and base, enclosed."""
    for p, _, (q, base, *_) in groups():
        yield p, intervals(p), intervals(q), intervals(base)
