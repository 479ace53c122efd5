r"""Findings on whose samples the tokens are: the student's own, an engine's, a stale copy's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from opdtheory.monitoring.evidence import leave_one_out
from opdtheory.monitoring.findings.finding import ALPHA, CONFIDENCE, Finding, Setting, share
from opdtheory.monitoring.measures import moment
from opdtheory.monitoring.sums import Number, Sums, number_of

__all__ = ["distance", "log_winnings", "mismatch", "own_probabilities", "support"]

# A sampler this far from the student, in nats per token, is another policy; rounding of engines stays well below.
_APART = 5e-3

_SCORE_AS_SAMPLED = "Log the sampler's own log-probabilities, and score at the temperature that samples."


def own_probabilities(s: Setting) -> Iterator[Finding]:
    """Whether the tokens were sampled from the probabilities that are logged as the student's."""
    if s.evidence.off_policy is not None and _is_apart(distance(s.evidence.off_policy.ratio)):
        return
    number = None
    if float(s.evidence.surprise[:, 0].sum()) > 0:
        totals = leave_one_out(s.evidence.surprise)
        number = number_of(totals[:, 1] / totals[:, 0], CONFIDENCE)
    if number is not None and number.interval is not None:
        yield _from_entropy(number, number.interval)
    elif s.evidence.off_policy is None:
        yield _from_ratio(s)


def _from_entropy(number: Number, interval: tuple[float, float]) -> Finding:
    low, high = interval
    quantity, theorem = "mean of -log p minus the entropy, nats", "T8, T10"
    if low <= 0 <= high:
        sentence = (
            "The tokens are as surprising as the student's entropy says, as its own samples are; "
            f"a difference of {(high - low) / 2:.2g} nats would have shown (T10)."
        )
        return Finding("own_probabilities", "note", sentence, number, quantity, theorem)
    less = "less" if high < 0 else "more"
    sentence = (
        f"The tokens are {abs(number.value):.2g} nats {less} surprising than the student's entropy says: they are no "
        "samples of these probabilities (another temperature, top-p, a stale or quantised engine, a wrong mask; T8, "
        "T10)."
    )
    return Finding("not_own_probabilities", "warning", sentence, number, quantity, theorem, _SCORE_AS_SAMPLED)


def _from_ratio(s: Setting) -> Finding:
    """The mean of u is at most 1 for samples of p; that it is lower proves nothing: rare tokens may hold the rest."""
    sums = s.evidence.sampled
    mean = sums.number(moment(torch.exp), CONFIDENCE)
    won = log_winnings(sums)
    quantity, theorem = "mean of u = q/p, at most 1 for the student's own samples", "T8, T10"
    if won > math.log(1 / ALPHA):
        sentence = (
            f"The mean of u is {mean.value:.4g}; samples of these probabilities would bring so much evidence of more "
            f"than 1 at most once in {math.exp(min(won, 200.0)):.1g} runs (T8, T10)."
        )
        return Finding("not_own_probabilities", "warning", sentence, mean, quantity, theorem, _SCORE_AS_SAMPLED)
    effective = sums.number(_effective)
    sentence = (
        "Whether the tokens are samples of these probabilities cannot be said from ratios alone: the mean of u is "
        f"{mean}, decided by an effective {share(effective)} of the tokens. The student's entropies, or the sampler's "
        "log-probabilities, would tell (T10)."
    )
    return Finding("own_probabilities", "note", sentence, mean, quantity, theorem)


def log_winnings(sums: Sums) -> float:
    r"""The log of what bets on $u > 1$ have won: $\prod_n (1 + \lambda(u_n - 1))$, averaged over stakes $\lambda$.

    For samples of $p$ the expected capital never grows, whatever the tail of $u$ and however tokens depend on each
    other, so it exceeds $1/\alpha$ with a probability of at most $\alpha$ (Ville's inequality).
    """
    points, tables = sums.occupied()
    stakes = torch.logspace(-4, math.log10(0.9), 40, dtype=torch.float64).unsqueeze(-1)
    won = (tables[0, 0] * torch.log1p(stakes * points.expm1())).sum(-1)
    return float(torch.logsumexp(won, 0)) - math.log(len(stakes))


def _effective(points: Tensor, tables: Tensor) -> Tensor:
    """The effective share of the tokens in a mean of u."""
    n, u = tables[:, 0], points.exp()
    return (n * u).sum(-1).square() / ((n * u.square()).sum(-1) * n.sum(-1))


def distance(ratio: Sums) -> Number:
    r"""$KL(\mu\|p)$ in nats per token: under the sampler the mean of $\rho - 1 - \log\rho$, never negative."""
    return ratio.number(moment(lambda x: x.expm1() - x), CONFIDENCE)


def _is_apart(number: Number) -> bool:
    return (number.value if number.low is None else number.low) >= _APART


def mismatch(s: Setting) -> Iterator[Finding]:
    """How far the sampler is from the student, and what importance weights would make of it."""
    if s.evidence.off_policy is None:
        return
    ratio = s.evidence.off_policy.ratio
    apart = distance(ratio)

    def beyond(low: float, high: float) -> str:
        outside = moment(lambda x: ((x < math.log(low)) | (x > math.log(high))).to(x.dtype))
        return share(ratio.number(outside))

    shown = (
        f"it is {apart.value:.2g} nats per token from the student, p/mu lies outside [1/2, 2] on {beyond(0.5, 2)} of "
        f"them, weights p/mu leave an effective {share(ratio.number(_effective))} of them, TIS at 2 cuts "
        f"{beyond(1e-30, 2)} and a mask of [0.5, 5] {beyond(0.5, 5)} (T8, T14)."
    )
    quantity = "KL(mu|p), nats per token"
    if not _is_apart(apart):
        yield Finding(
            "sampler", "note", f"What sampled these tokens is close to the student: {shown}", apart, quantity, "T8, T14"
        )
        return
    yield Finding(
        "mismatch",
        "warning",
        f"Another policy sampled these tokens: {shown}" + ("" if s.importance else " Nothing corrects for it."),
        apart,
        quantity,
        "T8, T14",
        "" if s.importance else "Weigh tokens by p/mu (importance='token'), or let the engine sample what is scored.",
    )


def support(s: Setting) -> Iterator[Finding]:
    """Tokens that the teacher cannot write."""
    count, tokens = s.evidence.impossible, s.evidence.tokens
    if count:
        yield Finding(
            "support",
            "warning",
            f"The teacher gives probability zero to {count:,} of {tokens:,} tokens, where f(0) enters: it is "
            "infinite for the reverse KL (T10). They count at log u = -40 here.",
            Number(count / tokens),
            "share of tokens that the teacher cannot write",
            "T10",
            "Check that both models share a vocabulary, and that the teacher's distribution is not cut.",
        )
