r"""What the sums over a run's tokens tell of other estimators: proxies, as the distributions are not known.

A sampled token has $|s|^2$ between $(1-p)^2$ and twice that; the sums hold $(1-p)^2$ unless they were told better. With
means over the tokens and $\bar A_h$ the mean weight at a history, a gradient's square there is
$E[p\,(A - \bar A_h)^2]$; the mean of all tokens stands for $\bar A_h$. The noise is taken to be the whole second moment
$E[(A - c)^2 |s|^2]$: the square of the mean that it holds is less than its own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.advice.candidates import Candidate, Have
from opdtheory.monitoring.sums import WIDTH, Sums
from opdtheory.monitoring.weights import weight_of

__all__ = ["Proxies", "surely_listed"]

# Their bias takes both distributions.
_UNKNOWN = ("topk_truncated", "topk_renormalised", "topk_tail")
# Places of the parabola that bounds from below.
_PLACES = 64


def surely_listed(
    length: Float[Tensor, " X"], square: Float[Tensor, " X"], log_u: Float[Tensor, " X"], k: int
) -> Float[Tensor, " X"]:
    r"""A lower bound of each bin's mean of $(1-p)^2\,1[q > \frac1{k+1}]$, from the means of $1-p$ and $(1-p)^2$.

    A token with $q > 1/(k+1)$ is among the teacher's k likeliest, as k + 1 of them would sum to more than one. In a bin
    of one ratio that is $x = 1 - p < \tau = 1 - 1/((k+1)u)$. For every r in $(0, \tau)$,
    $x^2 1[x<\tau] \ge \lambda (x - r)(\tau - x)$ on [0, 1] with $\lambda = 4r\tau/(\tau-r)^2$, a parabola that touches.

    Args:
        length: the mean of 1 - p in each bin.
        square: the mean of its square.
        log_u: the least log-ratio of each bin, in nats.
        k: the number of tokens.
    """
    tau = 1 - (-log_u).exp() / (k + 1)
    some = tau > 0
    tau = torch.where(some, tau, 1.0).unsqueeze(-1)
    share = torch.arange(1, _PLACES, dtype=tau.dtype) / _PLACES
    # Where all tokens of a bin are alike, this place makes the bound their own square.
    alike = (length.unsqueeze(-1) / (2 * tau - length.unsqueeze(-1)).clamp_min(1e-12)).clamp(0.0, 1 - 1e-6)
    r = torch.cat([share.expand(len(tau), -1), alike], -1) * tau
    height = 4 * r * tau / (tau - r).square()
    bound = height * ((r + tau) * length.unsqueeze(-1) - square.unsqueeze(-1) - r * tau)
    return torch.where(some, bound.amax(-1).clamp_min(0.0), 0.0).minimum(square)


@dataclass(frozen=True)
class Proxies:
    r"""The proxies of one target.

    Attributes:
        divergence: the target.
        sums: the sums over the run's tokens.
        tokens: the sampled tokens of a batch.
        coherence: the mean product of two histories' gradients, relative to their mean square.
        group: rollouts of a prompt, for baselines over a group.
    """

    divergence: Divergence
    sums: Sums
    tokens: int
    coherence: float
    group: int = 2

    @cached_property
    def _bins(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the bins are, and of each the share of tokens and the sums of p and of the score's square."""
        log_u, tables = self.sums.occupied()
        count, length, square = (tables[0][i] / tables[0][0].sum() for i in (0, 2, 3))
        return log_u, count, (count - length).clamp_min(0.0), square

    def measure(self, listed: Sequence[Candidate]) -> list[tuple[Candidate, float, float]]:
        """Each candidate that can be judged, with its relative squared bias and variance."""
        log_u, *_ = self._bins
        exact = self._gradient(self.divergence.weight(log_u))
        if exact <= 0:
            raise InvalidArgumentError(
                "found_or_rollouts", "must not have a gradient of zero: teacher and student agree"
            )
        # The square of the mean over a batch, of exact gradients that are alike by their coherence.
        signal = exact * (self.coherence + (1 - self.coherence) / self.tokens)
        found = []
        for candidate in listed:
            if candidate.loss.name in _UNKNOWN:
                continue
            candidate = self._with_constant(candidate) if candidate.best else candidate
            bias, noise = self._of(candidate)
            found.append((candidate, bias / exact, noise / self.tokens / signal))
        return found

    def notes(self, have: Have) -> tuple[str, ...]:
        """What the numbers leave out."""
        found = [
            "The noise takes (1 - p)² for the square of a score, which is between that and twice as much, and the mean "
            "weight of all tokens for that of each history; what was never sampled is in none of the numbers. "
            f"Gradients of two histories are taken to be alike by {self.coherence:g}.",
        ]
        if have != "sampled":
            found.append(
                "A token with q > 1/(k+1) is among the teacher's k likeliest; only such tokens count as summed, so the "
                "noise of topk_tail_sampled is bounded from above by its proxy. The biases of topk_truncated, "
                "topk_renormalised and topk_tail take both distributions, so these are not ranked."
            )
        return tuple(found)

    def _gradient(self, weight: Tensor) -> float:
        r"""$E[p\,(A - \bar A)^2]$."""
        _, count, p, _ = self._bins
        return float((p * (weight - (count * weight).sum()).square()).sum())

    def _of(self, candidate: Candidate) -> tuple[float, float]:
        """The squares of the bias and of one token's noise."""
        log_u, count, _, square = self._bins
        loss = candidate.loss
        if loss.name == "full_vocab":
            return 0.0, 0.0
        exact, weight = self.divergence.weight(log_u), weight_of(loss)(log_u)
        if loss.name == "topk_tail_sampled":
            left = self._left(candidate.k)
            return 0.0, float((left * (weight - self._constant(candidate, weight, left)).square()).sum())
        bias = self._gradient(exact - weight)
        constant = self._constant(candidate, weight, square)
        noise = float((square * (weight - constant).square()).sum())
        if candidate.grouped:
            mean = (count * weight).sum()
            noise += float((count * (weight - mean).square()).sum() * square.sum()) / (self.group - 1)
        return bias, noise

    def _constant(self, candidate: Candidate, weight: Tensor, square: Tensor) -> float:
        """What is taken off; where it varies with the history, the constant that stands for it."""
        baseline = candidate.loss.settings.get("baseline")
        if baseline in ("vocabulary", "leave_one_out", "group_mean"):
            return float((self._bins[1] * weight).sum())
        if baseline in ("optimal", "rest"):
            return _best(weight, square)
        return float(candidate.loss.settings.get("baseline_value", 0.0))

    def _with_constant(self, candidate: Candidate) -> Candidate:
        log_u, _, _, square = self._bins
        left = self._left(candidate.k) if candidate.k else square
        return candidate.with_constant(_best(self.divergence.weight(log_u), left))

    def _left(self, k: int) -> Tensor:
        """The sum of squares of the tokens that may be outside the teacher's k likeliest."""
        log_u, count, p, square = self._bins
        saved = surely_listed((count - p) / count, square / count, log_u - WIDTH, k)
        return square - count * saved


def _best(weight: Tensor, square: Tensor) -> float:
    total = float(square.sum())
    return float((square * weight).sum()) / total if total > 0 else 0.0
