"""TRL's GRPO with a zero reward, whose KL penalty is what it descends: sound, and with one fault at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opdtheory.end_to_end import TrainerPair

__all__ = ["FAULTS", "grpo", "sound"]


def grpo(pair: TrainerPair, kind: type | None = None, **settings: Any) -> Any:
    """The trainer, of another class if one is given."""
    from trl import GRPOConfig, GRPOTrainer

    chosen = {"loss_type": "dr_grpo", "num_generations": 2, "beta": 1.0, **settings}
    return (kind or GRPOTrainer)(
        model=pair.student,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**pair.arguments, max_completion_length=pair.horizon, **chosen),
        train_dataset=pair.dataset.select_columns(["prompt"]),
        processing_class=pair.tokenizer,
    )


def sound(pair: TrainerPair) -> Any:
    """With the loss that sums over tokens."""
    return grpo(pair)


def _completions(change: Callable[[dict[str, Tensor]], None]) -> Callable[..., Any]:
    """The trainer with other masks or tokens after generation."""

    def build(pair: TrainerPair) -> Any:
        from trl import GRPOTrainer

        class Faulty(GRPOTrainer):
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                found = super()._generate_and_score_completions(inputs)
                change(found)
                return found

        return grpo(pair, Faulty)

    return build


def _drop_end(found: dict[str, Tensor]) -> None:
    found["completion_mask"] = found["completion_mask"] * (found["completion_ids"] != 1).long()


def _drop_first(found: dict[str, Tensor]) -> None:
    found["completion_mask"] = torch.cat(
        [torch.zeros_like(found["completion_mask"][:, :1]), found["completion_mask"][:, 1:]], 1
    )


def _constant(found: dict[str, Tensor]) -> None:
    found["advantages"] = torch.full_like(found["advantages"], 1.0)


def _student_as_reference(pair: TrainerPair) -> Any:
    trainer = grpo(pair)
    trainer.ref_model = trainer.model
    return trainer


# What must be found in the words of the report.
FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "dapo": (lambda pair: grpo(pair, loss_type="dapo"), "1/N within a batch"),
    "grpo": (lambda pair: grpo(pair, loss_type="grpo"), "short rollouts weigh more"),
    "truncated answers masked": (lambda pair: grpo(pair, mask_truncated_completions=True), "without an end"),
    "sampled at 0.7": (lambda pair: grpo(pair, temperature=0.7), "samples from the student at temperature 0.7"),
    "top-k sampling": (lambda pair: grpo(pair, top_k=2), "keeps at most 2 tokens"),
    "end dropped": (_completions(_drop_end), "nothing teaches when to stop"),
    "reference is the student": (_student_as_reference, "expected gradient is zero"),
}

# Not named, but caught: ratios of whole sequences, and a first token that is masked, which no model then reads.
CAUGHT: dict[str, Callable[..., Any]] = {
    "first token masked": _completions(_drop_first),
    "sequence ratios": lambda pair: grpo(pair, importance_sampling_level="sequence"),
}
# No fault: a constant advantage has no gradient.
HARMLESS: dict[str, Callable[..., Any]] = {"constant advantage": _completions(_constant)}
