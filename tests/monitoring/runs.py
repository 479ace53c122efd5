"""Rollouts whose laws are known: students and teachers drawn at random, and what a sampler draws from them."""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.monitoring.tokens import SampledTokens


def laws(histories: int, vocabulary: int, seed: int, apart: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a student and a teacher at each history, `(histories, vocabulary)`, float64."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(histories, vocabulary, dtype=torch.float64, generator=generator)
    teacher = student + apart * torch.randn(histories, vocabulary, dtype=torch.float64, generator=generator)
    return student.log_softmax(-1), teacher.log_softmax(-1)


def drawn(
    log_p: Tensor, log_q: Tensor, rollouts: int, length: int, seed: int, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Rollouts of random histories, with the sampled tokens' log-probabilities, `(rollouts, length)`."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(len(log_p), (rollouts, length), generator=generator)
    log_mu = (log_p / temperature).log_softmax(-1)
    flat = history.flatten()
    token = torch.multinomial(log_mu[flat].exp(), 1, generator=generator)
    student, teacher, behavior = (x[flat].gather(-1, token).view(rollouts, length) for x in (log_p, log_q, log_mu))
    entropy = -(log_p.exp() * log_p).sum(-1)[history]
    return {"student": student, "teacher": teacher, "behavior": behavior, "entropy": entropy, "history": history}


def tokens_of(rows: dict[str, Tensor], *extra: str) -> SampledTokens:
    """The tokens of drawn rollouts, with further columns by name."""
    more = {name: rows[name] for name in extra}
    return SampledTokens.of(rows["student"], rows["teacher"], more.pop("behavior", None), **more)


def every_token(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of all histories with the chance of each: expectations as sums. `(log_u, log_p, weight)`."""
    return (log_q - log_p).flatten(), log_p.flatten(), log_p.exp().flatten() / len(log_p)
