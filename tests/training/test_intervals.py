"""Confidence intervals."""

from __future__ import annotations

import math

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.intervals import newcombe, wilson


def test_wilson_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    with pytest.raises(InvalidArgumentError, match="correct"):
        wilson(3, 2)


def interval_of(after: tuple[int, int], before: tuple[int, int]) -> tuple[float, float]:
    (x, m), (y, n) = after, before
    return newcombe(y / n, x / m, wilson(y, n), wilson(x, m))


def test_newcombes_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 873, method 10.
    assert interval_of((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert interval_of((9, 10), (3, 10)) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    low, high = interval_of((48, 80), (56, 70))
    assert (-high, -low) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    # With the limits on the wrong sides it is another one.
    wrong = newcombe(0.6, 0.8, wilson(48, 80)[::-1], wilson(56, 70)[::-1])
    assert wrong != pytest.approx((0.0524, 0.3339), abs=5e-4)


def test_newcombes_interval_covers_the_difference() -> None:
    """By enumeration of every outcome of 30 and 30 answers: about 95 %, and not some other level."""
    count = 30
    for p, q in ((0.5, 0.5), (0.5, 0.3), (0.1, 0.4)):
        covered = share_of_covered(p, q, count)
        assert 0.93 < covered < 0.98


def share_of_covered(p: float, q: float, count: int) -> float:
    total = 0.0
    for x in range(count + 1):
        for y in range(count + 1):
            chance = math.comb(count, x) * p**x * (1 - p) ** (count - x)
            chance *= math.comb(count, y) * q**y * (1 - q) ** (count - y)
            low, high = interval_of((y, count), (x, count))
            total += chance * (low <= q - p <= high)
    return total
