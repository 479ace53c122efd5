"""The parts of verl 0.9.1 that the plug-in uses, with its signatures; what they compute is written anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

REGISTRIES = ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY")


def modules(version: str = "0.9.1") -> dict[str, ModuleType]:
    """Modules by their path, for `sys.modules`."""
    paths = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos", "verl.trainer.distillation")
    paths += ("verl.trainer.distillation.losses", "verl.workers", "verl.workers.utils", "verl.workers.utils.padding")
    found = {path: ModuleType(path) for path in paths}
    for path in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.distillation", "verl.workers"):
        found[path].__path__ = []
    found["verl.workers.utils"].__path__ = []
    found["verl"].__version__ = version
    _fill_algorithms(found["verl.trainer.ppo.core_algos"])
    _fill_distillation(found["verl.trainer.distillation.losses"])
    found["verl.workers.utils.padding"].no_padding_2_padding = no_padding_2_padding
    return found


def _fill_algorithms(module: ModuleType) -> None:
    policies: dict[str, Any] = {}
    estimators: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Any:
        return lambda function: policies.setdefault(name, function)

    def register_adv_est(name_or_enum: str) -> Any:
        return lambda function: estimators.setdefault(name_or_enum, function)

    module.POLICY_LOSS_REGISTRY, module.ADV_ESTIMATOR_REGISTRY = policies, estimators
    module.register_policy_loss, module.register_adv_est = register_policy_loss, register_adv_est
    module.agg_loss = agg_loss


def _fill_distillation(module: ModuleType) -> None:
    registry: dict[str, Any] = {}

    @dataclass
    class DistillationLossSettings:
        names: list[str] = field(default_factory=list)
        use_topk: bool = False
        use_estimator: bool = False

    def register_distillation_loss(loss_settings: DistillationLossSettings) -> Any:
        def decorator(function: Any) -> Any:
            for name in loss_settings.names:
                if name in registry:
                    raise ValueError(f"Distillation loss function with name '{name}' is already registered.")
                registry[name] = function
            return function

        return decorator

    module.DISTILLATION_LOSS_REGISTRY = registry
    module.DistillationLossSettings = DistillationLossSettings
    module.register_distillation_loss = register_distillation_loss


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """A sum over tokens, divided by rollouts or tokens."""
    total = (loss_mat * loss_mask).sum()
    if loss_agg_mode == "seq-mean-token-sum":
        return total / (global_batch_size or len(loss_mat)) * dp_size
    return total / (batch_num_tokens or loss_mask.sum()) * dp_size


def no_padding_2_padding(tensor: Tensor, data: Any) -> Tensor:
    """The responses out of packed values, each value one position before its token, padded on the right with zeros."""
    values = tensor.values() if tensor.is_nested else tensor
    width, prompt = data["responses"].shape[1], data["prompts"].shape[1]
    lengths = data["attention_mask"].sum(1).tolist()
    rows, start = [], 0
    for length in lengths:
        row = values[start + prompt - 1 : start + length - 1]
        rows.append(torch.cat([row, row.new_zeros((width - len(row), *row.shape[1:]))]))
        start += length
    return torch.stack(rows)
