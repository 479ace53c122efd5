"""What the files of a run say: the same as its arrays, over its steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from examples.runs import formats
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring import Monitor
from tests.monitoring.runs import drawn, laws

STEPS = 5


def steps(temperature: float = 1.0) -> list[dict]:
    log_p, log_q = laws(200, 10, seed=0, apart=0.5)
    found = []
    for seed in range(STEPS):
        rows = drawn(log_p, log_q, rollouts=32, length=20, seed=seed, temperature=temperature)
        step = {name: rows[name].float() for name in ("student", "teacher", "entropy")}
        if temperature != 1.0:
            step["behavior"] = rows["behavior"].float()
        step["mask"] = torch.arange(20) < torch.randint(5, 21, (32, 1), generator=torch.Generator().manual_seed(seed))
        found.append(step)
    return found


@pytest.mark.parametrize("name", ["own jsonl.gz", "TRL jsonl", "verl pt", "slime samples", "OpenRLHF", "verl parquet"])
@pytest.mark.filterwarnings("ignore::opdtheory.monitoring.CollapseWarning")
def test_files_say_what_arrays_say(name, tmp_path):
    run = steps()
    monitor = Monitor("opd", "forward_kl")
    for number, step in enumerate(run):
        monitor.add(step["student"], step["teacher"], mask=step["mask"], entropy=step["entropy"])
        monitor.step(number)
    direct = monitor.diagnosis()
    found = opd.diagnose_file(formats.WRITERS[name][1](tmp_path, run), "opd", "forward_kl")
    assert found.tokens == direct.tokens and found.verdict == direct.verdict == "collapse"
    assert torch.allclose(found.sums.table, direct.sums.table, rtol=1e-9, atol=1e-9)
    assert [step.number for step in found.steps] == list(range(STEPS))
    assert found.first_warning == direct.first_warning
    assert formats.WRITERS[name][0] in found.source


def test_a_run_of_a_sound_estimator_has_no_warning(tmp_path):
    path = formats.own_jsonl(tmp_path, steps())
    found = opd.diagnose_file(path, "opd_plus", "forward_kl")
    assert found.warnings == () and found.first_warning is None
    assert opd.diagnose_file(path, opd.estimator("opd_plus", "forward_kl")).zoo == found.zoo


def test_a_sampler_of_its_own_is_seen(tmp_path):
    path = formats.own_jsonl(tmp_path, steps(temperature=0.6))
    assert opd.diagnose_file(path, "opd_plus", "jsd").verdict == "other_samples"
    # The twin: read without it, the entropies still tell.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["behavior_logprobs"]
    twin = formats.write_lines(tmp_path / "twin.jsonl", lines)
    assert "not_own_probabilities" in [each.name for each in opd.diagnose_file(twin, "opd_plus", "jsd").findings]


def test_names_of_ones_own_are_mapped(tmp_path):
    rows = [{"t": 3, "p": [-1.0, -2.0], "q": [-1.5, -1.0], "m": [1, 0]}] * 12
    path = formats.write_lines(tmp_path / "mine.jsonl", rows)
    with pytest.raises(InvalidArgumentError, match="student"):
        opd.diagnose_file(path)
    found = opd.diagnose_file(path, student="p", teacher="q", mask="m")
    assert found.tokens == 12 and found.log_u[0.5] == pytest.approx(-0.5)


def test_what_is_left_out_is_said_and_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    path = formats.own_jsonl(tmp_path, steps())
    path.write_text(path.read_text() + '{"step": 9, "student_logprobs": [-1.0')
    found = opd.diagnose_file(path, "opd_plus", "jsd")
    assert any("cut off" in each for each in found.left_out) and "cut off" in str(found)
    assert torch.get_num_threads() == before


def test_progress_is_told(tmp_path):
    told: list[tuple[int, int]] = []
    path = formats.own_jsonl(tmp_path, steps())
    opd.diagnose_file(path, "opd_plus", "jsd", progress=lambda done, total: told.append((done, total)))
    size = Path(path).stat().st_size
    assert told[-1] == (size, size)
