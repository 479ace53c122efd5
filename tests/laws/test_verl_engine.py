"""The plug-in inside verl itself, and the stand-in against it; skipped where verl is not installed."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opdtheory.end_to_end import audit_update
from tests.integrations import verl_stand_in

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "trainers"

# Of the engine, which works in float32.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def examples() -> Iterator[SimpleNamespace]:
    sys.path.insert(0, str(EXAMPLES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import verl_settings
        import verl_update

        yield SimpleNamespace(settings=verl_settings, update=verl_update)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.path.remove(str(EXAMPLES))


def test_the_stand_in_has_the_signatures_of_verl(examples: SimpleNamespace) -> None:
    from verl.trainer.distillation import losses
    from verl.trainer.ppo import core_algos
    from verl.workers.utils import padding

    ours = verl_stand_in.modules()
    for real, names in (
        (core_algos, ("register_policy_loss", "register_adv_est", "agg_loss")),
        (losses, ("register_distillation_loss",)),
        (padding, ("no_padding_2_padding",)),
    ):
        for name in names:
            found = getattr(ours[real.__name__], name)
            assert list(inspect.signature(found).parameters) == list(inspect.signature(getattr(real, name)).parameters)
    fields = inspect.signature(losses.DistillationLossSettings).parameters
    assert {"names", "use_topk", "use_estimator"} <= set(fields)


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "token-mean"])
def test_the_stand_in_reduces_and_pads_as_verl_does(examples: SimpleNamespace, mode: str) -> None:
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.workers.utils.padding import no_padding_2_padding

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    for batch in ({}, {"dp_size": 2, "batch_num_tokens": 11, "global_batch_size": 5}):
        expected = agg_loss(values, mask, mode, **batch)
        assert verl_stand_in.agg_loss(values, mask, mode, **batch) == pytest.approx(float(expected), rel=1e-14)
    data = {
        "prompts": torch.ones(3, 2, dtype=torch.int64),
        "responses": mask,
        "attention_mask": torch.cat([torch.ones(3, 2, dtype=torch.int64), mask], 1),
    }
    flat = torch.randn(int(data["attention_mask"].sum()), 1, generator=generator)
    assert torch.equal(verl_stand_in.no_padding_2_padding(flat, data), no_padding_2_padding(flat, _td(data)))


def _td(data: dict[str, torch.Tensor]) -> object:
    from tensordict import TensorDict

    return TensorDict(data, batch_size=3)


def test_the_engine_descends_what_is_registered(examples: SimpleNamespace) -> None:
    found = {row.words: row for row in examples.settings.our_rows()}
    for words in (
        "opd_plus_jsd, policy gradient, seq-mean-token-sum",
        "policy_loss.loss_mode=opd_plus_jsd, seq-mean-token-sum",
    ):
        row = found[words]
        report = audit_update(examples.update.Update(row.setting), row.claim, variants=False)
        assert report.verdict == "exact"
        assert max(report.error, abs(report.scale - 1.0)) < ROUNDING


def test_the_engine_s_wrong_twins_are_seen(examples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    row = examples.settings.our_rows()[2]
    assert row.words.startswith("opd_plus_jsd")
    assert audit_update(examples.update.Update(row.setting), "forward_kl", variants=False).verdict == "other_objective"
    sound = examples.update._batch

    def late(*arguments: object) -> object:
        """The teacher's log-probabilities one token late, as a server would send that does not shift them."""
        fields, mask = sound(*arguments)
        fields["teacher_logprobs"] = [values.roll(1, 0) for values in fields["teacher_logprobs"]]
        return fields, mask

    monkeypatch.setattr(examples.update, "_batch", late)
    report = audit_update(examples.update.Update(row.setting), "jsd", variants=False)
    assert report.verdict == "biased"
    assert report.error > 0.1


def test_the_monitor_reads_the_engines_batches_and_changes_no_gradient() -> None:
    root = EXAMPLES.parents[1]
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); import verl_platform\n"
        "script = sys.argv[1] + '/verl_monitor.py'; sys.argv[:] = [script]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(EXAMPLES)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("same bits True") == 7
