r"""What the checks of top-k losses (T9) share: a teacher, and rational pairs with a set S."""

from __future__ import annotations

from collections.abc import Iterator

from opdtheory.theorems.instances.cases import Distribution, rational_distributions

__all__ = ["TEACHER", "kept"]

TEACHER = (0.4, 0.25, 0.2, 0.15)


def kept() -> Iterator[tuple[Distribution, Distribution, int]]:
    """Rational pairs `(p, q)` with the number of leading atoms that make up S."""
    for student, teacher in rational_distributions():
        for k in range(1, len(student)):
            yield student, teacher, k
