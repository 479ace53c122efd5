"""A few steps of each trainer on a small transformer, for as many processes as launch this; prints what came of them.

`torchrun --standalone --nproc_per_node 2 processes.py` with ACCELERATE_USE_CPU=true, or `python processes.py`. A step
has four rollouts, whatever the number of processes, and their tokens are a function of the prompt and the step:
sampling would depend on how they are shared out.
"""

from __future__ import annotations

import json
import logging
import os
import random
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed
from trl import DistillationConfig, GRPOConfig

from opdtheory.end_to_end.tokenization import letters
from opdtheory.integrations.trl import OPDPlusTrainer, OPDTrainer

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
ROLLOUTS, LONGEST, STEPS = 4, 5, 3


class Written:
    """Completions that are given, of one to five tokens."""

    def completions(self, prompts: list[list[int]]) -> list[list[int]]:
        found = []
        for number, prompt in enumerate(prompts):
            draw = random.Random(str((prompt, number % 2, self.state.global_step)))
            end, length = self.processing_class.eos_token_id, draw.randint(1, LONGEST)
            found.append([draw.choice([1, 2, 3]) for _ in range(length - 1)] + [end])
        return found


class Whole(Written, OPDTrainer):
    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self.completions(prompt_ids)


class LocalMean(Whole):
    """A false twin: each process divides by its own tokens."""

    def _compute_loss(self, student: Any, inputs: dict[str, Any], _: Any) -> Any:
        return super()._compute_loss(student, inputs, None)


class Sampled(Written, OPDPlusTrainer):
    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self.completions(prompt_ids), None


def model(seed: int, vocabulary: int) -> LlamaForCausalLM:
    """A transformer with random weights in float64."""
    set_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, pad_token_id=0, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config).double()


def trained(
    trainer: type, config: type, folder: str, options: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The losses of the steps and the student's parameters after them."""
    tokenizer = letters("abc")
    prompts = [a + b for a in ("a", "b", "ca", "bb") for b in ("a", "b", "cc")]
    subject = trainer(
        model(0, len(tokenizer)),
        model(1, len(tokenizer)),
        args=config(
            folder,
            per_device_train_batch_size=ROLLOUTS // PROCESSES,
            max_completion_length=LONGEST,
            max_steps=STEPS,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        **options,
    )
    subject.train()
    student = subject.accelerator.unwrap_model(subject.model)
    return {
        "losses": [row["loss"] for row in subject.state.log_history if "loss" in row],
        "parameters": torch.cat([each.detach().flatten() for each in student.parameters()]).tolist(),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    groups = {"num_generations": 2, "loss_type": "dr_grpo"}
    subjects: dict[str, tuple[type, type, dict[str, Any], dict[str, Any]]] = {
        "whole, a rollout": (Whole, DistillationConfig, {"divergence": "jsd"}, {}),
        "whole, a token": (Whole, DistillationConfig, {"divergence": "jsd", "per": "token"}, {}),
        "mean of means": (LocalMean, DistillationConfig, {"divergence": "jsd", "per": "token"}, {}),
        "sampled": (Sampled, GRPOConfig, {"divergence": "jsd"}, groups),
        "sampled, two exact": (Sampled, GRPOConfig, {"divergence": "jsd", "top_k": 2, "baseline": "rest"}, groups),
        "sampled, two exact, dapo": (
            Sampled,
            GRPOConfig,
            {"divergence": "jsd", "top_k": 2},
            {**groups, "loss_type": "dapo"},
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: trained(trainer, config, folder, options, settings)
            for name, (trainer, config, options, settings) in subjects.items()
        }
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
