"""How many weights have one expected gradient: the null space of a linear system over all laws on a grid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator
from fractions import Fraction

from sympy import QQ
from sympy.polys.matrices import DomainMatrix

from opdtheory.theorems.instances.one_sample import score

__all__ = ["freedom", "laws"]


def laws(size: int, parts: int, first: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Numbers of equal parts that each token gets, one at least; the first tokens' may be given."""
    left = parts - sum(first)
    for rest in itertools.product(range(1, left + 1), repeat=size - len(first)):
        if sum(rest) == left:
            yield (*first, *rest)


@functools.cache
def freedom(size: int, known: int) -> int:
    r"""The dimension of the functions $B$ that no expected gradient shows, $E_p[B s] = 0$ for all laws of the grid.

    A sampled token's $B$ is a function of the token, $p_y$ and $q_y$. With some tokens known, these have one and the
    same probabilities in all laws, and their terms are one number each.
    """
    given = ((1,) * known, (2,) + (1,) * (known - 1) if known else ())
    parts = size + 3
    unknown: dict[Hashable, int] = {}
    rows: list[dict[int, Fraction]] = []
    for student, teacher in itertools.product(*(laws(size, parts, first) for first in given)):
        p = [Fraction(x, parts) for x in student]
        cells = [a if a < known else (a, student[a], teacher[a]) for a in range(size)]
        places = [unknown.setdefault(cell, len(unknown)) for cell in cells]
        for j in range(size):
            rows.append({place: p[a] * score(p, a)[j] for a, place in enumerate(places)})
    dense = [
        [QQ(x.numerator, x.denominator) for x in (row.get(i, Fraction(0)) for i in range(len(unknown)))] for row in rows
    ]
    return len(unknown) - DomainMatrix(dense, (len(rows), len(unknown)), QQ).rank()
