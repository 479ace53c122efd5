"""A missing detach, a clamp and a mask: named where they are the cause, and undone in the whole loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.causes import attached, clipped
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import cure, facts_of
from tests.sparse import some


def forgotten(advantage: Callable[[Rollouts], Tensor]) -> Loss:
    """A reward that is multiplied by log p before it is detached."""
    return lambda r: r.token_sum(-advantage(r) * r.student_logprobs)


def return_to_go(r: Rollouts) -> Tensor:
    rewards = torch.where(r.mask > 0, r.log_u, torch.zeros_like(r.log_u))
    return rewards.flip(1).cumsum(1).flip(1)


def others_subtracted(r: Rollouts) -> Tensor:
    whole = (r.log_u * r.mask).sum(-1, keepdim=True)
    return (whole - whole.flip(0)).expand_as(r.mask)


def vocabulary_baseline(r: Rollouts) -> Tensor:
    log_p, log_q = r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)
    return r.log_u.detach() - (log_p.exp() * (log_q - log_p)).sum(-1)


def ratio(r: Rollouts) -> Tensor:
    return (r.student_logprobs - r.behavior_logprobs).exp()


def ratio_to_a_copy(r: Rollouts) -> Tensor:
    return (r.student_logprobs - r.student_logprobs.detach()).exp()


def quotient_ratio(r: Rollouts) -> Tensor:
    return r.student_logprobs.exp() / r.behavior_logprobs.exp()


REWARDS: dict[str, tuple[Callable[[Rollouts], Tensor], str, dict[str, Any]]] = {
    "log-ratio": (lambda r: r.log_u, "reverse_kl", {}),
    "by hand": (lambda r: r.teacher_logprobs - r.student_logprobs, "reverse_kl", {"eos": 0}),
    "a quotient of probabilities": (
        lambda r: (r.teacher_logprobs.exp() / r.student_logprobs.exp()).log(),
        "reverse_kl",
        {},
    ),
    "the weight of a forward KL": (lambda r: r.log_u.exp(), "forward_kl", {}),
    "the weight of a JSD": (lambda r: opd.divergence("jsd").weight(r.log_u), "jsd", {}),
    "return to go": (return_to_go, "reverse_kl", {"granularity": "token_return", "eos": 0}),
    "the others' mean": (others_subtracted, "reverse_kl", {"granularity": "sequence", "batch_size": 2}),
    "a baseline over the vocabulary": (vocabulary_baseline, "reverse_kl", {}),
}


@pytest.mark.parametrize("case", REWARDS)
def test_a_reward_that_is_not_detached_is_named(case: str) -> None:
    advantage, objective, settings = REWARDS[case]
    first = cure(forgotten(advantage), objective, pairs=2, **settings)[0]
    assert (first.kind, first.verdict, first.verified) == ("detach", "exact", True)
    assert first.text.startswith("Detach the reward") and "reward is not detached" in first.cause
    assert "importance ratio" not in first.cause


@pytest.mark.parametrize("factor", [ratio, ratio_to_a_copy, quotient_ratio])
def test_an_importance_ratio_that_is_not_detached_is_named(factor: Callable[[Rollouts], Tensor]) -> None:
    first = cure(forgotten(lambda r: factor(r) * r.log_u.detach()), "reverse_kl", pairs=2)[0]
    assert (first.kind, first.verified) == ("detach", True)
    assert "importance ratio is not detached" in first.cause and "reward" not in first.cause


def test_both_detaches_are_named() -> None:
    first = cure(forgotten(lambda r: ratio(r) * r.log_u), "reverse_kl", pairs=2)[0]
    assert "reward is not detached" in first.cause and "importance ratio is not detached" in first.cause


def test_what_a_missing_detach_hides_is_found_too() -> None:
    stop_gradient = forgotten(lambda r: -r.log_u * r.log_u.exp())
    assert cure(stop_gradient, "forward_kl", pairs=2)[0].kind == "detach, slope"
    sampled = forgotten(lambda r: ratio(r) * r.log_u.detach())
    assert cure(sampled, "reverse_kl", pairs=2, off_policy=0.3)[0].kind == "detach, importance"


def test_a_missing_detach_is_named_beside_another_remedy() -> None:
    """A reward of -log(u)^2 / 2 is wrong even when it is detached."""
    first = cure(forgotten(lambda r: -r.log_u.square() / 2), "hellinger", pairs=2)[0]
    assert first.kind == "replace" and "reward is not detached" in first.cause
    assert (
        cure(lambda r: r.token_sum(r.log_u.detach().square() * r.student_logprobs), "hellinger", pairs=2)[0].cause == ""
    )


def test_an_attached_ratio_in_place_of_log_p_is_not_blamed() -> None:
    """Its gradient is the score's, so it is right as it is, and detached it leaves none."""
    assert cure(lambda r: r.token_sum(-ratio(r) * r.log_u.detach()), "reverse_kl") == []
    first = cure(lambda r: r.token_sum(ratio(r) * (r.log_u * r.log_u.exp()).detach()), "forward_kl", pairs=2)[0]
    assert (first.kind, first.cause) == ("slope", "")


def test_no_detach_is_named_in_a_loss_that_has_them_all() -> None:
    assert list(attached(facts_of(opd.estimator("opd", "jsd"), "jsd"))) == []


def vocabulary_terms(r: Rollouts) -> Tensor:
    log_p, log_q = r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)
    return log_q.exp() * (log_q - log_p)


def bounded(r: Rollouts) -> Tensor:
    return torch.tensor(0.05, dtype=r.mask.dtype)


CLAMPS: dict[str, tuple[Loss, str, str]] = {
    "clamp": (lambda r: r.token_sum(vocabulary_terms(r).clamp(max=0.05).sum(-1)), "forward_kl", "at most 0.05"),
    "clip on both sides": (
        lambda r: r.token_sum(torch.clip(vocabulary_terms(r), -0.1, 0.1).sum(-1)),
        "forward_kl",
        "to [-0.1, 0.1]",
    ),
    "minimum": (
        lambda r: r.token_sum(torch.minimum(vocabulary_terms(r), bounded(r)).sum(-1)),
        "forward_kl",
        "at most 0.05",
    ),
    "a lower bound of the sum": (
        lambda r: r.token_sum(vocabulary_terms(r).sum(-1).clamp_min(0.2)),
        "forward_kl",
        "at least 0.2 on each token's term",
    ),
}


@pytest.mark.parametrize("case", some(CLAMPS))
def test_a_clamp_is_named_with_its_bounds(case: str) -> None:
    loss, objective, words = CLAMPS[case]
    found = cure(loss, objective, pairs=2)
    assert (found[0].kind, found[0].verdict, found[0].verified) == ("clip", "exact", True)
    assert words in found[0].text and words in found[0].cause
    assert not any("likeliest" in remedy.text for remedy in found)


def score(factor: Callable[[Tensor], Tensor]) -> Loss:
    return lambda r: r.token_sum(-r.log_u.detach() * factor(ratio(r).detach()) * r.student_logprobs)


RATIOS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "held": (lambda rho: rho.clamp(max=1.1), "The clamp to at most 1.1 on the importance ratios"),
    "masked": (lambda rho: rho * ((rho > 0.8) & (rho < 1.25)), "The mask on importance ratios"),
    "filled": (lambda rho: rho.masked_fill(rho > 1.2, 0.0), "The mask on importance ratios"),
    "chosen": (lambda rho: torch.where((rho - 1).abs() < 0.2, rho, 0.0), "The mask on importance ratios"),
}


@pytest.mark.parametrize("case", RATIOS)
def test_a_cut_of_importance_ratios_is_named(case: str) -> None:
    factor, words = RATIOS[case]
    first = cure(score(factor), "reverse_kl", pairs=2, off_policy=0.3)[0]
    assert first.kind == "importance" and first.verified
    assert first.cause.startswith(words)


def test_a_clamp_that_never_acts_is_not_named() -> None:
    def loss(r: Rollouts) -> Tensor:
        return r.token_sum(vocabulary_terms(r).clamp(-50.0, 50.0).sum(-1) * r.mask.sum(-1, keepdim=True).clamp_min(1))

    assert list(clipped(facts_of(loss, "reverse_kl"))) == []
