"""Confidence sequences: their level over all times at once, beside intervals that hold at one time only."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from opdtheory.auditing.sampling.confidence import (
    Moments,
    asymptotic_interval,
    bounded_interval,
    mixture_radius,
    tightest_rho,
)
from opdtheory.errors import InvalidArgumentError
from tests.tolerances import ALGEBRA

ALPHA = 0.05
RUNS = 2000
STEPS = 800
START = 50


def _misses(interval, draws: torch.Tensor) -> int:
    """In how many runs some interval from START on leaves out the mean, which is zero."""
    moments, missed = Moments.empty(draws.shape[1]), torch.zeros(draws.shape[1], dtype=torch.bool)
    for row in draws:
        moments = moments.add(row)
        if moments.count >= START:
            low, high = interval(moments)
            missed |= (low > 0) | (high < 0)
    return int(missed.sum())


def _skewed() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return -torch.rand(STEPS, RUNS, generator=generator, dtype=torch.float64).log() - 1.0


def test_moments_are_the_sample_moments() -> None:
    draws = _skewed()[:37, :5]
    moments = Moments.empty(5)
    for row in draws:
        moments = moments.add(row)
    torch.testing.assert_close(moments.mean, draws.mean(0), rtol=ALGEBRA, atol=ALGEBRA)
    torch.testing.assert_close(moments.deviation, draws.std(0), rtol=ALGEBRA, atol=ALGEBRA)
    assert moments.count == 37
    assert float(Moments.empty(2).add(torch.ones(2, dtype=torch.float64)).deviation.max()) == 0.0


def test_time_uniform_coverage_of_skewed_draws() -> None:
    """2000 runs, seed 3: the miss rate over all 751 times is at most alpha by a 99.9 % binomial interval."""
    rho = tightest_rho(300, ALPHA)
    misses = _misses(lambda m: asymptotic_interval(m, ALPHA, rho, START), _skewed())
    assert stats.binomtest(misses, RUNS, ALPHA, alternative="greater").pvalue > 1e-3
    assert misses > 0


def test_an_interval_for_one_time_misses_when_looked_at_all_the_time() -> None:
    quantile = float(stats.norm.ppf(1 - ALPHA / 2))

    def fixed(m: Moments) -> tuple[torch.Tensor, torch.Tensor]:
        width = quantile * m.deviation / math.sqrt(m.count)
        return m.mean - width, m.mean + width

    misses = _misses(fixed, _skewed())
    assert stats.binomtest(misses, RUNS, ALPHA, alternative="greater").pvalue < 1e-9


def test_rho_is_the_tightest_at_its_count() -> None:
    for count in (50, 1000, 10**6):
        rho = tightest_rho(count, 1e-4)
        least = float(mixture_radius(count, 1e-4, rho))
        assert least < float(mixture_radius(count, 1e-4, 1.05 * rho))
        assert least < float(mixture_radius(count, 1e-4, 0.95 * rho))
        assert least > float(stats.norm.ppf(1 - 5e-5)) / math.sqrt(count)


def test_nothing_is_claimed_before_the_start() -> None:
    low, high = asymptotic_interval(Moments.empty(2), ALPHA, 0.1, 10)
    assert bool(torch.isinf(low).all()) and bool(torch.isinf(high).all())


def _ever_missed(interval, mean: float, steps: int) -> float:
    """The probability, summed exactly, that some interval of a Bernoulli stream leaves out its mean."""
    alive = torch.ones(1, dtype=torch.float64)
    for count in range(1, steps + 1):
        grown = torch.zeros(count + 1, dtype=torch.float64)
        grown[:-1] += (1 - mean) * alive
        grown[1:] += mean * alive
        for total in range(count + 1):
            if float(grown[total]) > 0:
                low, high = interval(total, count)
                grown[total] *= low <= mean <= high
        alive = grown
    return 1.0 - float(alive.sum())


@pytest.mark.parametrize("mean", [0.05, 0.5])
def test_bounded_coverage_is_exact_at_every_time(mean: float) -> None:
    missed = _ever_missed(lambda s, n: bounded_interval(s, n, ALPHA), mean, 60)
    assert 0.0 < missed <= ALPHA


def test_an_interval_for_one_time_is_no_sequence() -> None:
    def exact_once(total: int, count: int) -> tuple[float, float]:
        low = float(stats.beta.ppf(ALPHA / 2, total, count - total + 1)) if total else 0.0
        high = float(stats.beta.ppf(1 - ALPHA / 2, total + 1, count - total)) if total < count else 1.0
        return low, high

    assert _ever_missed(exact_once, 0.5, 60) > ALPHA


def test_bounded_interval_ends() -> None:
    assert bounded_interval(0, 0, ALPHA) == (0.0, 1.0)
    low, high = bounded_interval(0, 1000, 0.01)
    assert low == 0.0 and math.log(100) / 1000 < high < 3 * math.log(100) / 1000
    low, high = bounded_interval(1000, 1000, 0.01)
    assert high == 1.0 and low > 0.98
    low, high = bounded_interval(30.5, 100, ALPHA)
    assert low < 0.305 < high
    inside, outside = bounded_interval(30, 100, 0.2), bounded_interval(30, 100, 0.01)
    assert outside[0] < inside[0] < inside[1] < outside[1]


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: mixture_radius(3, 0.0, 0.1), "alpha"),
        (lambda: mixture_radius(3, 0.1, 0.0), "rho"),
        (lambda: tightest_rho(0, 0.1), "count"),
        (lambda: asymptotic_interval(Moments.empty(1), 0.1, 0.1, 1), "start"),
        (lambda: bounded_interval(3, 2, 0.1), "total"),
        (lambda: bounded_interval(1, 2, 1.0), "alpha"),
    ],
)
def test_bad_arguments_are_named(call, argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        call()
