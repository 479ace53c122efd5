"""Every next token through an estimator's own loss: what the closed forms are held against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from opdtheory import Rollouts
from opdtheory.estimators import Estimator, estimator
from opdtheory.training.objective import group_losses


def pair(rows: int, size: int, seed: int = 0, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher, of which some ratios are beyond six nats for large scales."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = (scale * torch.randn(rows, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, student + noise


def gradient(loss: Estimator, tokens: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient in the logits of one position of each rollout, summed over the rollouts."""
    leaf = student.unsqueeze(1).clone().requires_grad_()
    rollouts = Rollouts.from_logits(tokens.unsqueeze(-1), leaf, teacher.unsqueeze(1))
    (found,) = torch.autograd.grad(group_losses(loss, rollouts, len(tokens)).sum(), leaf)
    return found.squeeze(1)


def outcomes(loss: Estimator, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of every choice of one token a row and its gradient, `(V**N,)` and `(V**N, N, V)`."""
    p = student.softmax(-1)
    chances, gradients = [], []
    for tokens in itertools.product(range(p.shape[-1]), repeat=len(p)):
        drawn = torch.tensor(tokens)
        chances.append(p.gather(-1, drawn.unsqueeze(-1)).prod())
        gradients.append(gradient(loss, drawn, student, teacher))
    return torch.stack(chances), torch.stack(gradients)


def exact(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The exact gradient in the logits, by autograd over the vocabulary."""
    tokens = torch.zeros(len(student), dtype=torch.int64)
    return gradient(estimator("full_vocab", divergence), tokens, student, teacher)


def mean_and_spread(loss: Estimator, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean gradient of each row, the trace of its covariance and its second moment, rows one at a time."""
    rows, size = student.shape
    tokens = torch.arange(size).repeat(rows)
    found = gradient(loss, tokens, *(x.repeat_interleave(size, 0) for x in (student, teacher))).view(rows, size, size)
    chance = student.softmax(-1)
    mean = torch.einsum("ny,nyv->nv", chance, found)
    spread = (chance * (found - mean.unsqueeze(1)).square().sum(-1)).sum(-1)
    return mean, spread, (chance * found.square().sum(-1)).sum(-1)
