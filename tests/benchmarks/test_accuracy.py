"""The measure of errors in units in the last place, and the divergences under it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import opdtheory as opd
from benchmarks.accuracy import DTYPES, FUNCTIONS, MARK, MEMBERS, _all_of, errors, log_ratios, unit, worst


def test_units_are_distances_to_the_next_number():
    for dtype in DTYPES:
        values = torch.tensor([1.0, 1.5, 3.0, 1e-3, 100.0], dtype=dtype)
        found = unit(values.double().numpy(), dtype)
        above = torch.nextafter(values, torch.full_like(values, math.inf)).double().numpy()
        assert np.array_equal(found, above - values.double().numpy())
    assert unit(np.array([0.0, 5e-324]), torch.float64).tolist() == [5e-324, 5e-324]


def test_errors_count_units_and_wrong_infinities():
    high, low = np.array([1.0, 1.0, math.inf, 1.0, 2e308 / 2, 1.0]), np.zeros(6)
    found = np.array([1.0, 1.0 + 3 * 2.0**-52, math.inf, math.nan, math.inf, -math.inf])
    assert errors(found, high, low, torch.float64).tolist()[:4] == [0.0, 3.0, 0.0, math.inf]
    assert errors(found, high, low, torch.float64)[5] == math.inf
    # Half a unit that the nearest float64 leaves is counted too.
    assert errors(np.array([1.0]), np.array([1.0]), np.array([2.0**-53]), torch.float64)[0] == 0.5
    # The largest number of float16 rounds up to infinity, half of it does not.
    assert errors(np.array([math.inf]), np.array([65520.0]), np.zeros(1), torch.float16)[0] == 0.0
    assert errors(np.array([math.inf]), np.array([30000.0]), np.zeros(1), torch.float16)[0] == math.inf


def test_every_number_of_a_narrow_dtype_is_looked_at():
    every = _all_of(torch.float16)
    assert len(every) == 2**16 - 2 * (2**10 - 1)
    assert len(every.double().unique()) == len(every) - 1


@pytest.mark.parametrize("member", MEMBERS)
def test_narrow_dtypes_are_rounded_once(member):
    d, log_u = opd.divergence(member), log_ratios(2000)
    for dtype in DTYPES[1:]:
        narrow = torch.from_numpy(log_u).to(dtype)
        for function in FUNCTIONS:
            high = getattr(d, function)(narrow.double()).numpy()
            off = errors(getattr(d, function)(narrow).double().numpy(), high, np.zeros_like(high), dtype)
            # Torch takes float64 to the 16-bit dtypes by way of float32, which may round a near tie the other way.
            assert float(off.max()) <= 0.5 + 2.0**-12, (dtype, function)


def test_a_naive_generator_is_far_beyond_the_mark():
    """u log u - u + 1 as it is written loses all digits near u = 1."""
    log_u = torch.tensor([1e-6, 1e-4, -1e-5], dtype=torch.float64)
    u = log_u.exp()
    exact = opd.divergence("alpha(alpha=1)").generator(log_u).numpy()
    off = errors((u * log_u - u + 1).numpy(), exact, np.zeros(3), torch.float64)
    assert float(off.max()) > 1000 * MARK


@pytest.mark.parametrize("member", ["jsd", "forward_kl", "alpha(alpha=0.3)", "skew_reverse_kl(lam=0.1)"])
def test_float64_is_within_the_mark_of_exact_balls(member):
    pytest.importorskip("flint")
    found = worst(opd.divergence(member), 2000)
    for function in FUNCTIONS:
        assert found[function, torch.float64].ulp <= 2 * MARK, function
