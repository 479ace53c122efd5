"""Loops of one's own: the sound ones pass, and each fault is named."""

from __future__ import annotations

import json

import pytest
import torch

import opdtheory as opd
from opdtheory.end_to_end import audit_update, trainer_pair
from opdtheory.end_to_end.claims import claimed_gradient
from opdtheory.end_to_end.played import play_update
from opdtheory.end_to_end.readings import PLAIN, Reading, gradient_of
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.objective import Objective
from tests.end_to_end import update_faults
from tests.end_to_end.update_faults import SOUND, loop, policy_gradient, reverse_kl
from tests.sparse import some
from tests.tolerances import ALGEBRA


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_update_is_exact(name: str) -> None:
    update, objective = SOUND[name]
    found = audit_update(update, objective, variants=name == "whole vocabulary")
    assert found.passes and found.verdict == "exact" and found.relative_bias < ALGEBRA, str(found)
    assert found.descends == f"{objective} (token_local)" and not found.reading
    assert all(variant.holds for variant in found.variants)


@pytest.mark.parametrize("name", some(update_faults.FAULTS))
def test_a_fault_is_named(name: str) -> None:
    update, phrase = update_faults.FAULTS[name]
    found = audit_update(update, "reverse_kl", variants=False)
    assert phrase in " ".join(found.words) and not found.passes, str(found)


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "jsd", "chi2"])
@pytest.mark.parametrize("size", [{"batch_size": 2}, {"batch_size": 1, "accumulate": 2}, {"batch_size": 1}])
def test_the_faithful_reading_is_the_oracle(objective: str, size: dict[str, int]) -> None:
    """Two routes: the outcomes that were played, and the oracle's recursion."""
    pair = trainer_pair(**size)
    played = play_update(SOUND["whole vocabulary"][0], pair)
    divergence = opd.divergence(objective)
    exact = claimed_gradient(pair, divergence, "token_local")
    gap = gradient_of(played, PLAIN, Objective.of(divergence)) - exact
    assert float(gap.norm()) < ALGEBRA * float(exact.norm())
    sampled = gradient_of(played, Reading(sampled=True), Objective.of(divergence)) - exact
    assert float(sampled.norm()) < 1e-10 * float(exact.norm())
    if objective == "reverse_kl":
        assert float((played.gradient - exact).norm()) < ALGEBRA * float(exact.norm())


def test_a_claim_may_be_a_mean() -> None:
    update, _ = update_faults.FAULTS["mean of all tokens"]
    found = audit_update(update, "reverse_kl", reduction="token_mean", variants=False)
    assert found.passes and found.verdict == "exact" and found.relative_bias < ALGEBRA
    own, _ = update_faults.FAULTS["mean of each rollout"]
    assert audit_update(own, "reverse_kl", reduction="any", variants=False).passes
    assert not audit_update(own, "reverse_kl", reduction="token_mean", variants=False).passes


@pytest.mark.parametrize(
    ("factor", "words"),
    some(
        [
            (lambda pair: 2.0 * pair.batch_size * pair.accumulate, "sums over the rollouts of a step"),
            (lambda pair: 1.0 / pair.horizon, "divides by the horizon"),
            (lambda pair: 0.3, "a constant factor"),
        ]
    ),
)
def test_the_cause_of_a_scale_is_found(factor, words: str) -> None:
    def update(pair, prompts, answers):
        loop(reverse_kl)(pair, prompts, answers)
        pair.student.model.table.grad *= factor(pair)

    found = audit_update(update, "reverse_kl")
    assert found.verdict == "exact_up_to_scale" and words in found.scale_cause, found.scale_cause
    assert found.scale == pytest.approx(factor(trainer_pair()))


def test_what_is_no_update_is_refused() -> None:
    def changes(pair, prompts, answers):
        loop(reverse_kl)(pair, prompts, answers)
        with torch.no_grad():
            pair.student.model.table += 0.1

    state = {"calls": 0}

    def remembers(pair, prompts, answers):
        state["calls"] += 1
        loop(reverse_kl)(pair, prompts, answers)
        pair.student.model.table.grad *= state["calls"]

    def infinite(pair, prompts, answers):
        loop(reverse_kl)(pair, prompts, answers)
        pair.student.model.table.grad[3, 0] = float("inf")

    for update, message in (
        (lambda pair, prompts, answers: None, "it left none"),
        (changes, "must not change the student"),
        (remembers, "keeps a state between steps"),
        (infinite, "not finite"),
    ):
        with pytest.raises(LossError, match=message):
            audit_update(update, "reverse_kl", variants=False)
    for arguments, message in (
        ({"method": "guess"}, "method"),
        ({"tolerance": 2.0}, "tolerance"),
        ({"prompts": ("x",)}, "letters"),
        ({"granularity": "word"}, "objective"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            audit_update(loop(reverse_kl), "reverse_kl", **arguments)
    with pytest.raises(BudgetExceededError, match="fewer rollouts"):
        audit_update(loop(reverse_kl), "reverse_kl", limit=10, method="exact")


def test_the_report_is_json_and_text() -> None:
    found = audit_update(update_faults.FAULTS["k3 loss"][0], "reverse_kl", name="k3", variants=True)
    record = json.loads(json.dumps(found.to_dict()))
    assert record["verdict"] == "other_objective" and record["passes"] is False
    assert record["descends"] == "forward_kl (token_local)" and record["objective"] == "reverse_kl"
    assert record["where"]["response"] == 1.0 and len(record["variants"]) == 4
    text = str(found)
    assert text.startswith("k3: OTHER OBJECTIVE") and "What was not asked:" in text
    assert max(map(len, text.splitlines())) <= 100


def test_teacher_forcing_by_another_policy_is_told_by_the_sampler() -> None:
    pair = trainer_pair()
    played = play_update(loop(policy_gradient(lambda x: x)), pair)
    from opdtheory.end_to_end.sampler import sampler_of

    assert sampler_of(played).kind == "student"
