r"""An estimator's own code, run on every next token of a prefix: exact moments over the vocabulary.

The loss is a black box of `Rollouts`. Its sensitivity $\kappa_a = \partial\,\mathrm{loss}/\partial \log p(a|h)$ at
token $a$ gives the gradient $\kappa_a (e_a - p)$ in the prefix's logits. The sum over the vocabulary gives mean and
variance without sampling, so they include the heavy tails of forward-KL and chi-squared weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.rollouts import Rollouts

__all__ = ["Both", "Known", "Loss", "Moments", "Pairs", "Singles", "Some", "moments", "reads_rows", "sensitivity"]

Loss = Callable[[Rollouts], Tensor]

# Two gradients in the logits that differ by rounding.
_SAME = 1e-9

# Numbers in the rows that a loss gets at a time, if it reads them.
_HELD = 2**24


@runtime_checkable
class Moments(Protocol):
    """The distribution of an estimator's gradient at each of N prefixes, in the logits of the next token."""

    def mean(self) -> Float[Tensor, "N V"]:
        """The expected gradient in the logits."""

    def variance(self, along: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """The variance of the gradient's product with a direction in the logits of each prefix."""


@dataclass(frozen=True)
class Known:
    """A gradient that depends on the prefix alone, with no variance over the next token (T7c)."""

    gradient: Float[Tensor, "N V"]

    def mean(self) -> Float[Tensor, "N V"]:
        """The gradient itself."""
        return self.gradient

    def variance(self, along: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """Zero."""
        return torch.zeros_like(along[:, 0])


@dataclass(frozen=True)
class Singles:
    """One token at a time, sampled from `mu`.

    Attributes:
        p: the student's probabilities, `(N, V)`.
        mu: probabilities of the sampling policy.
        kappa: the sensitivity to each token's log-probability.
    """

    p: Float[Tensor, "N V"]
    mu: Float[Tensor, "N V"]
    kappa: Float[Tensor, "N V"]

    def mean(self) -> Float[Tensor, "N V"]:
        """As `Moments.mean`."""
        return _scores(self.mu * self.kappa, self.p)

    def variance(self, along: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """As `Moments.variance`."""
        products = self.kappa * _centred(along, self.p)
        mean = (self.mu * products).sum(-1, keepdim=True)
        return (self.mu * (products - mean).square()).sum(-1)


@dataclass(frozen=True)
class Both:
    """A gradient of the prefix alone, and beside it that of one sampled token (T13)."""

    known: Known
    singles: Singles

    def mean(self) -> Float[Tensor, "N V"]:
        """As `Moments.mean`."""
        return self.known.mean() + self.singles.mean()

    def variance(self, along: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """As `Moments.variance`."""
        return self.singles.variance(along)


@dataclass(frozen=True)
class Pairs:
    """Groups of two tokens at one prefix, over which the estimator averages.

    Attributes:
        p: the student's probabilities, `(N, V)`.
        first: sensitivity to the first token for each second one, `(N, V, V)`.
        second: sensitivity to the second token.
    """

    p: Float[Tensor, "N V"]
    first: Float[Tensor, "N V V"]
    second: Float[Tensor, "N V V"]

    def mean(self) -> Float[Tensor, "N V"]:
        """As `Moments.mean`."""
        beside = torch.einsum("nab,nb->na", self.first, self.p) + torch.einsum("nab,na->nb", self.second, self.p)
        return _scores(self.p * beside / 2, self.p)

    def variance(self, along: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """As `Moments.variance`."""
        centred = _centred(along, self.p)
        products = (self.first * centred.unsqueeze(-1) + self.second * centred.unsqueeze(-2)) / 2
        distribution = self.p.unsqueeze(-1) * self.p.unsqueeze(-2)
        mean = (distribution * products).sum((-1, -2), keepdim=True)
        return (distribution * (products - mean).square()).sum((-1, -2))


@dataclass(frozen=True)
class Some:
    """The next tokens that a loss is run on, if these are not all.

    Attributes:
        tokens: tokens of each prefix, in any number, `(N, M)`.
        otherwise: the sensitivity to each token that theory states, taken for the tokens that are not run, `(N, V)`.
    """

    tokens: Int64[Tensor, "N M"]
    otherwise: Float[Tensor, "N V"]

    def mass(self, log_mu: Float[Tensor, "N V"]) -> float:
        """The mean probability of these tokens."""
        met = torch.zeros_like(log_mu).scatter(-1, self.tokens, 1.0)
        return float((log_mu.exp() * met).sum(-1).mean())


def moments(
    loss: Loss,
    log_p: Float[Tensor, "N V"],
    log_q: Float[Tensor, "N V"],
    log_mu: Float[Tensor, "N V"],
    group: int = 1,
    some: Some | None = None,
) -> Moments:
    """The moments of a loss that sums over tokens and averages over rollouts, at each prefix.

    Args:
        loss: a loss of `Rollouts`; it gets one prefix at a time with every next token, or every pair of them.
        log_p: log-probabilities of the student, float64.
        log_q: log-probabilities of the teacher.
        log_mu: log-probabilities of the sampling policy.
        group: 1, or 2 for a loss that compares the rollouts of a group.
        some: the tokens that the loss is run on (default: every token).

    Raises:
        InvalidArgumentError: `group` is neither 1 nor 2.
        LossError: the loss uses neither the logits nor the sampled token's log-probability, or both in a group, or its
            gradient in the logits depends on the token.
    """
    if group not in (1, 2):
        raise InvalidArgumentError("group", f"must be 1 or 2, since larger groups are not summed over, got {group!r}")
    vocabulary = log_p.shape[-1]
    every = torch.arange(vocabulary, device=log_p.device)
    if group == 1:
        tokens = every.unsqueeze(-1)
    else:
        tokens = torch.stack([every.repeat_interleave(vocabulary), every.repeat(vocabulary)])
    uses_token, uses_logits = _reads(loss, log_p, log_q, log_mu, group)
    if not (uses_token or uses_logits) or (uses_token and uses_logits and group > 1):
        what = "both the logits and" if uses_token else "neither the logits nor"
        raise LossError(f"the loss has a gradient in {what} the sampled tokens' log-probabilities")
    known = None
    if uses_logits:
        known = Known(torch.cat([_known(loss, p, q, mu) for p, q, mu in _rows(log_p, log_q, log_mu)]))
        if not uses_token:
            return known
        rows = _rows(log_p, log_q, log_mu)
        last = Known(torch.cat([_known(loss, p, q, mu, vocabulary - 1) for p, q, mu in rows]))
        if float((known.gradient - last.gradient).abs().max()) > _SAME * float(known.gradient.abs().max()):
            raise LossError("the loss has a gradient in the logits that depends on the sampled token")
    # What reads whole rows would hold a row for each token.
    held = max(1, _HELD // vocabulary) if group == 1 and reads_rows(loss, log_p, log_q, log_mu) else len(tokens)
    found = []
    for number, (p, q, mu) in enumerate(_rows(log_p, log_q, log_mu)):
        met = tokens if some is None else some.tokens[number].unique().unsqueeze(-1)
        parts = [len(part) * sensitivity(loss, part, None, p, q, mu) for part in met.split(held)]
        kappa = torch.cat(parts)
        found.append(kappa if some is None else some.otherwise[number].scatter(0, met[:, 0], kappa[:, 0]).unsqueeze(-1))
    kappa = torch.stack(found)
    if group == 1:
        singles = Singles(log_p.exp(), log_mu.exp(), kappa.squeeze(-1))
        return singles if known is None else Both(known, singles)
    first, second = kappa.view(len(log_p), 2, vocabulary, vocabulary).unbind(1)
    return Pairs(log_p.exp(), first, second)


def sensitivity(
    loss: Loss, tokens: Int64[Tensor, "B T"], mask: Tensor | None, log_p: Tensor, log_q: Tensor, log_mu: Tensor
) -> Float[Tensor, "B T"]:
    """The gradient of a loss in the student's log-probability of each sampled token.

    The rows are `(B, T, V)`, or `(1, V)` with the same prefix for every token.
    """
    shape = (*tokens.shape, log_p.shape[-1])
    rows = [x.expand(shape) for x in (log_p, log_q, log_mu)]
    p, q, mu = (x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for x in rows)
    leaf = p.clone().requires_grad_()
    with torch.enable_grad():
        value = loss(_rollouts(tokens, mask, rows[0], rows[1], leaf, q, mu))
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient


def _known(loss: Loss, log_p: Tensor, log_q: Tensor, log_mu: Tensor, token: int = 0) -> Tensor:
    """The gradient in the logits of one prefix, beside that in the log-probability of the sampled token."""
    leaf = log_p.unsqueeze(0).clone().requires_grad_()
    zeros = torch.zeros(1, 1, dtype=log_p.dtype, device=log_p.device)
    with torch.enable_grad():
        value = loss(_rollouts(zeros.long() + token, None, leaf, log_q.unsqueeze(0), zeros, zeros, zeros))
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient.squeeze(0)


def _reads(loss: Loss, log_p: Tensor, log_q: Tensor, log_mu: Tensor, group: int) -> tuple[bool, bool]:
    """Whether the loss has a gradient in the sampled token's log-probability, and in the logits."""
    rows = [x[:1].unsqueeze(0).expand(group, 1, -1) for x in (log_p, log_q, log_mu)]
    tokens = rows[0][0].topk(group, dim=-1).indices.T
    leaves = [rows[0].clone().requires_grad_(), rows[0].gather(-1, tokens.unsqueeze(-1)).squeeze(-1).requires_grad_()]
    q, mu = (x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for x in rows[1:])
    with torch.enable_grad():
        value = loss(_rollouts(tokens, None, leaves[0], rows[1], leaves[1], q, mu))
        if not value.requires_grad:
            return False, False
        logits, token = torch.autograd.grad(value, leaves, allow_unused=True)
    return token is not None, logits is not None


def reads_rows(loss: Loss, log_p: Tensor, log_q: Tensor, log_mu: Tensor) -> bool:
    """Whether the loss reads the logits, with or without a gradient: whether it changes with them."""
    token = log_p[0].argmax().view(1, 1)
    ours, theirs = (x[:1].unsqueeze(0) for x in (log_p, log_q))
    sampled = [x[:1].gather(-1, token) for x in (log_p, log_q, log_mu)]
    pairs = ((ours, theirs), (ours.flip(-1), theirs), (ours, theirs.flip(-1)))
    values = [float(loss(_rollouts(token, None, *pair, *sampled)).detach()) for pair in pairs]
    return any(value != values[0] for value in values)


def _rollouts(
    tokens: Tensor, mask: Tensor | None, z_p: Tensor, z_q: Tensor, p: Tensor, q: Tensor, mu: Tensor
) -> Rollouts:
    return Rollouts.unchecked(
        tokens=tokens,
        mask=torch.ones(tokens.shape, dtype=p.dtype, device=p.device) if mask is None else mask,
        student_logits=z_p,
        teacher_logits=z_q,
        student_logprobs=p,
        teacher_logprobs=q,
        behavior_logprobs=mu,
    )


def _rows(*values: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.unsqueeze(1).unbind(0) for x in values), strict=True))


def _scores(weights: Tensor, p: Tensor) -> Tensor:
    r"""$\sum_a x_a (e_a - p)$ in the logits."""
    return weights - p * weights.sum(-1, keepdim=True)


def _centred(along: Tensor, p: Tensor) -> Tensor:
    along = along.to(p.dtype)
    return along - (p * along).sum(-1, keepdim=True)
