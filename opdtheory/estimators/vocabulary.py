r"""Losses of the whole next-token distribution, and of its k likeliest tokens (T9, T10, T12)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import Support
from opdtheory.divergences import Divergence
from opdtheory.divergences.divergence import transforms_active
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import offpolicy
from opdtheory.estimators.base import unmasked
from opdtheory.rollouts import Rollouts

__all__ = ["Support", "TopK", "TopKReward", "VocabularyLoss", "perspective"]

_FARTHEST_LOG_U = 300.0  # beyond, p may underflow
_LARGEST_LOG_U = 700.0  # beyond, u itself overflows


def perspective(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""The term $p f(q/p)$ of each token, differentiable in `log_p`, with T10's conventions at zero probability.

    $p = 0 < q$ gives $f'(\infty)\, q$, $p > 0 = q$ gives $p f(0)$, and both zero give 0. An infinite term has the value
    inf and no gradient, and so has one whose $f(u)$ overflows, beyond $u = 10^{154}$ for $\chi^2$. If $u$ is so large
    that $p$ may underflow, the term is computed as $q \cdot f(u)/u$. Narrow dtypes are evaluated in float64 and rounded
    once: $f(u)$ may overflow float16 where $p f(u)$ does not.

    Args:
        divergence: the generator $f$.
        log_p: the student's log-probabilities, any shape, `-inf` allowed.
        log_q: the teacher's, of the same shape.
    """
    dtype, log_p, log_q = log_p.dtype, log_p.double(), log_q.double()
    if not transforms_active() and _is_plain(log_p.detach(), log_q.detach()):
        return (log_p.exp() * divergence.generator(log_q - log_p)).to(dtype)
    in_p, in_q = log_p > -torch.inf, log_q > -torch.inf
    both = in_p & in_q
    zero = torch.zeros_like(log_p)
    log_u = torch.where(both, log_q, zero) - torch.where(both, log_p, zero)
    far = log_u > _FARTHEST_LOG_U
    terms = torch.where(both, log_p, zero).exp() * divergence.generator(torch.where(far, zero, log_u))
    if transforms_active():
        # Under vmap no branch may depend on values.
        beyond = _generator_over_u(divergence, torch.where(far, log_u, _FARTHEST_LOG_U))
        terms = torch.where(far, beyond * torch.where(far, log_q, zero).exp(), terms)
    elif bool(far.any()):
        terms = terms.masked_scatter(far, _generator_over_u(divergence, log_u[far]) * log_q[far].exp())
    terms = torch.where(both, terms, zero)
    terms = terms + _boundary(in_p & ~in_q, log_p, divergence.at_zero)
    terms = terms + _boundary(in_q & ~in_p, log_q, divergence.slope_at_infinity)
    return terms.to(dtype)


def _is_plain(log_p: Tensor, log_q: Tensor) -> bool:
    """Whether no probability is zero and no ratio is far from one, the usual case."""
    return log_p.numel() > 0 and float((log_q - log_p).abs().max()) < _FARTHEST_LOG_U


@dataclass(frozen=True)
class TopK:
    r"""The divergence on the `k` likeliest tokens $S$ of the teacher or the student, with $S$ held fixed (T9).

    `truncated`: $\sum_S p f(q/p)$; `renormalised`: $D_f$ of the two distributions conditioned on $S$; `tail`: $D_f$ of
    the two distributions on $S$ and one bucket for the rest. `k` of the vocabulary's size or more gives the whole
    divergence.
    """

    k: int
    form: Literal["truncated", "renormalised", "tail"]
    support: Support = "teacher"

    def coarse(self, log_p: Float[Tensor, "B T V"], log_q: Float[Tensor, "B T V"]) -> tuple[Tensor, Tensor]:
        """The log-probabilities that enter the divergence, each `(B, T, K)`."""
        if self.k >= log_p.shape[-1]:
            return log_p, log_q
        chosen = (log_q if self.support == "teacher" else log_p.detach()).topk(self.k, dim=-1).indices
        return self._on(chosen, log_p, "student"), self._on(chosen, log_q, "teacher")

    def _on(self, chosen: Tensor, log_p: Tensor, whose: str) -> Tensor:
        kept = log_p.gather(-1, chosen)
        if self.form == "truncated":
            return kept
        if self.form == "tail":
            rest = log_p.scatter(-1, chosen, -torch.inf)
            return torch.cat([kept, _log_sum_exp(rest)], dim=-1)
        # Under vmap values cannot be inspected: such a row becomes NaN, which `rollout_gradients` refuses.
        if not transforms_active() and bool((kept == -torch.inf).all(-1).any()):
            raise InvalidArgumentError(
                "support", f"must hold a token that the {whose} can write, got {self.k} of probability zero"
            )
        return torch.log_softmax(kept, dim=-1)


@dataclass(frozen=True)
class VocabularyLoss:
    r"""The loss $\ell_n = \sum_a p(a|h_n) f(q(a|h_n)/p(a|h_n))$ of each history, by autograd (T12).

    The value is $D_f$ at the sampled history, in nats; it is infinite if the true one is (see `perspective`). With
    `importance="prefix"` it is weighted by $\prod_{m<n} p/\mu$, which makes the sum over histories exact off-policy.
    Logits of a narrow dtype are converted to float64 first, and the value of a history is rounded once: in bfloat16, a
    log-probability of -20 is off by 6 %, and so would be the term of its token.
    """

    divergence: Divergence
    top: TopK | None = None
    importance: Literal["prefix"] | None = None

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The divergence at each history; its gradient at masked positions is exactly zero."""
        log_p = torch.log_softmax(unmasked(rollouts, rollouts.student_logits).double(), dim=-1)
        log_q = torch.log_softmax(unmasked(rollouts, rollouts.teacher_logits.detach()).double(), dim=-1)
        if self.top is not None:
            log_p, log_q = self.top.coarse(log_p, log_q)
        values = perspective(self.divergence, log_p, log_q).sum(-1).to(rollouts.student_logits.dtype)
        return values if self.importance is None else offpolicy.weighted(values, offpolicy.prefix_weight(rollouts))


@dataclass(frozen=True)
class TopKReward:
    r"""The advantage $A_n = -D_{\mathrm{top}\,k}(h_n)$, the same for every token: zero expected gradient (T9e)."""

    divergence: Divergence
    top: TopK

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The advantage of each sampled token."""
        return -VocabularyLoss(self.divergence, self.top)(rollouts)


def _generator_over_u(divergence: Divergence, log_u: Tensor) -> Tensor:
    """f(u)/u, continued linearly in log u where u overflows (exact for the forward KL); inf where f(u) overflows."""
    near = log_u.clamp(max=_LARGEST_LOG_U)
    overflows = torch.isinf(divergence.generator(near).detach())
    near = torch.where(overflows, 0.0, near)
    slope = (divergence.weight(near) * torch.exp(-near)).detach()
    ratio = divergence.generator(near) * torch.exp(-near) + slope * (torch.where(overflows, 0.0, log_u) - near)
    return ratio.masked_fill(overflows, torch.inf)


def _boundary(where: Tensor, log_mass: Tensor, limit: float) -> Tensor:
    mass = torch.where(where, log_mass, torch.full_like(log_mass, -torch.inf)).exp()
    # 0 * inf must be 0, and an infinite term has no gradient.
    return mass * limit if math.isfinite(limit) else torch.zeros_like(mass).masked_fill(where, limit)


def _log_sum_exp(log_p: Tensor) -> Tensor:
    """The log-sum-exp over the last axis, kept; -inf with zero gradient, not NaN, where every entry is -inf."""
    empty = (log_p == -torch.inf).all(-1, keepdim=True)
    total = torch.logsumexp(torch.where(empty, torch.zeros_like(log_p), log_p), dim=-1, keepdim=True)
    return total.masked_fill(empty, -torch.inf)
