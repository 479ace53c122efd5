"""The time of a step of TRL's own trainers and of the plug-in's, generation left out.

`python benchmarks/trl_plugins.py` trains a small transformer with random weights on given completions, and prints the
median time of a step of each trainer over alternating repeats (of the CPU, or on a GPU by the clock), and the plug-in's
relative to TRL's. The pairs do the same work: a teacher over the whole vocabulary, or a reference model and a policy
gradient. The last pair is the plug-in's without and with exact tokens, to which the limit does not apply.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from opdtheory.end_to_end.tokenization import letters
from opdtheory.integrations.trl import OPDPlusTrainer, OPDTrainer
from opdtheory.integrations.trl.sampled import no_reward
from opdtheory.machine import Run, machine, seconds

# The plug-in may take this much of TRL's time.
LIMIT = 1.1


class Given:
    """Completions that are given, all of the largest length."""

    vocabulary = 0

    def completions(self, prompts: list[list[int]]) -> list[list[int]]:
        draw = random.Random(0)
        return [[draw.randrange(1, self.vocabulary) for _ in range(self.max_completion_length)] for _ in prompts]


class Whole(Given):
    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self.completions(prompt_ids)


class Sampled(Given):
    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self.completions(prompt_ids), None


def given(base: type, how: type) -> type:
    """The trainer, with given completions."""
    return type(base.__name__, (how, base), {})


def model(options: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def trainer_of(
    build: Callable[..., Any], config: type, options: argparse.Namespace, folder: str, **settings: Any
) -> Any:
    """A trainer that has taken a step."""
    trainer = build(
        args=config(
            folder,
            per_device_train_batch_size=options.batch,
            max_completion_length=options.length,
            max_steps=1,
            learning_rate=0.0,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 2 * options.batch}),
        processing_class=letters("abc"),
    )
    trainer.vocabulary = options.vocabulary
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def step(build: Callable[..., Any], config: type, options: argparse.Namespace, folder: str, **settings: Any) -> Any:
    """A call that computes the gradient of a step, scoring included."""
    trainer = trainer_of(build, config, options, folder, **settings)
    rows = next(iter(trainer.get_train_dataloader()))
    wrapped = trainer.model_wrapped

    def call() -> None:
        wrapped.train()
        trainer.training_step(wrapped, rows, None)
        wrapped.zero_grad()

    return call


def medians(calls: dict[str, Run], repeats: int) -> dict[str, float]:
    """The median of alternating repeats, the first not counted: of CPU time, which others cannot take, or on a GPU."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            wall = seconds(call)
            if repeat:
                taken[name].append(wall if torch.cuda.is_initialized() else time.process_time() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def measured(options: argparse.Namespace, folder: str) -> dict[str, dict[str, float]]:
    """The median seconds of each trainer, pair by pair."""
    student, teacher = model(options, 0), model(options, 1)
    student.save_pretrained(f"{folder}/student")
    student = LlamaForCausalLM.from_pretrained(f"{folder}/student")
    found = {}
    for name, beta in (("reverse_kl", 1.0), ("jsd", 0.5)):

        def ours(name: str = name, **rest: Any) -> Any:
            return given(OPDTrainer, Whole)(student, teacher, divergence=name, **rest)

        def theirs(**rest: Any) -> Any:
            return given(DistillationTrainer, Whole)(student, teacher, **rest)

        calls = {
            "DistillationTrainer": step(theirs, DistillationConfig, options, folder, beta=beta),
            "OPDTrainer": step(ours, DistillationConfig, options, folder),
        }
        found[f"whole vocabulary, {name}"] = medians(calls, options.repeats)

    def plain(**rest: Any) -> Any:
        return given(GRPOTrainer, Sampled)(student, no_reward, **rest)

    def plus(**rest: Any) -> Any:
        return given(OPDPlusTrainer, Sampled)(student, teacher, divergence="jsd", **rest)

    settings = {"num_generations": 2, "loss_type": "dr_grpo"}
    calls = {
        "GRPOTrainer": step(plain, GRPOConfig, options, folder, beta=0.1, **settings),
        "OPDPlusTrainer": step(plus, GRPOConfig, options, folder, **settings),
    }
    found["sampled tokens, jsd"] = medians(calls, options.repeats)

    def top(**rest: Any) -> Any:
        return plus(top_k=16, baseline="rest", **rest)

    calls = {
        "OPDPlusTrainer": step(plus, GRPOConfig, options, folder, **settings),
        "with top_k=16": step(top, GRPOConfig, options, folder, **settings),
    }
    found["exact tokens, jsd"] = medians(calls, options.repeats)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "vocabulary": 32_000,
        "width": 256,
        "layers": 4,
        "batch": 4,
        "length": 64,
        "repeats": 7,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(options, folder)
    print(f"{machine()}; {vars(options)}")
    worst = 0.0
    for case, times in found.items():
        (first, theirs), (second, ours) = times.items()
        if not first.startswith("OPD"):
            worst = max(worst, ours / theirs)
        print(f"{case}: {first} {theirs:.3f} s, {second} {ours:.3f} s, ratio {ours / theirs:.3f}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
