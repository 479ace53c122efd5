"""Confidence intervals of shares and means."""

from __future__ import annotations

import math
from statistics import NormalDist

from opdtheory.errors import InvalidArgumentError

__all__ = ["NORMAL", "newcombe", "student_t", "wilson", "wilson_of_share"]

NORMAL = NormalDist().inv_cdf(0.975)


def wilson(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    r"""Wilson's interval for a proportion, which stays in [0, 1] and has a positive width even at 0 and 1.

    $$\frac{\hat p + \frac{z^2}{2n} \pm z\sqrt{\frac{\hat p(1-\hat p)}{n} + \frac{z^2}{4n^2}}}{1 + z^2/n}$$

    Raises:
        InvalidArgumentError: `total` is not positive or `correct` is not in `[0, total]`.

    References:
        Wilson, JASA 22 (1927) 209.

    Example:
        >>> wilson(0, 100)
        (0.0, 0.037)
    """
    if total < 1:
        raise InvalidArgumentError("total", f"must be at least 1, got {total}")
    if not 0 <= correct <= total:
        raise InvalidArgumentError("correct", f"must be in [0, {total}], got {correct}")
    return wilson_of_share(correct / total, float(total), level)


def wilson_of_share(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """`wilson` for a count that need not be an integer, such as the effective one of a mean over seeds."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    spread = z * z / count
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = ((share + spread / 2 + sign * half) / (1 + spread) for sign in (-1, 1))
    return 0.0 if share == 0 else low, 1.0 if share == 1 else high


def newcombe(
    before: float, after: float, before_interval: tuple[float, float], after_interval: tuple[float, float]
) -> tuple[float, float]:
    r"""Newcombe's interval of the difference `after - before` of two independent shares, from Wilson's of each.

    Answers to the same problems are no independent samples; where they agree more often than by chance, as those of a
    model before and after training do, the interval is too wide rather than too narrow.

    References:
        Newcombe, Statistics in Medicine 17 (1998) 873, method 10.

    Example:
        >>> low, high = newcombe(0.6, 0.8, wilson(48, 80), wilson(56, 70))
        >>> round(low, 4), round(high, 4)
        (0.0524, 0.3339)
    """
    (low_1, high_1), (low_2, high_2) = before_interval, after_interval
    difference = after - before
    return difference - math.hypot(after - low_2, high_1 - before), difference + math.hypot(
        high_2 - after, before - low_1
    )


def student_t(degrees: int) -> float:
    """The 97.5 % point of Student's t."""
    from scipy import special

    return float(special.stdtrit(degrees, 0.975))
