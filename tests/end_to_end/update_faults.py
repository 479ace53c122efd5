"""A loop of one's own, sound and with one fault at a time, and what the audit must say of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdtheory.end_to_end import TrainerPair

__all__ = ["FAULTS", "SOUND", "loop"]

Rows = tuple[Tensor, Tensor, Tensor]


def loop(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    reduce: Callable[[list[Tensor], TrainerPair], Tensor] | None = None,
    read: Callable[[TrainerPair, list[int], list[int]], Rows] | None = None,
) -> Callable[..., None]:
    """An update: `score(log_p, log_q, tokens)` gives the loss of each token of one rollout."""

    def update(pair: TrainerPair, prompts: list[list[int]], answers: list[list[int]]) -> None:
        values = []
        for prompt, answer in zip(prompts, answers, strict=True):
            values.append(score(*(read or rows)(pair, prompt, answer)))
        total = sum(value.sum() for value in values) / len(values) if reduce is None else reduce(values, pair)
        total.backward()

    return update


def rows(pair: TrainerPair, prompt: list[int], answer: list[int], late: int = 0, teacher_late: int = 0) -> Rows:
    """Log-probabilities of both models where the answer's tokens are predicted, and these tokens."""
    ids = torch.tensor([prompt + answer])
    first = len(prompt) - 1
    ours = pair.student(ids).logits[0, first + late :][: len(answer)].log_softmax(-1)
    with torch.no_grad():
        theirs = pair.teacher(ids).logits[0, first + teacher_late :][: len(answer)].log_softmax(-1)
    count = min(len(ours), len(theirs))
    return ours[:count], theirs[:count], torch.tensor(answer)[:count]


def at(log: Tensor, tokens: Tensor) -> Tensor:
    """The log-probability of each token."""
    return log.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    """The whole-vocabulary reverse KL."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    """The whole-vocabulary forward KL."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def policy_gradient(advantage: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A detached advantage of the log-ratio times the score."""

    def score(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
        log_u = (at(log_q, tokens) - at(log_p, tokens)).detach()
        return -advantage(log_u) * at(log_p, tokens)

    return score


def differentiated(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An estimator of the sampled token's log-ratio that is differentiated, as a loss."""
    return lambda log_p, log_q, tokens: loss(at(log_q, tokens) - at(log_p, tokens))


def _returns(log_p: Tensor, log_q: Tensor, tokens: Tensor) -> Tensor:
    log_u = (at(log_q, tokens) - at(log_p, tokens)).detach()
    return -log_u.flip(0).cumsum(0).flip(0) * at(log_p, tokens)


SOUND: dict[str, tuple[Callable[..., None], str]] = {
    "whole vocabulary": (loop(reverse_kl), "reverse_kl"),
    "forward KL": (loop(forward_kl), "forward_kl"),
    "k1 reward": (loop(policy_gradient(lambda x: x)), "reverse_kl"),
    "k2 loss": (loop(differentiated(lambda x: x.square() / 2)), "reverse_kl"),
    "OPD+ of the forward KL": (loop(policy_gradient(lambda x: x.exp())), "forward_kl"),
    "OPD+ of chi2": (loop(policy_gradient(lambda x: (2 * x).exp() - 1)), "chi2"),
}

# The claim is the reverse KL, unless the name of a fault begins with another one.
FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "k3 loss": (loop(differentiated(lambda x: x.exp() - 1 - x)), "descends forward_kl"),
    "k1 loss": (loop(differentiated(lambda x: -x)), "expected gradient is zero"),
    "k3 reward": (loop(policy_gradient(lambda x: x - x.exp() + 1)), "descends reverse_kl - forward_kl"),
    "returns": (loop(_returns), "descends reverse_kl (token_return)"),
    "one token late": (loop(reverse_kl, read=lambda p, x, y: rows(p, x, y, 1, 1)), "off by one"),
    "teacher one late": (loop(reverse_kl, read=lambda p, x, y: rows(p, x, y, 0, 1)), "teacher is read one token late"),
    "mean of all tokens": (
        loop(reverse_kl, reduce=lambda values, pair: torch.cat(values).mean()),
        "1/N within a batch",
    ),
    "mean of each rollout": (
        loop(reverse_kl, reduce=lambda values, pair: sum(value.mean() for value in values) / len(values)),
        "short rollouts weigh more",
    ),
    "sampled mean of all tokens": (
        loop(policy_gradient(lambda x: x), reduce=lambda values, pair: torch.cat(values).mean()),
        "1/N within a batch",
    ),
    "stop-gradient chi2": (loop(policy_gradient(lambda x: -(x.expm1() ** 2))), "takes chi2 (token_local) as a reward"),
    "teacher is the student": (
        loop(reverse_kl, read=lambda p, x, y: _alone(rows(p, x, y))),
        "expected gradient is zero",
    ),
    "uphill": (loop(lambda p, q, y: -reverse_kl(p, q, y)), "uphill"),
    "end ignored": (loop(lambda p, q, y: reverse_kl(p, q, y) * (y != 1)), "nothing teaches when to stop"),
}


def _alone(found: Rows) -> Rows:
    return found[0], found[0], found[2]
