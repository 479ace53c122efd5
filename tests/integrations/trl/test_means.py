"""What each `loss_type` is, and which settings are named as disturbances."""

from __future__ import annotations

import pytest
from trl import GRPOConfig

from opdtheory.integrations.trl.means import disturbances, mean_of, other_laws
from tests.integrations.trl.builders import quiet

pytestmark = quiet

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_reductions_and_scales() -> None:
    assert mean_of("dr_grpo", 8) == ("token_sum", 0.125) and mean_of("luspo", 8) == ("token_sum", 1.0)
    assert {mean_of(name, 8) for name in ("dapo", "bnpo", "cispo", "vespo")} == {("token_mean", None)}
    assert {mean_of(name, 8) for name in ("grpo", "sapo")} == {("sequence_mean", None)}
    assert mean_of("new", 8) == ("unknown", None)


def test_the_defaults_disturb_nothing(tmp_path) -> None:
    assert disturbances(GRPOConfig(str(tmp_path), **CPU)) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"importance_sampling_level": "sequence"},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.2},
        {"off_policy_mask_threshold": 0.5},
        {"top_p": 0.9},
        {"top_k": 50},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_each_disturbance_is_named(tmp_path, setting: dict) -> None:
    found = disturbances(GRPOConfig(str(tmp_path), **CPU, **setting))
    assert len(found) == 1 and found[0].startswith(next(iter(setting)))


def test_options_of_generation_count_too(tmp_path) -> None:
    args = GRPOConfig(str(tmp_path), **CPU, temperature=0.7, generation_kwargs={"temperature": 1.0, "top_k": 5})
    assert [words.partition("=")[0] for words in other_laws(args)] == ["temperature", "top_k"]
