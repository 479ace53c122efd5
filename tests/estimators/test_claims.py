"""Every claim against an expectation enumerated by hand, and the assumptions it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opdtheory.estimators import Claim, Estimator, estimator, estimator_names
from tests.estimators.pairs import (
    CLAIMS,
    WEIGHTS,
    Pair,
    expected_gradient,
    pair,
    sequence,
    token_local,
    token_return,
    verdict,
)
from tests.sparse import some


def objective(claim: Claim, policies: Pair) -> Tensor:
    name = claim.divergence.name
    if claim.granularity == "token_local":
        return token_local(WEIGHTS[name], policies)
    if claim.granularity == "sequence":
        return sequence(name, policies)
    return token_return(name, policies, claim.gamma)


def is_coupled(loss: Estimator) -> bool:
    return any(option in ("baseline", "zscore") for option, _ in loss.options) and "batch" in str(loss.claim)


def found(loss: Estimator, *, eos: bool, off_policy: bool, horizon: int = 2) -> str:
    # Two pairs in one vector, so that a scale must be common to both.
    size = 2 if is_coupled(loss) else 1
    vocabulary = 3 if size == 2 else 4
    panel = [pair(seed, vocabulary, horizon, eos, off_policy) for seed in (11, 12)]
    got = torch.cat([expected_gradient(loss, policies, size) for policies in panel])
    exact = torch.cat([objective(loss.claim, policies) for policies in panel])
    result = verdict(got, exact)
    if result == "biased" and loss.claim.verdict == "other_objective":
        other = torch.cat([token_local(WEIGHTS[loss.claim.descends], policies) for policies in panel])
        return "other_objective" if verdict(got, other) in ("exact", "exact_up_to_scale") else "biased"
    return result


@pytest.mark.parametrize("loss", some(CLAIMS, ids=map(repr, CLAIMS)))
def test_claim_holds_under_its_assumptions(loss: Estimator) -> None:
    assumptions = loss.claim.assumptions
    assert found(loss, eos=False, off_policy=False) == loss.claim.verdict
    if not assumptions.fixed_length:
        assert found(loss, eos=True, off_policy=False) == loss.claim.verdict
    if assumptions.sampler == "on_policy_or_one_step":
        assert found(loss, eos=False, off_policy=True, horizon=1) == loss.claim.verdict
    elif assumptions.sampler == "any":
        assert found(loss, eos=not assumptions.fixed_length, off_policy=True) == loss.claim.verdict


@pytest.mark.parametrize(
    ("loss", "setting"),
    [
        (estimator("opd_plus", "jsd"), {"eos": False, "off_policy": True}),
        (estimator("k2_loss"), {"eos": False, "off_policy": True}),
        (estimator("k1_loss"), {"eos": False, "off_policy": True}),
        (estimator("k1_reward", importance="token"), {"eos": False, "off_policy": True}),
        (estimator("opd_plus", "jsd", importance="ppo"), {"eos": False, "off_policy": True}),
        (estimator("full_vocab", "jsd"), {"eos": False, "off_policy": True}),
        (estimator("opd_plus", "jsd", importance="tis", clip_range=1.1), {"eos": False, "off_policy": True}),
        (estimator("k2_loss", importance="mask", keep_range=(0.8, 1.25)), {"eos": False, "off_policy": True}),
        (estimator("opd_plus", "jsd", importance="gspo"), {"eos": False, "off_policy": True}),
        (estimator("topk_tail_sampled", "jsd", k=1), {"eos": False, "off_policy": True}),
        (estimator("topk_tail_sampled", "jsd", k=1, importance="token"), {"eos": False, "off_policy": True}),
        (estimator("opd_plus", "jsd", reduction="sequence_mean"), {"eos": True, "off_policy": False}),
        (estimator("opd_plus", "jsd", reduction="token_mean"), {"eos": True, "off_policy": False}),
        (estimator("k1_loss", reduction="token_mean"), {"eos": True, "off_policy": False}),
        (estimator("k1_reward", baseline="group_mean"), {"eos": True, "off_policy": False}),
    ],
    ids=repr,
)
def test_assumptions_are_needed(loss: Estimator, setting: dict[str, bool]) -> None:
    assert loss.claim.verdict != "biased"
    assert found(loss, **setting) == "biased"


def test_z_score_of_two_values_shows_its_bias_in_groups_of_four() -> None:
    loss = estimator("sign", zscore=True)
    assert loss.claim.assumptions.batch_size == 4 and loss.claim.assumptions.several_steps
    assert {"batch of at least 4", "more than one step"} <= set(loss.claim.assumptions.words)

    def of_size(size: int, horizon: int) -> str:
        policies = pair(11, 2, horizon)
        return verdict(expected_gradient(loss, policies, size), token_local(WEIGHTS["total_variation"], policies))

    assert of_size(2, 2) == of_size(3, 2) == of_size(4, 1) == "exact_up_to_scale"
    assert of_size(4, 2) == loss.claim.verdict == "biased"


def test_every_name_is_covered() -> None:
    assert {loss.name for loss in CLAIMS} == set(estimator_names())
