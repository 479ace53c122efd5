"""N processes take the same step as one with the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.distributed import Processes, processes
from opdtheory.training.records.rollouts import record_path
from tests.tolerances import ALGEBRA
from tests.training.runs import GROUPED, config, distance, gradients, trained

RUNS = Path(__file__).parent / "runs.py"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _environment(**more: object) -> dict[str, str]:
    base = {"PYTHONPATH": str(RUNS.parents[2]), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **base, **{key: str(value) for key, value in more.items()}}


_ABORTED = "terminate called without an active exception"


def _both(folder: Path) -> list[str]:
    """Run two gloo processes, and return what those that failed wrote."""
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, str(RUNS), "gradients", str(folder)],
            env=_environment(RANK=rank, LOCAL_RANK=rank, **place),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(process.communicate(timeout=200)[1], process.returncode) for process in started]
    return [errors for errors, status in ended if status != 0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two gloo processes leave: each one's gradient of the first step, and a whole run."""
    folder = tmp_path_factory.mktemp("two")
    for last in (False, True):
        failed = _both(folder)
        # Torch may abort a process of gloo while the interpreter shuts down, after its work; once is borne.
        if not failed or last or not all(_ABORTED in errors for errors in failed):
            break
    assert not failed, failed
    return folder


def test_two_processes_take_the_step_of_one(two: Path) -> None:
    # Five prompts do not halve: the processes hold two and three groups, with different counts of tokens.
    settings = config(**GROUPED)
    one, report, run = gradients(settings)
    (first, said), (second, said_too) = (torch.load(two / f"rank_{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert distance(first, one) < ALGEBRA
    assert said == said_too == pytest.approx(report, rel=1e-11, abs=1e-12)
    # The twin averages what each process finds for itself, as DistributedDataParallel does.
    mean = [torch.zeros_like(each) for each in one]
    for rank in range(2):
        own, _, _ = _alone(settings, rank)
        mean = [total + each / 2 for total, each in zip(mean, own, strict=True)]
    assert distance(mean, one) > 1e-3


def _alone(settings, rank: int):
    """The gradient of one process's share as if it were the whole batch."""
    from opdtheory.training import trainer

    share = Processes(rank, 2, torch.device("cpu")).share(settings.prompts_per_step)
    collect = trainer.collect

    def part(run, step):
        examples, samples = collect(run, step)
        rows = slice(3 * share.start, 3 * share.stop)
        return examples[rows], samples.rows(rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "collect", part)
        return gradients(settings)


def test_two_processes_finish_the_run_of_one(two: Path, tmp_path: Path) -> None:
    straight = trained(tmp_path, **GROUPED, eval_examples=7, record_every=3)
    first, second = (torch.load(two / f"state_{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # AdamW divides by the gradient's size, so rounding grows where a gradient is nearly zero.
    assert max(float((first[name] - straight[name]).abs().max()) for name in straight) < 1e-8
    one, other = (folder.joinpath("metrics.jsonl").read_text() for folder in (tmp_path, two / "run"))
    assert _accuracies(one) == _accuracies(other)
    # The monitor sees the rollouts of both.
    rows = [json.loads(line) for line in other.splitlines()]
    assert [row.get("opd/tokens") for row in rows] == [row.get("tokens") for row in rows]
    # One file holds the rollouts of both, in the order of the prompts.
    for step in (3, 6):
        alone, both = (torch.load(record_path(folder, step), weights_only=True) for folder in (tmp_path, two / "run"))
        assert alone.keys() == both.keys()
        assert all(float((value - both[name]).abs().max()) < 1e-8 for name, value in alone.items())
    assert [path.name for path in (two / "run").iterdir() if path.suffix == ".json"] == []


def _accuracies(text: str) -> list[tuple[object, ...]]:
    names = ("step", "sampled_accuracy", "greedy_accuracy", "response_length", "tokens")
    return [tuple(json.loads(line).get(name) for name in names) for line in text.splitlines()]


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _free_port()]
    command += [RUNS, "gradients", tmp_path]
    subprocess.run([str(part) for part in command], env=_environment(), check=True, timeout=300)
    one, _, _ = gradients(config(**GROUPED))
    assert distance(torch.load(tmp_path / "rank_1.pt")[0], one) < ALGEBRA


@pytest.mark.parametrize("count", [0, 1, 5, 8, 13])
def test_shares_make_up_the_whole(count: int) -> None:
    for size in (1, 2, 3, 8):
        shares = [Processes(rank, size, torch.device("cpu")).share(count) for rank in range(size)]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group() -> None:
    with processes("cpu") as team:
        assert (team.rank, team.size, team.is_first) == (0, 1, True)
        values = torch.tensor([1.0, 2.0])
        assert team.total(values) is values and team.from_first("x") == "x"
        assert team.gather("x") == ["x"]
        team.wait()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["nonsense", "cpuu"])
def test_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="device"), processes(name):
        pass
