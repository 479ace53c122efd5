"""One step of verl's FSDP engine as an update that `audit_update` plays: what the actor does below its rollout.

The rollouts, and the teacher's log-probabilities that a server would send, come from the exactly known pair. From there
on all is verl's own: the log-probabilities of the student, rewards, advantages, losses, micro-batches and the engine.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import verl_platform  # noqa: F401  (before the rest of verl)
from tensordict import TensorDict
from torch import Tensor
from verl import DataProto
from verl.trainer.config import CheckpointConfig
from verl.trainer.config.algorithm import AlgoConfig, KLControlConfig
from verl.trainer.distillation import distillation_ppo_loss
from verl.trainer.ppo.core_algos import get_kl_controller
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    DistillationConfig,
    DistillationLossConfig,
    FSDPActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested, response_to_nested


@dataclass(frozen=True)
class Setting:
    """Settings of verl, by the names that its configuration has.

    Attributes:
        actor: fields of `actor_rollout_ref.actor`.
        distillation: fields of `distillation.distillation_loss`; None leaves distillation off.
        algorithm: fields of `algorithm`, if rewards are turned into advantages.
        use_remove_padding: whether rollouts are packed.
    """

    actor: dict = field(default_factory=dict)
    distillation: dict | None = None
    algorithm: dict | None = None
    use_remove_padding: bool = True


# The shipped `distillation.yaml`, except for task rewards, which are not what is audited.
SHIPPED = {"use_task_rewards": False, "use_policy_gradient": False, "loss_max_clamp": None, "log_prob_min_clamp": None}

# Rewards that are the log-ratios of the reference model to the student.
LOG_RATIOS = {
    "use_kl_in_reward": True,
    "kl_penalty": "kl",
    "kl_ctrl": KLControlConfig(type="fixed", kl_coef=1.0),
}


class Update:
    """`update(pair, prompts, answers)` for a setting; the engine of a pair is built once."""

    _engines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        # What the last step was given, without padding, and what the engine returned of it for the log.
        self.batch: dict[str, Tensor] = {}
        self.metrics: dict = {}

    def __call__(self, pair, prompts, answers) -> None:
        engine = self.engine(pair)
        batch, mask = _batch(pair, prompts, answers, self.setting)
        rank, size = dist.get_rank(), dist.get_world_size()
        own = slice(rank * len(prompts) // size, (rank + 1) * len(prompts) // size)
        batch, mask = {name: _nested(rows[own]) for name, rows in batch.items()}, _nested(mask[own])
        flags = _flags(pair, self.setting, len(prompts))
        scored = _tensordict(batch, {**flags, "distillation_use_topk": False, "distillation_only": False})
        with engine.eval_mode(), contextlib.redirect_stdout(io.StringIO()):
            found = engine.infer_batch(scored)["model_output"]["log_probs"]
        batch["old_log_probs"] = response_from_nested(found, mask)
        batch["ref_log_prob"] = response_from_nested(_flat(batch["teacher_logprobs_sampled"]), mask)
        batch["advantages"] = _advantages(self.setting, batch, mask)
        del batch["teacher_logprobs_sampled"]
        loss = _loss(self.setting)
        with engine.train_mode(), contextlib.redirect_stdout(io.StringIO()):
            self.metrics = engine.train_batch(_tensordict(batch, flags), loss)["metrics"]
            self.batch = batch
            table = engine.module.model.table.grad
        pair.student.model.table.grad = (
            table.full_tensor().detach().to(pair.student.model.table.dtype) if table is not None else None
        )

    def engine(self, pair) -> FSDPEngineWithLMHead:
        """The engine that trains the pair's student."""
        kept = self._engines.setdefault(pair.student, {})
        packed = self.setting.use_remove_padding
        if packed not in kept:
            kept[packed] = build_engine(pair, packed)
        return kept[packed]


def build_engine(pair, packed: bool = True) -> FSDPEngineWithLMHead:
    """verl's FSDP2 engine around the student, in float32, with a learning rate of 0 and no clipping."""
    if not dist.is_initialized():
        # Alone, by a file of its own; torchrun says who else is there.
        alone = {"init_method": f"file://{tempfile.mkdtemp()}/store", "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))
    folder = Path(pair.folder) / f"student-{dist.get_rank()}"
    pair.student.save_pretrained(folder)
    pair.tokenizer.save_pretrained(folder)
    model = HFModelConfig(
        path=str(folder),
        override_config={"attn_implementation": "eager"},
        use_remove_padding=packed,
        enable_gradient_checkpointing=False,
    )
    engine = FSDPEngineWithLMHead(
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            # A model without layers has none to wrap by name.
            wrap_policy={"transformer_layer_cls_to_wrap": ["Linear"]},
            mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=1e30, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        engine.initialize()
    return engine


def _batch(pair, prompts, answers, setting: Setting) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """The rollouts as verl holds them, without padding, and the mask of the responses."""
    fields: dict[str, list[Tensor]] = {}
    mask = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor(prompt + answer)
        with torch.no_grad():
            logits = pair.teacher(ids.unsqueeze(0)).logits[0]
        logprobs = logits.log_softmax(-1).float()
        # As the server sends them: at each position those of the next token, and zeros at the last.
        sampled = torch.zeros(len(ids), 1)
        sampled[:-1] = logprobs[:-1].gather(-1, ids[1:, None])
        teacher, teacher_ids = sampled, torch.zeros(len(ids), 1, dtype=torch.int64)
        if setting.distillation and setting.distillation["loss_mode"] == "forward_kl_topk":
            teacher, teacher_ids = logprobs.topk(setting.distillation["topk"], -1)
            teacher, teacher_ids = teacher.clone(), teacher_ids.clone()
            teacher[-1], teacher_ids[-1] = 0.0, 0
        own = torch.ones(len(answer), dtype=torch.int64)
        for name, value in {
            "prompts": torch.tensor(prompt),
            "responses": torch.tensor(answer),
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "response_mask": own,
            "loss_mask": own,
            "teacher_logprobs": teacher,
            "teacher_ids": teacher_ids,
            "teacher_logprobs_sampled": sampled,
        }.items():
            fields.setdefault(name, []).append(value)
        mask.append(own)
    return fields, mask


def _advantages(setting: Setting, batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """Advantages by verl's own functions, from scores of zero; zeros where rewards play no part."""
    padded = {name: batch[name].to_padded_tensor(0.0) for name in ("old_log_probs", "ref_log_prob")}
    padded["response_mask"] = mask.to_padded_tensor(0)
    padded["token_level_scores"] = torch.zeros_like(padded["old_log_probs"])
    if setting.algorithm is None:
        return response_to_nested(padded["token_level_scores"], mask)
    algorithm = AlgoConfig(**setting.algorithm)
    data = DataProto.from_dict(padded)
    data, _ = apply_kl_penalty(data, get_kl_controller(algorithm.kl_ctrl), algorithm.kl_penalty)
    data = compute_advantage(data, algorithm.adv_estimator, config=algorithm)
    return response_to_nested(data.batch["advantages"], mask)


def _loss(setting: Setting):
    """The function that verl's actor worker hands to the engine."""
    policy_loss = PolicyLossConfig(**setting.actor.get("policy_loss", {}))
    fields = {"strategy": "fsdp2", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, **setting.actor}
    actor = FSDPActorConfig(**{**fields, "policy_loss": policy_loss})
    if setting.distillation is None:
        return functools.partial(ppo_loss, config=actor)
    distillation = DistillationConfig(distillation_loss=DistillationLossConfig(**setting.distillation))
    return functools.partial(distillation_ppo_loss, config=actor, distillation_config=distillation)


def _flags(pair, setting: Setting, rollouts: int) -> dict:
    """What the trainer writes beside the tensors before it updates the actor."""
    topk = bool(setting.distillation) and setting.distillation["loss_mode"] == "forward_kl_topk"
    return {
        "temperature": 1.0,
        "use_remove_padding": setting.use_remove_padding,
        "use_fused_kernels": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": pair.batch_size // dist.get_world_size(),
        "global_batch_size": rollouts,
        "calculate_entropy": False,
        "distillation_use_topk": topk,
        "distillation_only": topk and not setting.distillation["use_policy_gradient"],
        "pad_token_id": pair.tokenizer.pad_token_id,
    }


def _tensordict(batch: dict[str, Tensor], flags: dict) -> TensorDict:
    return tu.get_tensordict(tensor_dict=dict(batch), non_tensor_dict=flags)


def _nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def _flat(values: Tensor) -> Tensor:
    """Without the last dimension, of length one."""
    return torch.nested.nested_tensor_from_jagged(values.values().squeeze(-1), values.offsets())
