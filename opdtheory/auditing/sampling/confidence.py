r"""Intervals for a mean, and how one error rate is shared by all of them.

A sampled statement rests on many intervals. Each *stream*, the projections of one pair on one direction, is *looked* at
whenever a pair has a given number of observations, and nowhere else. With `m` streams, the interval of each at its
$k$-th look has the level $\alpha / (m\,k(k+1))$. As $\sum_k 1/(k(k+1)) = 1$, the union bound makes all intervals of all
streams at all looks hold jointly with probability at least $1 - \alpha$, whatever decides when to stop. The counts at
which looks happen are fixed beforehand; a count that depends on the draws would break the bound.

There are two kinds of interval. `interval` needs no bound on the observations: its level is exact for noise that is
symmetric about its mean, at every number of observations, and correct to second order for other noise of finite
variance. It can't cover events that are too rare to have been seen; `bounded_interval` says how rare these are, and
holds without any assumption.

References:
    Efron, *Student's t-test under symmetry conditions* (1969), for the symmetric case; Hall, *The Bootstrap and
    Edgeworth Expansion* (1992), section 2.6, for the correction; Robbins (1970) and Howard, Ramdas, McAuliffe & Sekhon,
    1810.08240, for mixtures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.errors import InvalidArgumentError, check_between, check_integer

__all__ = ["Moments", "bounded_interval", "first_count", "interval", "share_of_look"]

# At the first look, an interval is at most this many standard deviations wide on either side.
_WIDEST = 4.0

# Halvings of an interval of length one: below the rounding of its ends.
_HALVINGS = 60


@dataclass(frozen=True)
class Moments:
    """Count, mean and sums of powers of the deviations of a stream of vectors, updated one vector at a time (Welford).

    Attributes:
        count: number of observations.
        mean: mean, `(K,)`.
        squares: sum of squared deviations from the mean, `(K,)`.
        cubes: sum of their third powers, `(K,)`.
    """

    count: int
    mean: Tensor
    squares: Tensor
    cubes: Tensor

    @classmethod
    def empty(cls, size: int) -> Moments:
        """The moments before the first observation of `size` numbers."""
        zeros = torch.zeros(size, dtype=torch.float64)
        return cls(0, zeros, zeros, zeros)

    def add(self, observation: Tensor) -> Moments:
        """The moments with one more observation, `(K,)`."""
        before, count = self.count, self.count + 1
        gap = observation - self.mean
        step = gap / count
        grown = gap * before * step
        cubes = self.cubes + step * (grown * (before - 1) - 3.0 * self.squares)
        return Moments(count, self.mean + step, self.squares + grown, cubes)

    @property
    def deviation(self) -> Tensor:
        """The sample standard deviation, `(K,)`; zero before the second observation."""
        return (self.squares / max(self.count - 1, 1)).sqrt()


def share_of_look(look: int) -> float:
    r"""The share $1/(k(k+1))$ of an error rate that the $k$-th look may spend; the shares of all looks sum to one.

    Raises:
        InvalidArgumentError: `look` is not a whole number of at least 1.
    """
    check_integer("look", look)
    return 1.0 / (look * (look + 1))


def first_count(alpha: float) -> int:
    """The number of observations at the first look, from which `interval` is narrow enough to be of use.

    Args:
        alpha: level of one stream over all looks.

    Raises:
        InvalidArgumentError: `alpha` is outside (0, 1).
    """
    check_between("alpha", alpha, 0.0, 1.0)
    return math.ceil(_spread(alpha * share_of_look(1)) * (1.0 + _WIDEST**-2))


def interval(moments: Moments, alpha: float) -> tuple[Tensor, Tensor]:
    r"""The self-normalised interval for each mean, for one look at a stream.

    $$\hat\mu \pm \Big(\hat\sigma\sqrt{\frac{c}{1-c}} + \hat\sigma|\hat\gamma|\frac{c}{3}\Big),
      \qquad c = \frac{2\log(2/\alpha)}{n}$$

    with $\hat\sigma^2 = \frac1n\sum_i(x_i-\hat\mu)^2$ and the sample skewness $\hat\gamma$. Proof for symmetric noise:
    given the sizes $|x_i-\mu|$, the signs are fair coins, so by Hoeffding's inequality
    $|\sum_i(x_i-\mu)| > \sqrt{2\log(2/\alpha)\sum_i(x_i-\mu)^2}$ has a probability of at most $\alpha$. With
    $\sum_i(x_i-\mu)^2 = n\hat\sigma^2 + n(\hat\mu-\mu)^2$ this is the first term. The second one is the shift of a
    Studentised mean's quantile by skewness, to leading order.

    A stream without variance has an interval of length zero, its constant.

    Args:
        moments: moments of the stream so far.
        alpha: level of each component; several share a joint level by a union bound.

    Returns:
        `(low, high)`, each `(K,)`; infinite if there are no more than $2\log(2/\alpha)$ observations.

    Raises:
        InvalidArgumentError: `alpha` is outside (0, 1).
    """
    check_between("alpha", alpha, 0.0, 1.0)
    spread, count = _spread(alpha), moments.count
    if count <= spread:
        endless = torch.full_like(moments.mean, math.inf)
        return -endless, endless
    # The deviation times the skewness is the ratio of the sums; a constant stream has neither.
    skew = torch.where(moments.squares > 0.0, moments.cubes / moments.squares, 0.0).abs()
    width = (moments.squares / count).sqrt() * math.sqrt(spread / (count - spread)) + skew * spread / (3.0 * count)
    return moments.mean - width, moments.mean + width


def _spread(alpha: float) -> float:
    """The square of the normalised sum that fair signs exceed with a probability of at most `alpha`."""
    return 2.0 * math.log(2.0 / alpha)


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
