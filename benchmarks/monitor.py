"""What the monitor costs: a step of a trainer with and without it, and the monitor alone on a large batch.

`python benchmarks/monitor.py` trains a small transformer with random weights on given completions with TRL's own
trainers and the plug-in's, and prints the median time of a step over alternating repeats (of the CPU, or on a GPU by
the clock) without the monitor, with it, and with its record; then the median time of `Monitor.add`, of `Monitor.step`
and of the record for a batch of sampled tokens. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl_plugins
from transformers import LlamaForCausalLM
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from opdtheory.integrations.trl import OPDMonitor, OPDPlusTrainer
from opdtheory.integrations.trl.monitor import write_rollouts
from opdtheory.integrations.trl.sampled import no_reward
from opdtheory.integrations.trl.taps import Taken
from opdtheory.machine import machine
from opdtheory.monitoring import Monitor


def step(build: Callable[..., Any], config: type, options: argparse.Namespace, folder: str, **settings: Any) -> Any:
    """A call that computes the gradient of a step and ends it; with an argument, within a monitor."""
    trainer = trl_plugins.trainer_of(build, config, options, folder, **settings)
    rows = next(iter(trainer.get_train_dataloader()))
    wrapped = trainer.model_wrapped

    def call(monitor: OPDMonitor | None = None) -> None:
        wrapped.train()
        trainer.training_step(wrapped, rows, None)
        wrapped.zero_grad()
        if monitor is not None:
            monitor.on_step_end(trainer.args, trainer.state, trainer.control)

    return trainer, call


def measured(options: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """The median seconds of a step of each trainer, by what watches it."""
    student, teacher = trl_plugins.model(options, 0), trl_plugins.model(options, 1)
    student.save_pretrained(f"{folder}/student")
    student = LlamaForCausalLM.from_pretrained(f"{folder}/student")

    def grpo(**rest: Any) -> Any:
        return trl_plugins.given(GRPOTrainer, trl_plugins.Sampled)(student, no_reward, **rest)

    def plus(**rest: Any) -> Any:
        return trl_plugins.given(OPDPlusTrainer, trl_plugins.Sampled)(student, teacher, divergence="jsd", **rest)

    def whole(**rest: Any) -> Any:
        return trl_plugins.given(DistillationTrainer, trl_plugins.Whole)(student, teacher, **rest)

    sampled = {"num_generations": 2, "loss_type": "dr_grpo"}
    cases: dict[str, tuple[Any, type, dict[str, Any]]] = {
        "GRPOTrainer": (grpo, GRPOConfig, {"beta": 0.1, **sampled}),
        "OPDPlusTrainer": (plus, GRPOConfig, sampled),
        "DistillationTrainer": (whole, DistillationConfig, {}),
    }
    return {
        name: watched(*step(build, config, options, folder, **settings), options, Path(folder) / name)
        for name, (build, config, settings) in cases.items()
    }


def watched(trainer: Any, call: Callable[..., None], options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The median seconds of a step without the monitor, with it, and with its record, in turn."""
    folder.mkdir()
    monitors = {"plain": None, "monitor": OPDMonitor(), "record": OPDMonitor(record=folder / "run.jsonl")}
    taken: dict[str, list[float]] = {name: [] for name in monitors}
    for repeat in range(options.repeats + 1):
        for name, monitor in monitors.items():
            with contextlib.nullcontext() if monitor is None else monitor.attach(trainer):
                times = seconds(lambda monitor=monitor: call(monitor))
            if repeat:
                taken[name].append(times)
    return {name: statistics.median(times) for name, times in taken.items()}


def alone(count: int, length: int, options: argparse.Namespace, folder: str) -> dict[str, float]:
    """The median seconds of `add`, of `step` and of the record for a batch of tokens."""
    draw = torch.Generator().manual_seed(0)
    shape = (count, length)
    student = torch.rand(shape, generator=draw).clamp(min=1e-6).log()
    teacher = (student + 0.5 * torch.randn(shape, generator=draw)).clamp(max=0.0)
    mask = torch.ones(shape)
    monitor, rollouts = Monitor("opd", "forward_kl"), Taken(student, teacher, mask.long())
    taken: dict[str, list[float]] = {"add": [], "step": [], "record": []}
    for repeat in range(options.repeats + 1):
        add = seconds(lambda: monitor.add(student, teacher, None, mask))
        end = seconds(lambda repeat=repeat: monitor.step(repeat))
        written = seconds(
            lambda repeat=repeat: write_rollouts(Path(folder) / "alone.jsonl", repeat, rollouts, "teacher")
        )
        if repeat:
            for name, spent in zip(taken, (add, end, written), strict=True):
                taken[name].append(spent)
    return {name: statistics.median(times) for name, times in taken.items()}


def seconds(call: Callable[[], Any]) -> float:
    """The time of a call: of the CPU, which others cannot take, or on a GPU by the clock."""
    on_gpu = torch.cuda.is_initialized()
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"vocabulary": 32_000, "width": 256, "layers": 4, "batch": 4, "length": 64, "repeats": 7}
    for name, default in {**defaults, "rollouts": 256, "tokens": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[str, float]] = measured(options, folder)
        found[f"{options.rollouts} x {options.tokens} tokens"] = alone(
            options.rollouts, options.tokens, options, folder
        )
        own = alone(options.batch, options.length, options, folder)
    print(f"{machine()}; {vars(options)}")
    for name, times in found.items():
        print(f"{name}: " + ", ".join(f"{which} {time:.4f} s" for which, time in times.items()))
    # Two steps differ by more than the sums cost, so their own time is set against a step's.
    for name in list(found)[:3]:
        share = (own["add"] + own["step"]) / found[name]["plain"]
        print(f"{name}: the sums of {options.batch} x {options.length} tokens take {share:.2%} of a step")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "seconds": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
