"""Made-up rows of the experiment: a world of arms whose accuracies can be changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from opdtheory.reproduction import arm as reproduce_arm
from opdtheory.reproduction.plan import FULL, Arm, Group

DOCS = Path(__file__).parents[2] / "docs"
ARMS = {arm.name: arm for arm in FULL.arms() if (arm.task, arm.seed) == ("arithmetic", 0) and arm.group != "tuning"}

# Sampled accuracies at the end of made-up runs; the start is 0.2.
WORLD = {
    "reverse_kl/opd": 0.60,
    "reverse_kl/opd_plus": 0.61,
    "forward_kl/opd": 0.0,
    "forward_kl/opd_plus": 0.45,
    "jsd/opd": 0.0,
    "jsd/opd_plus": 0.59,
    "jsd/top 8 and tail": 0.7,
    "jsd/full_vocab": 0.71,
}


def row(name: str, accuracy: float, seed: int = 0, task: str = "arithmetic", arm: Arm | None = None) -> dict:
    """A finished row, of the common learning rate if no arm is given."""
    if arm is None:
        arm = ARMS[name].at_rate(ARMS[name].fields["learning_rate"], group_of(name), seed)
        arm = dataclasses.replace(arm, task=task)

    def evaluation(share: float, distance: float) -> dict:
        measures = {f"test_{each}": distance for each in ("reverse_kl", "forward_kl", "entropy")}
        return {"test_sampled_accuracy": share, "greedy_accuracy": share, **measures}

    curve = {"step": [1, 200], "sampled_accuracy": [0.2, accuracy]}
    curve |= {each: [1.0, 0.5] for each in ("reverse_kl", "entropy", "response_length")}
    return {
        **{key: value for key, value in arm.to_dict().items() if key != "fields"},
        "identity": arm.identity,
        "models": reproduce_arm.model_keys(task, seed),
        "status": "finished",
        "machine": {"processor": "a machine", "cores": 2, "torch": "2", "python": "3"},
        "bias": {"bias": 1.5, "predicted_bias": 1.5, "cosine": -0.5, "variance": 3.0},
        "objective": [1.0, 0.5],
        "start": evaluation(0.2, 0.7),
        "end": evaluation(accuracy, 0.1 if accuracy > 0.2 else 9.0),
        "curve": curve,
        "means": {"gradient_norm": 1.0, "clip_fraction": 0.05},
        "seconds": 30.0,
        "processor_seconds": 30.0,
    }


def group_of(name: str) -> Group:
    """The group of an arm at the common learning rate."""
    return ARMS[name].group


def world(**changes: float) -> list[dict]:
    """The rows of three seeds, some accuracies changed."""
    values = {**WORLD, **changes}
    return [row(name, max(0.0, value + 0.01 * (seed - 1)), seed) for name, value in values.items() for seed in range(3)]


def recorded() -> dict[str, dict[str, object]]:
    """The record of the validations."""
    return json.loads((DOCS / "validation.json").read_text(encoding="utf-8"))
