"""Remedies: the intended change is found first and verified, and what is no improvement is not offered."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.corrections import Curve, gauge_shift
from opdtheory.auditing.fixes.remedies import remedies
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.records import Identified, VariableLengths
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts
from tests.auditing.fixes.losses import FAITHFUL, audited, cure, k1_loss, over_padding, times, zoo
from tests.sparse import some


def reward(advantage: Callable[[Rollouts], Tensor]) -> Loss:
    return lambda r: r.token_sum(-advantage(r).detach() * r.student_logprobs)


def position_weighted(r: Rollouts) -> Tensor:
    by_position = 0.5 ** torch.arange(r.mask.shape[1]).to(r.mask)
    return r.token_sum(-(by_position * r.log_u).detach() * r.student_logprobs)


def mean_over_padding(r: Rollouts) -> Tensor:
    return -(r.log_u.detach() * r.student_logprobs).mean()


def over_longest(r: Rollouts) -> Tensor:
    return r.token_sum(r.log_u.square() / 2) / r.mask.sum(-1).max()


def mean_over_padded(r: Rollouts) -> Tensor:
    return (r.mask * r.log_u.square() / 2).mean()


def against_the_sampler(r: Rollouts) -> Tensor:
    return r.token_sum(-(r.teacher_logprobs - r.behavior_logprobs) * r.student_logprobs)


def generator_differentiated(r: Rollouts) -> Tensor:
    return r.token_sum(opd.divergence("jsd").generator(r.log_u))


def in_float32(r: Rollouts) -> Tensor:
    log_u = r.log_u.detach().float()
    return r.token_sum(log_u * log_u.exp() * r.student_logprobs.float())


# Loss, claimed divergence, settings and granularity, the kind of the first remedy, the verdict after it.
CASES: dict[str, tuple[Loss, str, dict[str, Any], str, str]] = {
    "stop-gradient forward KL": (zoo("opd", "forward_kl"), "forward_kl", {}, "slope", "exact"),
    "stop-gradient TV": (zoo("opd", "total_variation"), "total_variation", {}, "slope", "exact"),
    "thrice stop-gradient": (times(3.0, zoo("opd", "chi2")), "chi2", {}, "slope", "exact_up_to_scale"),
    "generator differentiated": (generator_differentiated, "jsd", {}, "advantage", "exact"),
    "k3 as reward": (zoo("k3_reward"), "reverse_kl", {}, "advantage", "exact"),
    "sign and factor": (times(-2.0, zoo("full_vocab", "jsd")), "jsd", {}, "sign", "exact"),
    "factor": (times(3.0, zoo("k2_loss")), "reverse_kl", {}, "scale", "exact"),
    "positions": (position_weighted, "reverse_kl", {}, "position", "exact"),
    "k1 as loss": (k1_loss, "reverse_kl", {}, "detach", "exact"),
    "k2 as reward": (zoo("k2_reward"), "reverse_kl", {}, "differentiate", "exact"),
    "k3 as reward, forward": (zoo("k3_reward"), "forward_kl", {}, "differentiate", "exact"),
    "k3 as loss": (zoo("k3_loss"), "reverse_kl", {}, "k2", "exact"),
    "k2 clamped": (zoo("k2_loss", clip_log_ratio=1.5), "reverse_kl", {}, "clip", "exact"),
    "clip inside the grid": (zoo("opd_plus", "forward_kl", clip_log_ratio=2.0), "forward_kl", {}, "clip", "exact"),
    "clip outside the grid": (zoo("opd_plus", "jsd", clip_log_ratio=5.0), "jsd", {}, "clip", "exact"),
    "clipped weight": (zoo("opd_plus", "forward_kl", clip_weight=(0.5, 1.5)), "forward_kl", {}, "clip", "exact"),
    "stop-gradient, clipped": (zoo("opd", "jsd", clip_log_ratio=2.0), "jsd", {}, "slope, clip", "exact"),
    "token mean": (zoo("opd_plus", "jsd", reduction="token_mean"), "jsd", {"eos": 0}, "reduction", "exact"),
    "rollout mean of two": (
        zoo("k2_loss", reduction="sequence_mean"),
        "reverse_kl",
        {"eos": 0, "batch_size": 2},
        "reduction",
        "exact",
    ),
    "longest rollout": (over_longest, "reverse_kl", {"eos": 0, "batch_size": 2}, "reduction", "exact"),
    "padded length": (mean_over_padded, "reverse_kl", {"eos": 0}, "reduction", "exact"),
    "rollout mean": (zoo("opd_plus", "jsd", reduction="sequence_mean"), "jsd", {"eos": 0}, "reduction", "exact"),
    "token mean, stop-gradient": (
        zoo("opd", "forward_kl", reduction="token_mean"),
        "forward_kl",
        {},
        "reduction, slope",
        "exact",
    ),
    "padding": (over_padding, "reverse_kl", {"eos": 0}, "padding", "exact"),
    "mean over padding": (mean_over_padding, "reverse_kl", {"eos": 0}, "padding", "exact_up_to_scale"),
    "an environment's tokens": (over_padding, "reverse_kl", {"environment": (1,)}, "padding", "exact"),
    "two prompts, stop-gradient": (zoo("opd", "jsd"), "jsd", {"prompts": 2}, "slope", "exact"),
    "no ratio": (zoo("opd_plus", "jsd"), "jsd", {"off_policy": 0.5}, "importance", "exact"),
    "own ratio only": (
        zoo("opd_plus", "jsd", importance="token"),
        "jsd",
        {"off_policy": 0.5},
        "importance",
        "exact",
    ),
    "PPO": (zoo("opd_plus", "jsd", importance="ppo"), "jsd", {"off_policy": 0.5}, "importance", "exact"),
    "whole vocabulary, no ratio": (zoo("full_vocab", "jsd"), "jsd", {"off_policy": 0.5}, "importance", "exact"),
    "ratio to the sampler": (against_the_sampler, "reverse_kl", {"off_policy": 0.5}, "importance", "exact"),
    "no ratio, token mean": (
        zoo("opd_plus", "jsd", reduction="token_mean"),
        "jsd",
        {"off_policy": 0.5, "eos": 0},
        "reduction, importance",
        "exact",
    ),
    "no ratio, stop-gradient": (zoo("opd", "jsd"), "jsd", {"off_policy": 0.5}, "slope, importance", "exact"),
    "rollout, no ratio": (
        zoo("sequence_opd_plus", "jsd"),
        "jsd",
        {"off_policy": 0.5, "granularity": "sequence"},
        "importance",
        "exact",
    ),
    "outer discount": (
        zoo("return_to_go", "jsd", gamma=0.5),
        "jsd",
        {"gamma": 0.5, "granularity": "token_return"},
        "position",
        "exact",
    ),
    "no return": (zoo("opd_plus", "jsd"), "jsd", {"granularity": "token_return"}, "granularity", "exact"),
    "no product": (zoo("opd_plus", "jsd"), "jsd", {"granularity": "sequence"}, "granularity", "exact"),
    "a return too many": (zoo("return_to_go", "jsd", gamma=1.0), "jsd", {}, "granularity", "exact"),
    "truncated": (zoo("topk_truncated", "reverse_kl", k=2), "reverse_kl", {}, "vocabulary", "exact"),
    "truncated by one": (zoo("topk_truncated", "reverse_kl", k=3), "reverse_kl", {}, "tail", "exact"),
    "renormalised": (zoo("topk_renormalised", "jsd", k=2), "jsd", {}, "vocabulary", "exact"),
    "bucket": (zoo("topk_tail", "jsd", k=2, support="student"), "jsd", {}, "vocabulary", "exact"),
    "top-k as reward": (zoo("topk_reward", "jsd", k=2), "jsd", {}, "vocabulary", "exact"),
    "power": (zoo("power", alpha=0.5), "reverse_kl", {}, "replace", "exact"),
    "group mean": (zoo("opd_plus", "jsd", baseline="group_mean"), "jsd", {"batch_size": 2}, "baseline", "exact"),
    "group mean of 4": (zoo("opd_plus", "jsd", baseline="group_mean"), "jsd", {"batch_size": 4}, "baseline", "exact"),
    "group mean, stop-gradient": (
        zoo("opd", "forward_kl", baseline="group_mean"),
        "forward_kl",
        {"batch_size": 2},
        # Where lengths differ, a mean that includes the sample itself biases too, and no single term cures both.
        "replace",
        "exact",
    ),
    "leave-one-out, stop-gradient": (
        zoo("opd", "jsd", baseline="leave_one_out"),
        "jsd",
        {"batch_size": 2},
        "slope",
        "exact",
    ),
    "z-score of 2": (zoo("opd_plus", "jsd", zscore=True), "jsd", {"batch_size": 2}, "baseline", "exact"),
    "z-score of 3": (zoo("opd", "forward_kl", zscore=True), "forward_kl", {"batch_size": 3}, "baseline", "exact"),
}


# What the text of the first remedy must say.
WORDS = {
    "stop-gradient forward KL": "u*log(u) + u",
    "sign and factor": "-1/2",
    "positions": "1, 0.5, 0.25",
    "clip inside the grid": "[-2, 2]",
    "bucket": "student's 2 likeliest",
    "token mean, stop-gradient": "mask.sum() / B (T11). Add to the advantage u f'(u)",
    "group mean": "G/(G-1) = 2:",
    "group mean of 4": "leave-one-out mean in place of the group mean, or multiply by G/(G-1) = 4/3:",
    "outer discount": "gamma = 0.5",
    "PPO": "clip none",
    "rollout mean of two": "each rollout's tokens",
    "longest rollout": "longest rollout of the batch",
    "padded length": "loss * mask.shape[1]",
}


# Every third case each time, all of them with the slow tests.
@pytest.mark.parametrize("case", some(CASES, 9))
def test_the_intended_remedy_comes_first_and_is_verified(case: str) -> None:
    loss, objective, settings, kind, verdict = CASES[case]
    # Half of the pairs, to save time; those left out refute least.
    found = cure(loss, objective, pairs=3, **settings)
    assert found and len(found) <= 3
    assert (found[0].kind, found[0].verdict, found[0].verified) == (kind, verdict, True)
    assert WORDS.get(case, "") in found[0].text
    assert all(remedy.verified == (remedy.verdict in FAITHFUL) for remedy in found)
    assert all(
        remedy.text.endswith(".") and "(T" in remedy.text or remedy.kind in ("sign", "scale") for remedy in found
    )
    json.dumps([dataclasses.asdict(remedy) for remedy in found], allow_nan=False)


def test_a_loss_in_float32_is_cured_within_its_rounding() -> None:
    report = audited(in_float32, "forward_kl", tolerance=1e-4)
    assert report.verdict == "biased"
    first = remedies(in_float32, report=report)[0]
    assert (first.kind, first.verdict) == ("slope", "exact")
    assert first.text.startswith("Add to the advantage u f'(u)")


def test_an_exact_loss_needs_nothing() -> None:
    assert cure(zoo("opd_plus", "jsd"), "jsd") == []


def test_nothing_is_offered_where_the_verdict_refuses_all() -> None:
    loss = zoo("opd", "forward_kl")
    report = audited(loss, "forward_kl")
    assert remedies(loss, report=report, verdict=lambda _: ("biased", 1.0)) == []


def test_an_improvement_must_be_one() -> None:
    """A loss that is right up to a factor is not cured by another factor."""
    loss = times(3.0, zoo("opd_plus", "jsd"))
    report = audited(loss, "jsd")
    assert report.verdict == "exact_up_to_scale"
    assert remedies(loss, report=report, verdict=lambda _: ("exact_up_to_scale", 1.0)) == []


def test_variable_lengths_are_part_of_the_cure() -> None:
    """At fixed length a token mean is a matter of scale; where it fails at variable length, a factor is refused."""
    loss = zoo("opd_plus", "jsd", reduction="token_mean")
    fixed = audited(loss, "jsd")
    assert [remedy.kind for remedy in remedies(loss, report=fixed)][0] == "scale"
    both = dataclasses.replace(fixed, variable_lengths=VariableLengths("biased", 0.2))
    assert [remedy.kind for remedy in remedies(loss, report=both)] == ["reduction"]


def test_claim_what_it_descends() -> None:
    loss = zoo("k3_loss")
    report = dataclasses.replace(
        audited(loss, "reverse_kl"),
        verdict="other_objective",
        identified=Identified("forward_kl", "token_local", {}, 1.0, 1e-15),
    )
    k2, claim = remedies(loss, report=report)
    assert (k2.kind, claim.kind, claim.verdict) == ("k2", "claim", "exact")
    assert claim.text.startswith("Claim forward_kl (token_local) instead")
    assert [remedy.kind for remedy in remedies(loss, report=report, limit=1)] == ["k2"]
    doubled = dataclasses.replace(report, identified=Identified("forward_kl", "token_local", {}, 2.0, 1e-15))
    assert remedies(loss, report=doubled)[1].verdict == "exact_up_to_scale"


def test_a_gauge_says_that_another_divergence_is_descended() -> None:
    jsd = {remedy.kind: remedy for remedy in cure(zoo("opd", "jsd"), "jsd")}["gauge"]
    assert not jsd.verified and "another divergence" in jsd.text and "0.346574" in jsd.text
    hellinger = {remedy.kind: remedy for remedy in cure(zoo("opd", "hellinger"), "hellinger")}["gauge"]
    assert hellinger.verified and "another" not in hellinger.text
    log_u = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for name in ("forward_kl", "chi2"):
        divergence = opd.divergence(name)
        assert gauge_shift(Curve(log_u, -divergence.generator(log_u)), divergence) is None


def test_a_tail_of_several_tokens_is_nearer_but_no_cure() -> None:
    loss = zoo("topk_truncated", "reverse_kl", k=2)
    report = audited(loss, "reverse_kl")
    tail = {remedy.kind: remedy for remedy in remedies(loss, report=report)}["tail"]
    assert not tail.verified and tail.verdict == "biased" and tail.relative_bias < report.relative_bias
    assert "coarser" in tail.text


def test_a_loss_that_fails_on_changed_inputs_is_no_error() -> None:
    def fussy(r: Rollouts) -> Tensor:
        if float(r.mask.sum()) == 1.0 and r.mask.shape[1] > 1:
            raise RuntimeError("needs more than one token")
        return k1_loss(r)

    assert "k2" in [remedy.kind for remedy in cure(fussy, "reverse_kl")]
    assert attempt(lambda: 1 / 0) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limit": 0}, "limit"),
        ({"pairs": 0}, "pairs"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    loss = zoo("opd", "jsd")
    with pytest.raises(InvalidArgumentError, match=named):
        remedies(loss, report=audited(loss, "jsd"), **arguments)


@pytest.mark.slow
def test_the_work_is_bounded_in_calls() -> None:
    """Calls rather than seconds, which a busy machine changes."""
    cases: list[tuple[Loss, str, dict[str, Any]]] = [
        (zoo("opd", "forward_kl"), "forward_kl", {}),
        (zoo("opd", "forward_kl", zscore=True), "forward_kl", {"batch_size": 4}),
    ]
    for loss, objective, settings in cases:
        report, count = audited(loss, objective, **settings), 0

        def counted(r: Rollouts, loss: Loss = loss) -> Tensor:
            nonlocal count
            count += 1
            return loss(r)

        remedies(counted, report=report)
        assert count < 1500
