"""Confidence intervals."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.intervals import wilson


def test_wilson_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    with pytest.raises(InvalidArgumentError, match="correct"):
        wilson(3, 2)
