"""Trainers of TRL on the exactly known pair, as a monitor is attached to them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from opdtheory.end_to_end.pair import TrainerPair, no_progress, trainer_pair
from opdtheory.integrations.trl import OPDPlusTrainer, OPDTrainer
from opdtheory.integrations.trl.sampled import no_reward

TRAINERS: tuple[type, ...] = (GRPOTrainer, RLOOTrainer, OPDPlusTrainer, DistillationTrainer, OPDTrainer, GKDTrainer)
_CONFIGS = {GKDTrainer: GKDConfig, RLOOTrainer: RLOOConfig, GRPOTrainer: GRPOConfig}


def a_pair(**options: Any) -> TrainerPair:
    """Two prompts of unequal length, two rollouts each, in two micro-batches of four."""
    return trainer_pair(("a", "ba"), 3, **{"batch_size": 4, "accumulate": 2, **options})


def built(kind: type, pair: TrainerPair, keep: list[Any] | None = None, **settings: Any) -> Any:
    """A trainer that takes steps; `keep` is given what the loss of each micro-batch is given."""
    settings = {**pair.arguments, "learning_rate": 0.05, "max_steps": 3, **settings}
    settings = {**settings, "logging_strategy": "steps", "logging_steps": settings.get("logging_steps", 1)}
    length = "max_new_tokens" if issubclass(kind, GKDTrainer) else "max_completion_length"
    config = next((each for base, each in _CONFIGS.items() if issubclass(kind, base)), DistillationConfig)
    group: dict[str, Any] = {"lmbda": 1.0} if config is GKDConfig else {}
    group |= {"num_generations": 2, "beta": 0.5} if config in (GRPOConfig, RLOOConfig) else {}
    given: dict[str, Any] = {"args": config(**{length: pair.horizon, **group, **settings})}
    if group and not issubclass(kind, OPDPlusTrainer) and config is not GKDConfig:
        given["reward_funcs"] = no_reward
    else:
        given["teacher_model"] = pair.teacher
    if issubclass(kind, OPDPlusTrainer | OPDTrainer):
        given["divergence"] = "jsd"
    kind = kind if keep is None else keeping(kind, keep)
    with no_progress():
        trainer = kind(model=pair.student, train_dataset=pair.dataset, processing_class=pair.tokenizer, **given)
    return trainer


def keeping(kind: type, keep: list[Any]) -> type:
    """The trainer, which keeps what its loss is given."""

    class Keeping(kind):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.model.training:
                keep.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Keeping


def trained(trainer: Any) -> Any:
    """The trainer after its steps, which print nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


def scores(model: Any, inputs: dict[str, Any], temperature: float = 1.0) -> Tensor:
    """The log-probabilities of the tokens of a micro-batch that count, by a forward pass of their own, `(N,)`."""
    if "labels" in inputs:
        ids, mask, alive = inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100
    else:
        ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        alive = torch.cat([torch.zeros_like(inputs["prompt_ids"]), inputs["completion_mask"]], 1) > 0
    with torch.no_grad():
        logs = (model(ids, attention_mask=mask).logits.double() / temperature).log_softmax(-1)
    return logs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)[alive[:, 1:]]
