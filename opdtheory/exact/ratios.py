"""The log-ratio of two rows of logits, with small relative error for nearly equal rows too."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["log_ratio"]


def log_ratio(
    student: Float[Tensor, "*rows V"], teacher: Float[Tensor, "*rows V"], log_p: Float[Tensor, "*rows V"]
) -> Float[Tensor, "*rows V"]:
    r"""The log-ratios $\log u = \delta - \log E_p e^\delta$, from the difference $\delta$ of two policies' logits.

    The difference of two log-probabilities would carry the rounding error of either. Here the error is relative to
    the differences from the mean, however small they are.

    Args:
        student: the student's logits; `-inf` for a token that it lacks.
        teacher: the teacher's.
        log_p: the student's log-probabilities.

    Returns:
        `inf` where the student alone lacks a token, `-inf` where the teacher alone does, 0 where both do.
    """
    gap = teacher - student
    if not math.isfinite(gap.sum()):
        return _with_zeros(student, teacher, log_p)
    # What rounding took from the difference (Knuth): it counts once a common shift is taken off.
    back = gap + student
    lost = (teacher - back) - (student - (back - gap))
    p = log_p.exp()
    gap = (gap - (p * gap).sum(-1, keepdim=True)) + lost
    # e^gap - 1 weighted by p, where p may underflow and e^gap overflow.
    excess = torch.where(gap > 1.0, (log_p + gap).exp() - p, p * torch.expm1(gap.clamp(max=1.0))).sum(-1, keepdim=True)
    return gap - _log1p(excess, log_p + gap)


def _with_zeros(student: Tensor, teacher: Tensor, log_p: Tensor) -> Tensor:
    absent, missed = torch.isneginf(student), torch.isneginf(teacher)
    shared = ~absent & ~missed
    ours, theirs = torch.where(shared, student, 0.0), torch.where(shared, teacher, 0.0)
    gap = theirs - ours
    back = gap + ours
    lost = (theirs - back) - (ours - (back - gap))
    p = torch.where(absent, 0.0, log_p.exp())
    shift = (p * gap).sum(-1, keepdim=True)
    gap = torch.where(missed, -torch.inf, torch.where(absent, torch.inf, (gap - shift) + lost))
    gap = torch.where(absent & missed, 0.0, gap)
    # The teacher's mass on a token that the student lacks, on the scale of the student's sum.
    total = torch.logsumexp(student, -1, keepdim=True)
    log_terms = torch.where(absent, teacher - shift - total, log_p + gap)
    terms = torch.where(gap > 1.0, log_terms.exp() - p, p * torch.expm1(gap.clamp(max=1.0)))
    log_ratios = gap - _log1p(terms.sum(-1, keepdim=True), log_terms)
    return torch.where(absent & missed, 0.0, log_ratios)


def _log1p(excess: Tensor, log_terms: Tensor) -> Tensor:
    """The logarithm of `1 + excess`, from the logarithms of its terms where the excess cancels or overflows."""
    near = (excess > -0.5) & torch.isfinite(excess)
    if bool(near.all()):
        return torch.log1p(excess)
    return torch.where(near, torch.log1p(excess.clamp(min=-0.5)), torch.logsumexp(log_terms, -1, keepdim=True))
