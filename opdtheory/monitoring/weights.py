r"""The weight that an estimator gives a sampled token, as a function of $\log u$ alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.estimators.sampled import Differentiated, RatioAdvantage, ScoreFunction
from opdtheory.estimators.vocabulary import SampledTail, VocabularyLoss
from opdtheory.monitoring.sums import WIDTH

__all__ = ["Weight", "weight_of"]

# Half the distance over which a slope is measured, in nats.
_STEP = 1e-4

# A difference over that distance is right to about its square.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Weight:
    r"""The advantage $A(\log u)$ of a sampled token, before any baseline: the local weight of T4.

    Attributes:
        name: of the estimator.
        function: of $\log u$, elementwise.
        clip: the bound on $|\log u|$, in nats; None if there is none.
        drops: whether tokens beyond that bound weigh nothing, as a clip within a differentiated loss makes it; else
            they weigh what the bound does.
        bounds: the interval to which the advantage is clamped; None if it is not.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    clip: float | None = None
    drops: bool = False
    bounds: tuple[float, float] | None = None

    def __call__(self, log_u: Float[Tensor, " X"]) -> Float[Tensor, " X"]:
        """The advantage after the clips."""
        advantage = self._within(log_u)
        return advantage if self.bounds is None else advantage.clamp(*self.bounds)

    def unclipped(self, log_u: Float[Tensor, " X"]) -> Float[Tensor, " X"]:
        """The advantage without the clips."""
        return self.function(log_u)

    def is_clipped(self, log_u: Float[Tensor, " X"]) -> Bool[Tensor, " X"]:
        """Where a clip changes the advantage."""
        hit = torch.zeros_like(log_u, dtype=torch.bool) if self.clip is None else log_u.abs() > self.clip
        if self.bounds is not None:
            low, high = self.bounds
            advantage = self._within(log_u)
            hit = hit | (advantage < low) | (advantage > high)
        return hit

    def slope(self, log_u: Float[Tensor, " X"]) -> Float[Tensor, " X"]:
        r"""$dA/d\log u$; zero where a clip holds it, and a drop counts in the one bin that holds it."""
        step = WIDTH / 2 if self.drops else _STEP
        return (self(log_u + step) - self(log_u - step)) / (2 * step)

    def _within(self, log_u: Tensor) -> Tensor:
        if self.clip is None:
            return self.function(log_u)
        held = self.function(log_u.clamp(-self.clip, self.clip))
        return torch.where(log_u.abs() > self.clip, 0.0, held) if self.drops else held

    def at_teacher(self) -> tuple[float, float]:
        r"""$A$ and $dA/d\log u$ at $u = 1$ (T5)."""
        zero = torch.zeros(1, dtype=torch.float64)
        at_one, pull = float(self(zero)), float(self.slope(zero))
        return at_one, pull if abs(pull) > _NOTHING else 0.0


def weight_of(loss: Estimator) -> Weight:
    """The weight of an estimator of the library.

    A loss of the whole vocabulary, or of the top tokens with a sampled tail, gives every token the weight of its
    divergence (T12, T13).

    Raises:
        InvalidArgumentError: its advantage is no function of the token's own ratio.
    """
    rule = loss.token_loss
    if isinstance(rule, ScoreFunction) and isinstance(rule.advantage, RatioAdvantage):
        advantage = rule.advantage
        return Weight(loss.label, advantage.function, advantage.clip_log_ratio, bounds=rule.clip_weight)
    if isinstance(rule, Differentiated):
        return Weight(
            loss.label, _derivative(rule.function), rule.clip_log_ratio, drops=rule.clip_log_ratio is not None
        )
    if isinstance(rule, SampledTail) or (isinstance(rule, VocabularyLoss) and rule.top is None):
        return Weight(loss.label, rule.divergence.weight)
    raise InvalidArgumentError(
        "estimator", f"must weigh a token by its own ratio to be read from logged log-probabilities, got {loss.label}"
    )


def _derivative(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The derivative in the student's log-probability, with its sign changed: what multiplies the score (T4)."""

    def slope(log_u: Tensor) -> Tensor:
        with torch.enable_grad():
            x = log_u.detach().clone().requires_grad_()
            (found,) = torch.autograd.grad(function(x).sum(), x)
        return found.detach()

    return slope
