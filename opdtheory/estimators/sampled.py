r"""Losses of the sampled token: an advantage times the score, or a differentiated function of the log-ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import Baseline, Importance
from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import baselines, offpolicy
from opdtheory.estimators.base import unmasked
from opdtheory.rollouts import Rollouts

__all__ = [
    "Advantage",
    "Baseline",
    "Differentiated",
    "LogRatioFunction",
    "PPO_RANGE",
    "PowerAdvantage",
    "RatioAdvantage",
    "ReturnToGo",
    "ScoreFunction",
    "SequenceWeight",
    "TokenAdvantage",
    "BoxCox",
    "CentredWeight",
    "k1",
    "k1_reward",
    "k2",
    "k2_reward",
    "k3",
    "k3_reward",
    "StopGradientReward",
]

# PPO's clip range, unless told otherwise.
PPO_RANGE = 0.2

LogRatioFunction = Callable[[Tensor], Tensor]
Advantage = Callable[[Rollouts], Tensor]


def k1(log_u: Tensor) -> Tensor:
    r"""Schulman's $k_1 = -\log u$, in nats."""
    return -log_u


def k2(log_u: Tensor) -> Tensor:
    r"""Schulman's $k_2 = \frac12 \log^2 u$, in nats squared."""
    return 0.5 * log_u.square()


def k3(log_u: Tensor) -> Tensor:
    r"""Schulman's $k_3 = u - 1 - \log u$, without cancellation near $u = 1$."""
    return torch.expm1(log_u) - log_u


def k1_reward(log_u: Tensor) -> Tensor:
    r"""The advantage $-k_1 = \log u$: exact for the reverse KL (T4)."""
    return log_u


def k2_reward(log_u: Tensor) -> Tensor:
    r"""The advantage $-k_2 = -\frac12 \log^2 u$: not monotone, so it follows no f-divergence (T4)."""
    return -k2(log_u)


def k3_reward(log_u: Tensor) -> Tensor:
    r"""The advantage $-k_3 = \log u - u + 1$: reverse KL minus forward KL (T4)."""
    return -k3(log_u)


@dataclass(frozen=True)
class StopGradientReward:
    r"""The advantage $-f(u)$ of plain OPD, whose gradient omits the ratio's own dependence on $p$ (T2)."""

    divergence: Divergence

    def __call__(self, log_u: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return -self.divergence.generator(log_u)


@dataclass(frozen=True)
class CentredWeight:
    r"""The advantage $w_f(u) - w_f(1)$: OPD+ in the gauge $f'(1) = 0$ (T7a)."""

    divergence: Divergence

    def __call__(self, log_u: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return self.divergence.weight(log_u) - self.divergence.weight(torch.zeros_like(log_u))


@dataclass(frozen=True)
class BoxCox:
    r"""The advantage $(u^\alpha - 1)/\alpha$, $\log u$ at $\alpha = 0$: the weight of the alpha divergence (T4)."""

    alpha: float

    def __call__(self, log_u: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return log_u if self.alpha == 0 else torch.expm1(self.alpha * log_u) / self.alpha


@runtime_checkable
class TokenAdvantage(Protocol):
    """An advantage of the two probabilities of one token, which therefore extends to the vocabulary."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """The advantage of each sampled token, `(B, T)`."""
        ...

    def at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The advantage of a token with these log-probabilities, elementwise."""
        ...


@dataclass(frozen=True)
class RatioAdvantage:
    r"""The advantage $A_n = a(\mathrm{clamp}(\log u_n, -C, C))$, a function of the ratio only."""

    function: LogRatioFunction
    clip_log_ratio: float | None = None

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The advantage of each sampled token."""
        return self.of_log_u(_log_u(rollouts))

    def at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The advantage of a token with these log-probabilities, elementwise."""
        return self.of_log_u(log_q - log_p)

    def of_log_u(self, log_u: Tensor) -> Tensor:
        """The advantage as a function of the log-ratio, elementwise."""
        return self.function(_clip(log_u, self.clip_log_ratio))


@dataclass(frozen=True)
class PowerAdvantage:
    r"""PowerOPD's advantage $A_n = q(y_n|h_n)^\alpha - p(y_n|h_n)^\alpha$, of probabilities (2606.17199).

    Its expected gradient is that of the Bregman (density-power) divergence of T4, not of an f-divergence.
    """

    alpha: float

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The advantage of each sampled token."""
        return self.at(unmasked(rollouts, rollouts.student_logprobs), unmasked(rollouts, rollouts.teacher_logprobs))

    def at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The advantage of a token with these log-probabilities, elementwise."""
        return torch.exp(self.alpha * log_q) - torch.exp(self.alpha * log_p)


@dataclass(frozen=True)
class ReturnToGo:
    r"""The weight of the next token and the discounted penalties after it (T6a).

    $$A_n = w_f(u_n) - \sum_{m>n} \gamma^{m-n} f(u_m)$$

    The sum is over unmasked later tokens, and distances count columns. `discounted` multiplies it by $\gamma^{n-1}$,
    which makes it exact for `token_return`; without it, for $0<\gamma<1$, it is the gradient of no objective.
    """

    divergence: Divergence
    gamma: float
    discounted: bool = False
    clip_log_ratio: float | None = None

    @property
    def looks_ahead(self) -> bool:
        """Whether later tokens enter the weight."""
        return self.gamma > 0

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The advantage of each sampled token."""
        log_u = _clip(_log_u(rollouts), self.clip_log_ratio)
        weight = self.divergence.weight(log_u)
        if self.gamma == 0 and not self.discounted:
            return weight
        advantages = weight - self._penalties_to_come(unmasked(rollouts, self.divergence.generator(log_u)))
        if self.discounted:
            steps = torch.arange(log_u.shape[-1], dtype=log_u.dtype, device=log_u.device)
            advantages = offpolicy.weighted(advantages, (self.gamma**steps).expand_as(advantages))
        return advantages

    def _penalties_to_come(self, penalties: Tensor) -> Tensor:
        if self.gamma == 0:
            return torch.zeros_like(penalties)
        to_come = [torch.zeros_like(penalties[:, 0])]
        for penalty in reversed(penalties[:, 1:].unbind(-1)):
            to_come.append(self.gamma * (penalty + to_come[-1]))
        return torch.stack(to_come[::-1], dim=-1)


@dataclass(frozen=True)
class SequenceWeight:
    r"""The weight of the whole rollout, $A_n = w_f(U)$ with $U = \prod_m u_m$, on every token (T6a)."""

    divergence: Divergence
    clip_log_ratio: float | None = None
    looks_ahead: ClassVar[bool] = True

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The advantage of each sampled token, one value per rollout."""
        log_u = _clip(_log_u(rollouts), self.clip_log_ratio)
        return self.divergence.weight(log_u.sum(-1, keepdim=True)).expand_as(log_u)


@dataclass(frozen=True)
class ScoreFunction:
    r"""The score-function loss of each token, $\ell_n = -\rho_n\, \mathrm{sg}(A_n - b_n) \log p(y_n|h_n)$.

    Tokens of student probability zero add nothing. The order of the steps is: advantage, clamp to `clip_weight`,
    baseline, z-score, importance weight.

    Raises:
        InvalidArgumentError: called with one rollout and a group baseline or a z-score.
    """

    advantage: Advantage
    clip_weight: tuple[float, float] | None = None
    baseline: Baseline | None = None
    baseline_value: float = 0.0
    zscore: bool = False
    eps: float = 1e-6
    importance: Importance | None = None
    clip_range: float | None = None
    keep_range: tuple[float, float] = offpolicy.KEEP_RANGE

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The surrogate loss of each token; zero, with zero gradient, at masked positions."""
        advantages = self.advantages(rollouts)
        if self.importance == "ppo":
            return offpolicy.ppo_surrogate(advantages, rollouts, self.ppo_range)
        if self.importance is not None:
            advantages = offpolicy.weighted(advantages, _importance(self, rollouts))
        log_p = rollouts.student_logprobs
        return -advantages * torch.where(_possible(rollouts), log_p, torch.zeros_like(log_p))

    @property
    def ppo_range(self) -> float:
        """The clip range of `ppo`."""
        return PPO_RANGE if self.clip_range is None else self.clip_range

    @torch.no_grad()
    def advantages(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The detached advantages after clamp, baseline and z-score, without importance weights; zero where masked."""
        advantages = self._clamped(self.advantage(rollouts))
        if self.zscore or self.baseline in ("group_mean", "leave_one_out"):
            self._check_group(rollouts)
        if self.zscore:
            return baselines.z_score(advantages, rollouts, self.eps)
        if self.baseline == "constant":
            advantages = advantages - self.baseline_value
        elif self.baseline == "group_mean":
            advantages = advantages - baselines.group_mean(advantages, rollouts)
        elif self.baseline == "leave_one_out":
            advantages = advantages - baselines.leave_one_out(advantages, rollouts)
        elif self.baseline == "vocabulary":
            advantages = advantages - baselines.vocabulary_mean(self._clamped_at, rollouts)
        elif self.baseline == "optimal":
            advantages = advantages - baselines.optimal(self._clamped_at, rollouts)
        return unmasked(rollouts, advantages)

    def _clamped(self, advantages: Tensor) -> Tensor:
        return advantages if self.clip_weight is None else advantages.clamp(*self.clip_weight)

    def _clamped_at(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if not isinstance(self.advantage, TokenAdvantage):
            raise InvalidArgumentError(
                "baseline", f"{self.baseline!r} needs an advantage that depends on one token only"
            )
        return self._clamped(self.advantage.at(log_p, log_q))

    def _check_group(self, rollouts: Rollouts) -> None:
        if rollouts.tokens.shape[0] < 2:
            argument, value = ("zscore", True) if self.zscore else ("baseline", self.baseline)
            raise InvalidArgumentError(argument, f"{value!r} needs at least 2 rollouts in the batch, got 1")


@dataclass(frozen=True)
class Differentiated:
    r"""The loss of each token $\ell_n = \rho_n\, \kappa(\log u_n)$, differentiated in the student's log-probability.

    Its local weight is $\kappa'$ (T4). Outside `clip_log_ratio` there is no gradient.
    """

    function: LogRatioFunction
    clip_log_ratio: float | None = None
    importance: Importance | None = None
    clip_range: float | None = None
    keep_range: tuple[float, float] = offpolicy.KEEP_RANGE

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The loss of each token; its gradient at masked positions is exactly zero."""
        values = self.function(_clip(_log_u(rollouts), self.clip_log_ratio))
        if self.importance is None:
            return values
        return offpolicy.weighted(values, _importance(self, rollouts))


def _importance(loss: ScoreFunction | Differentiated, rollouts: Rollouts) -> Tensor:
    assert loss.importance is not None
    cap = offpolicy.CAP if loss.clip_range is None else loss.clip_range
    return offpolicy.importance_weight(rollouts, loss.importance, cap, loss.keep_range)


def _possible(rollouts: Rollouts) -> Tensor:
    """Whether a token counts: it is unmasked, and the student can write it (off-policy, log p may be -inf)."""
    return (rollouts.mask > 0) & (rollouts.student_logprobs > -torch.inf)


def _log_u(rollouts: Rollouts) -> Tensor:
    possible = _possible(rollouts)
    zero = torch.zeros_like(rollouts.student_logprobs)
    log_q = torch.where(possible, rollouts.teacher_logprobs.detach(), zero)
    return log_q - torch.where(possible, rollouts.student_logprobs, zero)


def _clip(log_u: Tensor, bound: float | None) -> Tensor:
    return log_u if bound is None else log_u.clamp(-bound, bound)
