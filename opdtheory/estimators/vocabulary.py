r"""Losses of the whole next-token distribution, of its k likeliest tokens, and of these and a sampled one (T9-T13)."""

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
from opdtheory.divergences.rest import rest_weight
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import offpolicy
from opdtheory.estimators.base import teacher_distribution, unmasked
from opdtheory.rollouts import Rollouts

__all__ = ["SampledTail", "Support", "TopK", "TopKReward", "VocabularyLoss", "perspective"]

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
        chosen = _likeliest(log_p, log_q, self.k, self.support)
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
        log_q = torch.log_softmax(teacher_distribution(rollouts, "this divergence").double(), dim=-1)
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


@dataclass(frozen=True)
class SampledTail:
    r"""The terms of the `k` likeliest tokens S, and the sampled token where it is not one of them (T13).

    $$\ell_n = \sum_{a\in S} p_a f(q_a/p_a) + c\,p(S) - 1[y_n\notin S]\,\mathrm{sg}(w_f(u_n) - c)\log p(y_n|h_n)$$

    Its expected gradient is that of $D_f$ for every f, S and c. It needs the teacher's log-probabilities of S and of
    the sampled token, as in `Rollouts.from_payload`. So does `baseline="rest"`, $c = w_f(q(T)/p(T))$ with T the other
    tokens, which leaves no variance where their ratios are alike (T19b); `baseline="optimal"` takes the whole
    distributions for the c of least variance given the history. Off-policy, `importance="token"` weights the sampled
    token by its own $\rho_n$, and `prefix` weights the history too.
    """

    divergence: Divergence
    k: int
    support: Support = "teacher"
    baseline: Literal["constant", "optimal", "rest"] | None = None
    baseline_value: float = 0.0
    importance: Literal["token", "prefix"] | None = None

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The loss of each token; its gradient at masked positions is exactly zero."""
        log_p = torch.log_softmax(unmasked(rollouts, rollouts.student_logits).double(), dim=-1)
        chosen, kept_q, best = self._known(rollouts, log_p.detach())
        kept_p = log_p.gather(-1, chosen)
        constant = self._constant(kept_p.detach(), kept_q) if best is None else best
        on_set = perspective(self.divergence, kept_p, kept_q).sum(-1) + constant * kept_p.exp().sum(-1)
        drawn = rollouts.tokens.clamp(0, log_p.shape[-1] - 1).unsqueeze(-1)
        outside = ~(chosen == drawn).any(-1) & (rollouts.mask > 0)
        # The sampled token's own log-probabilities, as a teacher server sends them beside those of S.
        outside = outside & (rollouts.student_logprobs > -torch.inf)
        ours, theirs = (
            torch.where(outside, x, 0.0).double() for x in (rollouts.student_logprobs, rollouts.teacher_logprobs)
        )
        weight = self.divergence.weight(theirs.detach() - ours.detach()) - constant
        if self.importance is not None:
            if self.importance == "prefix":
                on_set = offpolicy.weighted(on_set, offpolicy.prefix_weight(rollouts).double())
            weight = offpolicy.weighted(weight, offpolicy.importance_weight(rollouts, self.importance).double())
        tail = torch.where(outside, weight.detach() * ours, 0.0)
        return unmasked(rollouts, on_set - tail).to(rollouts.student_logits.dtype)

    def _known(self, rollouts: Rollouts, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens S, the teacher's log-probabilities of them, and the constant if it takes whole distributions."""
        if rollouts.payload is not None and self.support == "teacher" and self.baseline != "optimal":
            chosen, kept_q = rollouts.teacher_top_k(self.k)
            return chosen, unmasked(rollouts, kept_q).double(), None
        what = "a baseline of least variance" if self.support == "teacher" else "the student's likeliest tokens"
        log_q = torch.log_softmax(teacher_distribution(rollouts, what).double(), dim=-1)
        chosen = _likeliest(log_p, log_q, self.k, self.support)
        best = self._optimal(log_p, log_q, chosen) if self.baseline == "optimal" else None
        return chosen, log_q.gather(-1, chosen), best

    def _constant(self, kept_p: Tensor, kept_q: Tensor) -> Tensor | float:
        """The constant that the probabilities of S suffice for."""
        if self.baseline == "rest":
            return rest_weight(self.divergence, kept_p, kept_q)
        return self.baseline_value if self.baseline == "constant" else 0.0

    def _optimal(self, log_p: Tensor, log_q: Tensor, chosen: Tensor) -> Tensor:
        """The constant c of least variance, a number for each history, `(B, T)`."""
        rest = torch.ones_like(log_p).scatter(-1, chosen, 0.0)
        usable = (rest > 0) & (log_p > math.log(torch.finfo(log_p.dtype).tiny))
        zero = torch.zeros_like(log_p)
        weight = self.divergence.weight(torch.where(usable, log_q, zero) - torch.where(usable, log_p, zero))
        usable = usable & torch.isfinite(weight)
        p, weight = log_p.exp(), torch.where(usable, weight, zero)
        drawn = torch.where(usable, p, zero)
        square = p.square().sum(-1)
        mass, pull = drawn.sum(-1), (drawn * weight).sum(-1)
        second, pulled = drawn.square().sum(-1), (drawn.square() * weight).sum(-1)
        # E_T[|s|^2] - |E_T[s]|^2 and E_T[w |s|^2] - E_T[w s] E_T[s], with s_a = e_a - p.
        bottom = mass * (1 + square) - 2 * second - (second * (1 - 2 * mass) + mass.square() * square)
        top = pull * (1 + square) - 2 * pulled - (pulled * (1 - mass) - pull * second + pull * mass * square)
        return torch.where(bottom > torch.finfo(p.dtype).tiny, top / bottom, 0.0)


def _likeliest(log_p: Tensor, log_q: Tensor, k: int, support: Support) -> Tensor:
    """The `k` likeliest tokens of the teacher or the student, all if there are fewer; `(..., k)`."""
    return (log_q if support == "teacher" else log_p.detach()).topk(min(k, log_p.shape[-1]), dim=-1).indices


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
