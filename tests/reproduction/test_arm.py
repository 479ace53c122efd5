"""One arm: what it measures, and its failures."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from opdtheory.reproduction import arm as reproduce_arm
from opdtheory.reproduction.plan import FULL
from opdtheory.reproduction.summary import summaries
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.tasks import Addition


@pytest.fixture
def tiny(monkeypatch):
    """Untrained models of a small task in the place of the cache's."""
    task = Addition(2)

    def model(seed: int, width: int) -> Transformer:
        built = Transformer(TransformerConfig(width, 1, 2, 64), task.vocabulary, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        return built

    monkeypatch.setattr(reproduce_arm, "_models", lambda *_: (model(0, 8), model(1, 12)))
    monkeypatch.setattr(reproduce_arm, "task_of", lambda _: task)
    return dataclasses.replace(FULL, steps=2, seeds=1, tasks=("arithmetic",), eval_examples=4)


def small(plan, name):
    arm = next(arm for arm in plan.arms() if arm.name == name)
    return dataclasses.replace(arm, fields={**arm.fields, "prompts_per_step": 3, "max_new_tokens": 5})


def test_an_arm_measures_its_start_and_its_end(tiny):
    found = reproduce_arm.run_arm(small(tiny, "forward_kl/opd"), device="cpu")
    assert found["status"] == "finished" and found["curve"]["step"] == [1, 2]
    assert found["bias"]["bias"] == pytest.approx(found["bias"]["predicted_bias"]) and found["bias"]["bias"] > 0.1
    assert found["start"]["step"] == 0 and found["end"]["step"] == 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert summaries([found])[0].seeds == (0,)
    more = reproduce_arm.run_arm(small(tiny, "constant advantage -1"), device="cpu")
    assert more["bias"] is None and more["objective"] == [0.0, 0.0]


def test_a_step_that_cannot_be_taken_makes_a_row(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arm = small(tiny, "jsd/opd_plus")
    arm = dataclasses.replace(arm, fields={**arm.fields, "learning_rate": 1e30, "clip_gradient": None, "steps": 3})
    found = reproduce_arm.run_arm(arm, device="cpu")
    assert found["status"] == "failed" and found["error"]
    assert summaries([found])[0].word == "fails"
