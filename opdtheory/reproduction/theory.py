r"""What theory says of an arm before it runs: its weight, whether that of a divergence, and which objective falls.

By T4 an estimator with the local weight $w$ follows the exact gradient of $D_V$, where
$V(u) = u \int_1^u w(t)/t^2\,\mathrm{d}t$, a genuine f-divergence if and only if $w$ never falls. With $s = \log u$

$$D_V(q\|p) = \sum_a q_a G(\log u_a), \qquad G(t) = \int_0^t (w(s) - w(0))\,e^{-s}\,\mathrm{d}s.$$
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.training.config import TrainConfig
from opdtheory.training.validation.prediction import ratio_weight

__all__ = ["Reading", "local_weight", "objective_value", "reading"]

_FARTHEST = 45.0  # log-ratios are clamped to this
_CELLS = 2**17
_SHOWN = 6.0  # the range on which weights without a clip are read
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Reading:
    r"""The weight of an arm, read by T4 and T5.

    Attributes:
        kind: `ratio` for a weight that is a function of the ratio, `zero` for a constant, `supervised` for
            demonstrations.
        bound: largest $|\log u|$ at which the weight was read: the clip, if there is one.
        falls: the interval of $\log u$ in which the weight falls; None if it never falls.
        slope: $w'(1)$, whose sign says whether the teacher attracts or repels (T5); infinite for a step.
    """

    kind: Literal["ratio", "zero", "supervised"]
    bound: float = 0.0
    falls: tuple[float, float] | None = None
    slope: float = 0.0

    @property
    def descends(self) -> bool | None:
        """Whether the arm descends an f-divergence; None where the weight does not say."""
        return None if self.kind != "ratio" else self.falls is None

    def __str__(self) -> str:
        if self.kind == "zero":
            return "the expected gradient is zero (T4)"
        if self.kind == "supervised":
            return "cross-entropy of the task's demonstrations; no teacher"
        at = {1: "attracts", 0: "neither attracts nor repels to first order", -1: "repels"}[_sign(self.slope)]
        if self.falls is None:
            return f"the weight never falls: it descends an f-divergence (T4); the teacher {at} (T5)"
        low, high = (round(x, 1) + 0.0 for x in self.falls)  # no minus before zero
        where = f"for log u > {low:.1f}" if high == round(self.bound, 1) else f"for log u in [{low:.1f}, {high:.1f}]"
        return f"the weight falls {where}: no f-divergence (T4); the teacher {at} (T5)"


def local_weight(config: TrainConfig, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | None:
    """The weight of a token in the arm's expected gradient, clip included; None for demonstrations."""
    if config.control == "supervised":
        return None
    if config.control == "constant_advantage":
        return torch.zeros_like(log_u)
    loss = config.loss()
    if config.control == "exact_opd":
        return ratio_weight("opd", {"clip_log_ratio": config.clip_log_ratio}, loss.claim.divergence, log_u)
    return ratio_weight(loss.name, loss.settings, loss.claim.divergence, log_u)


def reading(config: TrainConfig) -> Reading:
    """Read the weight of a configuration on the log-ratios that its clip leaves, or up to six nats."""
    if config.control in ("constant_advantage", "supervised"):
        return Reading("supervised" if config.control == "supervised" else "zero")
    bound = config.clip_log_ratio or _SHOWN
    log_u = torch.linspace(-bound, bound, 2401, dtype=torch.float64)
    weight = local_weight(config, log_u)
    assert weight is not None
    steps = weight.diff()
    falling = steps < -_ROUNDING * weight.abs().max()
    falls = None
    if bool(falling.any()):
        places = falling.nonzero().flatten()
        falls = (float(log_u[places[0]]), float(log_u[places[-1] + 1]))
    middle = len(log_u) // 2
    ends = log_u.new_tensor([-1e-4, 1e-4])
    near = local_weight(config, ends)
    assert near is not None
    slope = float(near[1] - near[0]) / 2e-4
    jumps = float(steps[middle - 1 : middle + 1].sum()) > 0.5 and slope > 1e3
    return Reading("ratio", bound, falls, math.inf if jumps else slope)


def objective_value(config: TrainConfig, log_p: Float[Tensor, "N V"], log_q: Float[Tensor, "N V"]) -> float | None:
    r"""The mean over prefixes of $D_V$, whose exact gradient the arm follows in expectation (T4), in its units.

    Args:
        config: the arm's configuration.
        log_p: the student's log-probabilities at its own prefixes, float64.
        log_q: the teacher's.
    """
    grid = torch.linspace(-_FARTHEST, _FARTHEST, _CELLS + 1, dtype=torch.float64)
    weight = local_weight(config, grid)
    if weight is None:
        return None
    middle = _CELLS // 2
    integrand = (weight - weight[middle]) * torch.exp(-grid)
    width = float(grid[1] - grid[0])
    cells = (integrand[1:] + integrand[:-1]) * (width / 2)
    # Summed from the middle outwards: a sum from one end would cancel at the other.
    below, above = cells[:middle].flip(0).cumsum(0).flip(0), cells[middle:].cumsum(0)
    inner = torch.cat((-below, cells.new_zeros(1), above))
    log_u = (log_q - log_p).clamp(-_FARTHEST, _FARTHEST)
    place = ((log_u + _FARTHEST) / width).clamp(0, _CELLS - 1e-6)
    cell = place.floor().long()
    share = place - cell
    values = inner[cell] * (1 - share) + inner[cell + 1] * share
    terms = torch.where(log_q > -math.inf, log_q.exp() * values, 0.0)
    return float(terms.sum(-1).mean())


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-3 else 1 if value > 0 else -1
