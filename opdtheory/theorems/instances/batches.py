"""Batches of independent rollouts of random length: exact means of sums and ratios, and their expansion."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

__all__ = ["Atoms", "Moments", "Reduction", "batch_mean", "first_order", "second_order"]

Reduction = Literal["token_sum", "token_mean", "sequence_mean"]


@dataclass(frozen=True)
class Atoms:
    """A distribution of one rollout: what it adds to the numerator, its length, and its chance."""

    numerators: tuple[Fraction, ...]
    lengths: tuple[int, ...]
    chances: tuple[Fraction, ...]

    @property
    def label(self) -> str:
        """The lengths, which name the case in a check."""
        return f"lengths {self.lengths}"

    def mean(self, of: Callable[[Fraction, int], Fraction]) -> Fraction:
        """The expectation over one rollout."""
        terms = (c * of(n, k) for n, k, c in zip(self.numerators, self.lengths, self.chances, strict=True))
        return sum(terms, Fraction(0))


@dataclass(frozen=True)
class Moments:
    """Means and central moments of a numerator `n` and a length `l`."""

    n: Fraction
    l: Fraction  # noqa: E741
    nl: Fraction
    ll: Fraction
    nll: Fraction
    lll: Fraction

    @classmethod
    def of(cls, atoms: Atoms) -> Moments:
        """The moments of one rollout."""
        n, k = atoms.mean(lambda a, b: a), atoms.mean(lambda a, b: Fraction(b))

        def central(i: int, j: int) -> Fraction:
            return atoms.mean(lambda a, b: (a - n) ** i * (b - k) ** j)

        return cls(n, k, central(1, 1), central(0, 2), central(1, 2), central(0, 3))


def first_order(m: Moments) -> Fraction:
    r"""The coefficient of $1/B$, $-\mathrm{Cov}(N, L)/\bar L^2 + \bar N\,\mathrm{Var}(L)/\bar L^3$."""
    return -m.nl / m.l**2 + m.n * m.ll / m.l**3


def second_order(m: Moments) -> Fraction:
    r"""The coefficient of $1/B^2$, by the third moments and the squares of the second."""
    return m.nll / m.l**3 - (m.n * m.lll + 3 * m.nl * m.ll) / m.l**4 + 3 * m.n * m.ll**2 / m.l**5


@functools.cache
def batch_mean(atoms: Atoms, batch_size: int, reduction: Reduction, with_length: bool = False) -> Fraction:
    r"""The exact mean over all batches of the reduced numerator; `with_length`, times the batch's mean length."""
    total = Fraction(0)
    for counts in _compositions(batch_size, len(atoms.chances)):
        ways = math.factorial(batch_size)
        chance = Fraction(1)
        for count, c in zip(counts, atoms.chances, strict=True):
            ways //= math.factorial(count)
            chance *= c**count
        length = sum(count * k for count, k in zip(counts, atoms.lengths, strict=True))
        if reduction == "sequence_mean":
            parts = (count * n / k for count, n, k in zip(counts, atoms.numerators, atoms.lengths, strict=True))
            value = sum(parts, Fraction(0)) / batch_size
        else:
            whole = sum((count * n for count, n in zip(counts, atoms.numerators, strict=True)), Fraction(0))
            value = whole / (length if reduction == "token_mean" else batch_size)
        total += ways * chance * value * (Fraction(length, batch_size) if with_length else 1)
    return total


def _compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [(k, *rest) for k in range(total + 1) for rest in _compositions(total - k, parts - 1)]
