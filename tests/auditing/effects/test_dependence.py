"""What a token's weight depends on, all experiments together."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.effects.dependence import dependence
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from tests.auditing.effects.subjects import Loss, of
from tests.labels import label


@pytest.mark.parametrize(
    "loss",
    [
        opd.estimator("k2_loss"),
        opd.estimator("opd", "forward_kl"),
        opd.estimator("full_vocab", "jsd"),
        opd.estimator("opd_plus", "reverse_kl", baseline="vocabulary"),
        opd.estimator("return_to_go", "jsd", gamma=0.0),
    ],
    ids=label,
)
def test_ratio_alone(loss: Loss) -> None:
    found = of(loss)
    assert found.ratio_only and found.position is None and not found.other_tokens
    assert not found.batch and not found.sampling_policy and found.top_k is None
    assert found.words == ["The weight of a token is a function of its own ratio alone, the same at every position."]
    json.dumps(dataclasses.asdict(found))


def test_zero_gradient_depends_on_nothing() -> None:
    for loss in (opd.estimator("k1_loss"), opd.estimator("topk_reward", "jsd", k=2)):
        found = of(loss)
        assert found.ratio_only and "nothing that it could depend on" in found.words[0]


def test_a_loss_that_refuses_a_shape_is_still_described() -> None:
    def loss(r: Rollouts) -> Tensor:
        if r.tokens.shape[1] == 2:
            raise RuntimeError("two tokens are beneath me")
        return r.token_sum(r.log_u.square() / 2)

    found = of(loss)
    assert any("two tokens are beneath me" in text for text in found.words)
    assert found.ratio_only


def test_large_batches_say_what_was_not_looked_at() -> None:
    found = of(opd.estimator("opd_plus", "jsd", baseline="leave_one_out"), batch_size=9)
    assert any("were not looked at" in text for text in found.words)
    assert found.batch


def test_bad_settings() -> None:
    loss = opd.estimator("k2_loss")
    weight = recover_weight(loss, Scenario())
    with pytest.raises(InvalidArgumentError, match="tolerance: must be a number above 0, got 0.0"):
        dependence(loss, weight, Scenario(), tolerance=0.0)
    with pytest.raises(InvalidArgumentError, match="batch_size: must be an integer of at least 1, got 0"):
        dependence(loss, weight, Scenario(batch_size=0))
