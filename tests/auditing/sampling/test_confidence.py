"""Intervals: their level over all streams and looks at once, beside intervals that hold for one at a time."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from opdtheory.auditing.sampling.confidence import (
    Moments,
    bounded_interval,
    first_count,
    interval,
    share_of_look,
)
from opdtheory.errors import InvalidArgumentError
from tests.tolerances import ALGEBRA

ALPHA = 0.05
RUNS = 400
STREAMS = 10
COUNTS = (40, 50, 63, 79, 99, 124, 155, 194, 243, 304, 380, 475)

Interval = tuple[torch.Tensor, torch.Tensor]


def symmetric(generator: torch.Generator, size: tuple[int, ...]) -> torch.Tensor:
    """Of finite variance but infinite third moment: the cube root of a Cauchy variable, times itself."""
    cauchy = torch.tan(math.pi * (torch.rand(size, generator=generator, dtype=torch.float64) - 0.5))
    return cauchy.sign() * cauchy.abs() ** 0.4


def skewed(generator: torch.Generator, size: tuple[int, ...]) -> torch.Tensor:
    """Means of eight exponential variables, minus one."""
    return -torch.rand((8, *size), generator=generator, dtype=torch.float64).log().mean(0) - 1.0


def rounding(generator: torch.Generator, size: tuple[int, ...]) -> torch.Tensor:
    """Noise of very different sizes by stream, zero among them."""
    sizes = torch.logspace(-150, 8, size[-1], dtype=torch.float64)
    sizes[0] = 0.0
    return sizes * torch.randn(size, generator=generator, dtype=torch.float64)


def missed(draw, interval_at) -> int:
    """In how many runs of several streams some interval at some look leaves out a mean, which is zero."""
    generator = torch.Generator().manual_seed(3)
    moments, misses = Moments.empty(RUNS * STREAMS), torch.zeros(RUNS, dtype=torch.bool)
    for look, count in enumerate(COUNTS, 1):
        for row in draw(generator, (count - moments.count, RUNS, STREAMS)):
            moments = moments.add(row.flatten())
        low, high = interval_at(moments, look)
        misses |= ((low > 0) | (high < 0)).view(RUNS, STREAMS).any(-1)
    return int(misses.sum())


def stated(moments: Moments, look: int) -> Interval:
    return interval(moments, ALPHA / STREAMS * share_of_look(look))


def normal_at(level: float):
    """The interval by a normal quantile, at one level for all looks."""

    def at(moments: Moments, look: int) -> Interval:
        width = float(stats.norm.ppf(1.0 - level / 2.0)) * moments.deviation / math.sqrt(moments.count)
        return moments.mean - width, moments.mean + width

    return at


def test_moments_are_the_sample_moments() -> None:
    draws = skewed(torch.Generator().manual_seed(0), (37, 5))
    moments = Moments.empty(5)
    for row in draws:
        moments = moments.add(row)
    away = draws - draws.mean(0)
    torch.testing.assert_close(moments.mean, draws.mean(0), rtol=ALGEBRA, atol=ALGEBRA)
    torch.testing.assert_close(moments.deviation, draws.std(0), rtol=ALGEBRA, atol=ALGEBRA)
    torch.testing.assert_close(moments.cubes, (away**3).sum(0), rtol=ALGEBRA, atol=ALGEBRA)
    assert moments.count == 37
    assert float(Moments.empty(2).add(torch.ones(2, dtype=torch.float64)).deviation.max()) == 0.0


@pytest.mark.parametrize("draw", [symmetric, skewed, rounding])
def test_all_streams_and_looks_together_keep_the_error_rate(draw) -> None:
    """400 runs of 10 streams with 12 looks: no more misses than the rate explains."""
    assert stats.binomtest(missed(draw, stated), RUNS, ALPHA, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize("draw", [skewed, rounding])
@pytest.mark.parametrize("level", [ALPHA, ALPHA / STREAMS], ids=["no union", "no union over looks"])
def test_naive_intervals_miss_more_often(draw, level: float) -> None:
    misses = missed(draw, normal_at(level))
    assert stats.binomtest(misses, RUNS, ALPHA, alternative="greater").pvalue < 1e-3


def fair_signs_miss(count: int, interval_of) -> float:
    """The probability that an interval leaves out the mean of fair signs, summed exactly."""
    mean = 2.0 * torch.arange(count + 1, dtype=torch.float64) / count - 1.0
    squares = count * (1.0 - mean**2)
    low, high = interval_of(Moments(count, mean, squares, -2.0 * mean * squares))
    ways = [math.comb(count, heads) for heads in range(count + 1)]
    return sum(n for n, out in zip(ways, ((low > 0) | (high < 0)).tolist(), strict=True) if out) / 2**count


def test_the_level_holds_for_symmetric_noise_at_every_count() -> None:
    """Of fair signs; an interval by the normal quantile fails the same check."""
    for alpha in (0.3, ALPHA, 1e-3):
        rates = [fair_signs_miss(count, lambda m, a=alpha: interval(m, a)) for count in range(1, 200)]
        assert 0.0 < max(rates) <= alpha
    assert max(fair_signs_miss(count, lambda m: normal_at(ALPHA)(m, 1)) for count in range(8, 200)) > ALPHA


def test_the_shares_of_all_looks_sum_to_one() -> None:
    assert sum(share_of_look(k) for k in range(1, 1001)) == pytest.approx(1.0 - 1.0 / 1001.0, abs=1e-14)


def test_a_stream_without_variance_is_its_constant() -> None:
    """Whatever the constant is, beside a stream that varies, and never 0/0."""
    moments, constants = Moments.empty(4), torch.tensor([0.0, 0.1, -1e300, 5e-324], dtype=torch.float64)
    for _ in range(60):
        moments = moments.add(constants)
    low, high = interval(moments, ALPHA)
    assert torch.equal(low, constants) and torch.equal(high, constants)
    low, high = interval(moments.add(constants + torch.tensor([0.0, 0.0, 0.0, 1.0])), ALPHA)
    assert torch.equal(low[:3], constants[:3]) and bool(low[3] < 0.0 < high[3])


def test_nothing_is_claimed_from_few_observations() -> None:
    """No test of signs can reach a level below 2^-n."""
    for alpha in (0.3, ALPHA, 1e-6, 1e-12):
        few = math.floor(2.0 * math.log(2.0 / alpha))
        assert bool(torch.isinf(interval(_constant(few), alpha)[1]).all())
        assert bool(torch.isfinite(interval(_constant(few + 1), alpha)[1]).all())
        first = first_count(alpha)
        level = alpha * share_of_look(1)
        for count, useful in ((first, True), (first - 1, False)):
            unit = Moments(count, *torch.tensor([[0.0], [count], [0.0]], dtype=torch.float64))
            assert (float(interval(unit, level)[1]) <= 4.0) is useful
        assert bool(torch.isinf(interval(Moments.empty(2), alpha)[0]).all())


def _constant(count: int) -> Moments:
    return Moments(count, *torch.zeros(3, 1, dtype=torch.float64))


def _ever_missed(interval_of, mean: float, steps: int) -> float:
    """The probability, summed exactly, that some interval of a Bernoulli stream leaves out its mean."""
    alive = torch.ones(1, dtype=torch.float64)
    for count in range(1, steps + 1):
        grown = torch.zeros(count + 1, dtype=torch.float64)
        grown[:-1] += (1 - mean) * alive
        grown[1:] += mean * alive
        for total in range(count + 1):
            if float(grown[total]) > 0:
                low, high = interval_of(total, count)
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
        (lambda: interval(Moments.empty(1), 0.0), "alpha"),
        (lambda: first_count(1.0), "alpha"),
        (lambda: share_of_look(0), "look"),
        (lambda: bounded_interval(3, 2, 0.1), "total"),
        (lambda: bounded_interval(1, 2, 1.0), "alpha"),
    ],
)
def test_bad_arguments_are_named(call, argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        call()
