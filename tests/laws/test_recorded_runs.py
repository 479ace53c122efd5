"""The small files of real runs are what their scripts make, and the monitor's record holds what TRL's object does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opdtheory.integrations.trl.monitor import OPDMonitor
from opdtheory.integrations.verl_monitor import tokens_of
from opdtheory.monitoring.tokens import SampledTokens
from tests.integrations.trl.builders import quiet
from tests.integrations.trl.monitored import a_pair, built, trained
from tests.integrations.trl.recorded import FOLDER, NOISE, Engine, output, record

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")]


def kept(name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(FOLDER / name, weights_only=True)
    return found


def test_the_object_of_trl_is_that_of_the_file() -> None:
    found, wanted = output(), kept("trl_grpo.pt")
    assert set(found) == set(wanted) and "old_per_token_logps" not in wanted  # absent on-policy
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_an_engine_that_scores_its_own_tokens() -> None:
    found, wanted = output(Engine, num_iterations=2), kept("trl_grpo_engine.pt")
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, atol=1e-6, equal_nan=True), name
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "completion_mask")
    tokens = SampledTokens.of(*(wanted[name] for name in names))
    assert tokens.left_out == {"nan": 1} and tokens.behavior is not None
    lost = tokens.student - tokens.behavior
    assert (
        0 <= float(lost.min())
        and float(lost.max()) <= NOISE
        and len(tokens) == int(wanted["completion_mask"].sum()) - 1
    )


def test_the_record_has_the_engines_log_probabilities(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    trainer = built(Engine, a_pair(), num_iterations=2, max_steps=1)
    with OPDMonitor(record=path).attach(trainer):
        trained(trainer)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    values = [x for row in rows for x in row["sampling_per_token_logps"]]
    assert values.count(None) == 1
    wanted = kept("trl_grpo_engine.pt")["sampling_per_token_logps"]
    alive = kept("trl_grpo_engine.pt")["completion_mask"] > 0
    numbers = sorted(float(x) for x in values if x is not None)
    assert numbers == pytest.approx(sorted(x for x in wanted[alive].tolist() if x == x), abs=1e-6)


def test_the_record_is_that_of_the_file(tmp_path: Path) -> None:
    record(tmp_path / "run.jsonl")
    found, wanted = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "run.jsonl", FOLDER / "trl_grpo_record.jsonl")
    )
    assert len(found) == len(wanted) == 24
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], abs=1e-5) for name in one)


def test_the_batch_of_verl() -> None:
    """The engine's log-probabilities of the four rollouts of `examples/trainers/verl_monitor.py`."""
    batch = kept("verl_batch.pt")
    found = tokens_of(batch)
    mask = batch["response_mask"] > 0
    assert torch.equal(found.student, batch["old_log_probs"])
    # verl's teacher and the reference model were the same model.
    assert torch.allclose(found.teacher[mask], batch["ref_log_prob"][mask], atol=1e-6)
    assert int(mask.sum()) == 7 and batch["teacher_logprobs"].shape[-1] == 1
