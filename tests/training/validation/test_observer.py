"""The validation of a run while it trains."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.trainer import train
from tests.training.runs import TASK, config, model


def test_a_run_reports_its_validation() -> None:
    fields = {"estimator": "opd", "divergence": "forward_kl", "steps": 3, "clip_log_ratio": 1.0}
    rows = train(config(validate_every=2, **fields), student=model(0), teacher=model(1, 24), task=TASK).rows
    assert ["validation_z" in row for row in rows] == [False, True, True]
    assert rows[1]["validation_agrees"] == 1.0 and rows[1]["validation_bias"] > 0.1
    plain = train(config(**fields), student=model(0), teacher=model(1, 24), task=TASK).rows
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows]
    for wrong in (
        {"estimator": "sequence_opd_plus", "divergence": "jsd"},
        {"control": "supervised"},
        {"control": "exact_opd", "divergence": "jsd"},
    ):
        with pytest.raises(InvalidArgumentError, match="validate_every"):
            config(validate_every=1, **wrong)


def _validated(**fields: object) -> dict[str, float]:
    settings = config(validate_every=1, steps=1, warmup_steps=0, **fields)
    row: dict[str, float] = train(settings, student=model(0), teacher=model(1, 24), task=TASK).rows[0]
    return row


def test_a_sampler_at_another_temperature_is_a_bias_unless_it_is_weighted() -> None:
    itself, blind = _validated(), _validated(sampling_temperature=0.7)
    weighted = _validated(sampling_temperature=0.7, importance="token")
    assert itself["validation_bias"] < 1e-9 and weighted["validation_bias"] < 1e-9
    assert blind["validation_bias"] > 0.1
    # Theory predicts the bias (T8).
    for row in (itself, blind, weighted):
        assert row["validation_agrees"] == 1.0
        assert row["validation_bias"] == pytest.approx(row["validation_predicted_bias"], abs=1e-9)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"zscore": True, "rollouts_per_prompt": 2}, "the rollouts of a prompt are compared with each other"),
        ({"baseline": "vocabulary"}, "without importance weights its baseline biases"),
        ({"importance": "gspo"}, "importance='gspo' looks beyond the token"),
        ({"importance": "prefix"}, "importance='prefix' looks beyond the token"),
        ({"control": "constant_advantage", "advantage": 1.0}, "its advantage has a zero mean on-policy only"),
        ({"estimator": "topk_reward", "divergence": "jsd", "k": 3}, "its advantage has a zero mean on-policy only"),
    ],
)
def test_what_theory_does_not_state_off_policy_is_refused(fields: dict[str, object], why: str) -> None:
    config(validate_every=1, **fields)  # on-policy it does
    config(sampling_temperature=0.7, **fields)
    with pytest.raises(InvalidArgumentError, match=f"^validate_every: .*sampling_temperature=0.7: {why}"):
        config(validate_every=1, sampling_temperature=0.7, **fields)
