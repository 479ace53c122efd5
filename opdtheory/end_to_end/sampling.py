r"""A trainer whose outcomes are too many to play: steps are sampled, and the verdict carries an error rate.

The part of a step's gradient across the claimed one, $d = g - \frac{\langle g, E\rangle}{\langle E, E\rangle} E$, has
mean zero if the trainer descends the claim at any scale. Each of its entries with enough steps is tested, all together
at the error rate. An entry of the gradient without variance escapes such a test: it is compared exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from opdtheory.choices import Verdict
from opdtheory.end_to_end.played import Played
from opdtheory.rendering.text import percent

__all__ = ["ALPHA", "STEPS", "Sampled", "judge", "judged"]

# The probability that a faithful trainer is called biased, all entries together.
ALPHA = 1e-3

# Steps that are sampled.
STEPS = 1_000

# Steps in which an entry must differ from zero for its mean to be tested.
_ENOUGH = 30

# A verdict is given if a difference of this share of the gradient is excluded.
_MARGIN = 0.1

_ROUNDING = 1e-5


@dataclass(frozen=True)
class Sampled:
    """What sampled steps say of a claim.

    Attributes:
        verdict: `exact_up_to_scale` if no difference was found and one of a tenth is excluded, `biased`, or
            `undecided`.
        words: the finding in a sentence.
        worst: the largest distance of an entry from the claim, in standard errors; infinite for an entry without
            variance that differs.
        limit: the distance that calls a trainer biased.
        radius: what the difference is at most, relative to the scaled gradient, but for the same error rate.
    """

    verdict: Verdict
    words: str
    worst: float
    limit: float
    radius: float


def judge(played: Played, exact: Float[Tensor, "R V"], alpha: float = ALPHA) -> Sampled:
    """Compare sampled steps with a claimed gradient, up to a positive scale.

    Args:
        played: steps with equal probabilities.
        exact: the claimed gradient.
        alpha: the probability of a false alarm.
    """
    steps = torch.stack([leaf.gradient.flatten() for leaf in played.leaves])
    met = (steps != 0).any(0) | (exact.flatten() != 0)
    return judged(steps[:, met], exact.flatten()[met], alpha)


def judged(steps: Float[Tensor, "N K"], claim: Float[Tensor, " K"], alpha: float = ALPHA) -> Sampled:
    """Compare independent gradients with the claimed one, as `judge` does."""
    count = len(steps)
    size, mean = float(claim.norm()), steps.mean(0)
    scale = float(mean @ claim) / size**2
    fixed = _fixed(steps, claim, scale)
    across = steps - (steps @ claim / size**2).unsqueeze(-1) * claim
    error = across.std(0) / math.sqrt(count)
    seen = (steps != 0).sum(0) >= _ENOUGH
    tested = seen & (error > _ROUNDING * size / count)
    ratios = torch.where(tested, across.mean(0) / torch.where(tested, error, 1.0), 0.0).abs()
    limit = float(special.ndtri(1 - alpha / (2 * max(1, int(tested.sum())))))
    worst = math.inf if fixed else float(ratios.max())
    along = steps @ claim
    downhill = float(along.mean()) / max(float(along.std()) / math.sqrt(count), 1e-300)
    # The mean is off by this at most: the length of a normal vector exceeds its root mean square by t of them with a
    # probability below exp(-t^2 / 2).
    spread = float(across.var(0).sum().sqrt()) / math.sqrt(count)
    largest = float(across.mean(0).norm()) + spread * (1 + math.sqrt(-2 * math.log(alpha)))
    radius = largest / max(abs(scale) * size, 1e-300)
    found = f"In {count:,} sampled steps"
    if worst > limit:
        where = "an entry that never varies differs" if fixed else f"an entry is {worst:.3g} standard errors off"
        return Sampled("biased", f"{found}, {where} from every multiple of the claimed gradient.", worst, limit, radius)
    if downhill < -limit:
        return Sampled("biased", f"{found}, the gradient points uphill.", downhill, limit, radius)
    if downhill <= limit or radius > _MARGIN:
        words = f"{found} no difference from the claim was found, but one of {percent(radius)} is not excluded."
        return Sampled("undecided", words, worst, limit, radius)
    words = (
        f"{found} no difference from the claim was found, and one of more than {percent(radius)} of the gradient is "
        f"excluded, each with an error rate of {alpha:g}."
    )
    return Sampled("exact_up_to_scale", words, worst, limit, radius)


def _fixed(steps: Tensor, claim: Tensor, scale: float) -> bool:
    """Whether entries that never vary contradict the claim: where it is zero, or at different multiples of it."""
    rounding = _ROUNDING * float(steps.abs().max())
    still = (steps - steps[0]).abs().max(0).values <= rounding
    values, wanted = steps[0][still], claim[still]
    # What the claim has there is zero, up to the probability of a padding token.
    zero = wanted.abs() <= _ROUNDING * float(claim.abs().max())
    if bool((values[zero].abs() > rounding).any()):
        return True
    values, wanted = values[~zero], wanted[~zero]
    if len(values) < 2 or scale <= 0:
        return False
    multiple = float(values @ wanted) / float(wanted @ wanted)
    return bool(((values - multiple * wanted).abs() > 1e-3 * float(wanted.abs().max()) * abs(multiple)).any())
