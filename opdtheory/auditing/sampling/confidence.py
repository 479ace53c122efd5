r"""Confidence sequences: intervals for a mean that hold at all sample sizes at once, so sampling may stop at any time.

There are two kinds. The *asymptotic* one needs only a finite variance and holds at its level from a start time on, in
the limit of a late start. The *bounded* one holds at every sample size, for observations in [0, 1].

References:
    Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, *Time-uniform central limit theory and asymptotic confidence
    sequences*, 2103.06476; Robbins (1970) and Howard, Ramdas, McAuliffe & Sekhon, 1810.08240, for mixtures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError, check_between

__all__ = ["Moments", "asymptotic_interval", "bounded_interval", "mixture_radius", "tightest_rho"]

# Halvings of an interval of length one: below the rounding of its ends.
_HALVINGS = 60


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a stream of vectors, updated one vector at a time (Welford).

    Attributes:
        count: number of observations.
        mean: mean, `(K,)`.
        squares: sum of squared deviations from the mean, `(K,)`.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, size: int) -> Moments:
        """The moments before the first observation of `size` numbers."""
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(0, zeros, zeros)

    def add(self, observation: Tensor) -> Moments:
        """The moments with one more observation, `(K,)`."""
        count, step = self.count + 1, observation - self.mean
        mean = self.mean + step / count
        return Moments(count, mean, self.squares + step * (observation - mean))

    @property
    def deviation(self) -> Tensor:
        """The sample standard deviation, `(K,)`; zero before the second observation."""
        return (self.squares / max(self.count - 1, 1)).sqrt()


def mixture_radius(count: Tensor | int | float, alpha: float, rho: float) -> Tensor:
    r"""Half the width of the interval, in standard deviations.

    $$\sqrt{\frac{n\rho^2+1}{n^2\rho^2}\log\frac{n\rho^2+1}{\alpha^2}}$$

    From a normal mixture over alternatives of size $\rho$: by Ville's inequality, a sum of standard normals ever leaves
    the interval with probability at most $\alpha$.

    Args:
        count: number of observations `n`, at least 1, of any shape.
        alpha: two-sided probability that some interval of the sequence misses.
        rho: determines the count at which the interval is tightest, see `tightest_rho`.

    Raises:
        InvalidArgumentError: `alpha` is outside (0, 1), or `rho` is not positive.
    """
    check_between("alpha", alpha, 0.0, 1.0)
    check_between("rho", rho, 0.0, math.inf)
    n = torch.as_tensor(count, dtype=torch.float64)
    grown = n * rho**2 + 1.0
    return (grown / (n * n * rho**2) * (grown.log() - 2.0 * math.log(alpha))).sqrt()


def tightest_rho(count: int | float, alpha: float) -> float:
    r"""The $\rho$ that makes `mixture_radius` smallest at `count` observations.

    It solves $x = \log((x+1)/\alpha^2)$ with $x = n\rho^2$.

    Raises:
        InvalidArgumentError: `count` is not positive, or `alpha` is outside (0, 1).
    """
    check_between("alpha", alpha, 0.0, 1.0)
    check_between("count", count, 0.0, math.inf)
    x = -2.0 * math.log(alpha)
    for _ in range(50):  # The slope of the right-hand side is 1/(x+1) < 1.
        x = math.log1p(x) - 2.0 * math.log(alpha)
    return math.sqrt(x / count)


def asymptotic_interval(moments: Moments, alpha: float, rho: float, start: int) -> tuple[Tensor, Tensor]:
    r"""The asymptotic confidence sequence $\hat\mu_n \pm \hat\sigma_n\,\mathrm{radius}(n)$ for each mean.

    For i.i.d. observations with slightly more than two finite moments, the probability that some interval from `start`
    on misses tends to at most `alpha` as `start` grows. It says nothing about few observations: it does not cover
    events too rare to have been seen.

    Args:
        moments: moments of the stream so far.
        alpha: level of each component; several share a joint level by a union bound.
        rho: as in `mixture_radius`, fixed before the stream begins.
        start: number of observations from which the intervals hold, at least 2.

    Returns:
        `(low, high)`, each `(K,)`; infinite before `start`.

    Raises:
        InvalidArgumentError: `start` is below 2, or as `mixture_radius`.
    """
    if start < 2:
        raise InvalidArgumentError("start", f"must be at least 2, for a standard deviation, got {start!r}")
    radius = mixture_radius(float(max(moments.count, 1)), alpha, rho)
    if moments.count < start:
        endless = torch.full_like(moments.mean, math.inf)
        return -endless, endless
    width = moments.deviation * radius
    return moments.mean - width, moments.mean + width


def bounded_interval(total: int | float, count: int, alpha: float) -> tuple[float, float]:
    r"""A nonasymptotic confidence sequence for the mean of observations in [0, 1], by a beta mixture.

    It contains the means `m` for which
    $$\int \frac{r^S (1-r)^{n-S}}{m^S (1-m)^{n-S}}\,\mathrm{Beta}_{\frac12,\frac12}(dr) < \frac1\alpha,
      \qquad S = \textstyle\sum_i x_i.$$
    At the true mean the left side is a nonnegative supermartingale that starts at 1, since for $x \in [0, 1]$,
    $E[(r/m)^x ((1-r)/(1-m))^{1-x}] \le E[x\,r/m + (1-x)(1-r)/(1-m)] = 1$. By Ville's inequality, the mean is in the
    intervals of all sample sizes at once with probability at least `1 - alpha`.

    Args:
        total: sum of the observations, such as a number of successes.
        count: number of observations.
        alpha: probability that some interval of the sequence misses.

    Raises:
        InvalidArgumentError: `alpha` is outside (0, 1), or `total` is outside [0, count].
    """
    check_between("alpha", alpha, 0.0, 1.0)
    if count < 0 or not 0.0 <= total <= count:
        raise InvalidArgumentError("total", f"must be in [0, {count}], got {total!r}")
    if count == 0:
        return 0.0, 1.0
    limit = -math.log(alpha) - _log_beta(total + 0.5, count - total + 0.5) + _log_beta(0.5, 0.5)
    mean = total / count
    low = 0.0 if total == 0 else _crossing(total, count, limit, mean, 0.0)
    high = 1.0 if total == count else _crossing(total, count, limit, mean, 1.0)
    return low, high


def _crossing(total: int | float, count: int, limit: float, inside: float, outside: float) -> float:
    """Where the log-wealth of the mixture, convex in the mean and least at `inside`, reaches its limit."""
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2.0
        if _cross_entropy(total, count, middle) < limit:
            inside = middle
        else:
            outside = middle
    return outside


def _cross_entropy(total: int | float, count: int, mean: float) -> float:
    value = 0.0
    for part, probability in ((total, mean), (count - total, 1.0 - mean)):
        if part > 0:
            value += math.inf if probability <= 0.0 else -part * math.log(probability)
    return value


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
