"""Measures of a batch of rollouts: both KLs to the teacher, entropy, clipped tokens, lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.estimators import Estimator
from opdtheory.estimators.base import unmasked
from opdtheory.estimators.sampled import Differentiated, RatioAdvantage, ReturnToGo, ScoreFunction, SequenceWeight
from opdtheory.rollouts import Rollouts
from opdtheory.training.objective import ExactScore

__all__ = ["Tally", "clipped", "distances", "entropies", "step_report"]

_SUMS = ("loss", "tokens", "reverse_kl", "forward_kl", "entropy", "clipped", "present", "correct", "rollouts")


@dataclass
class Tally:
    """Sums over parts of a batch, in float64, which add up over parts and processes, unlike means."""

    sums: Float[Tensor, " S"]
    names: tuple[str, ...] = _SUMS

    @classmethod
    def empty(cls, device: torch.device, names: tuple[str, ...] = _SUMS) -> Tally:
        """All sums zero."""
        return cls(torch.zeros(len(names), dtype=torch.float64, device=device), names)

    def add(self, **values: int | float | Tensor) -> None:
        """Add to the named sums without waiting for the device."""
        for name, value in values.items():
            self.sums[self.names.index(name)] += value.detach() if isinstance(value, Tensor) else value

    def __getitem__(self, name: str) -> float:
        return float(self.sums[self.names.index(name)])

    def means(self) -> dict[str, float]:
        """The metrics of a step: the loss, and the other sums per token or per rollout."""
        total = dict(zip(self.names, self.sums.tolist(), strict=True))
        tokens, rollouts = max(total["tokens"], 1.0), max(total["rollouts"], 1.0)
        return {
            "loss": total["loss"],
            "reverse_kl": total["reverse_kl"] / tokens,
            "forward_kl": total["forward_kl"] / tokens,
            "entropy": total["entropy"] / tokens,
            "clip_fraction": total["clipped"] / tokens,
            "response_length": total["present"] / rollouts,
            "sampled_accuracy": total["correct"] / rollouts,
            "tokens": total["tokens"],
        }


def step_report(tallies: Sequence[Tally], norms: Sequence[float]) -> dict[str, float]:
    """The metrics of a step, before its first update; the clip fraction and the norm are means over updates."""
    report = tallies[0].means() | {"gradient_norm": sum(norms) / len(norms)}
    report["clip_fraction"] = sum(tally.means()["clip_fraction"] for tally in tallies) / len(tallies)
    return report


@torch.no_grad()
def distances(rollouts: Rollouts) -> dict[str, Float[Tensor, ""]]:
    r"""Sums over the unmasked tokens of $KL(p\|q)$, $KL(q\|p)$ and the entropy of $p$, exact over the vocabulary.

    They are in nats, for the distributions that the rollouts hold, which include the temperature.
    """
    log_p = torch.log_softmax(unmasked(rollouts, rollouts.student_logits), dim=-1)
    log_q = torch.log_softmax(unmasked(rollouts, rollouts.teacher_logits), dim=-1)
    sums = {
        "reverse_kl": _expected(log_p, log_p - log_q),
        "forward_kl": _expected(log_q, log_q - log_p),
        "entropy": -_expected(log_p, log_p),
    }
    return {name: torch.where(rollouts.mask > 0, value, 0.0).sum(dtype=torch.float64) for name, value in sums.items()}


@torch.no_grad()
def entropies(rollouts: Rollouts) -> Float[Tensor, "B T"]:
    """The entropy of the student at every token, in nats; 0 where masked."""
    log_p = torch.log_softmax(unmasked(rollouts, rollouts.student_logits), dim=-1)
    return unmasked(rollouts, -_expected(log_p, log_p))


def _expected(log_p: Tensor, values: Tensor) -> Float[Tensor, "B T"]:
    # A token of zero probability contributes nothing, whatever its value.
    return torch.where(log_p > -torch.inf, log_p.exp() * values, 0.0).sum(-1)


@torch.no_grad()
def clipped(loss: Estimator, rollouts: Rollouts) -> Int64[Tensor, ""]:
    """The number of unmasked tokens that a clip of the estimator affects: of log-ratio, weight, or PPO's ratio p/mu."""
    rule = loss.token_loss
    live = rollouts.mask > 0
    hit = torch.zeros_like(live)
    bound = _log_ratio_bound(rule)
    if bound is not None:
        hit = hit | (unmasked(rollouts, rollouts.log_u).abs() > bound)
    if isinstance(rule, ScoreFunction) and rule.clip_weight is not None:
        low, high = rule.clip_weight
        advantages = unmasked(rollouts, rule.advantage(rollouts), fill=low)
        hit = hit | (advantages < low) | (advantages > high)
    if isinstance(rule, ScoreFunction) and rule.importance == "ppo":
        ratio = unmasked(rollouts, rollouts.student_logprobs - rollouts.behavior_logprobs).exp()
        hit = hit | ((ratio - 1).abs() > rule.ppo_range)
    return (hit & live).sum()


def _log_ratio_bound(rule: object) -> float | None:
    if isinstance(rule, (ScoreFunction, ExactScore)):
        rule = rule.advantage
    if isinstance(rule, (Differentiated, RatioAdvantage, ReturnToGo, SequenceWeight)):
        return rule.clip_log_ratio
    return None
