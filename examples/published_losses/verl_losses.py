"""The distillation and KL losses of verl as functions `loss(rollouts) -> scalar`.

Each adapter imports the published function and calls it; nothing of it is copied. `distillation_loss` is the function
that verl's actor calls, with the settings that its shipped `distillation.yaml` leaves open.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_logprobs


def verl_distillation(mode: str, policy_gradient: bool, clamp: float | None = None) -> Loss:
    """`distillation_loss` with a single-sample estimator, backpropagated or as the reward of a policy gradient.

    The clamp is `loss_max_clamp`, null in the shipped YAML; the aggregation is the default `token-mean`.
    """

    def loss(r: opd.Rollouts) -> Tensor:
        from verl.trainer.distillation.losses import distillation_loss

        settings = {"loss_mode": mode, "use_policy_gradient": policy_gradient, "loss_max_clamp": clamp}
        settings |= {"policy_loss_mode": "vanilla", "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
        distillation = SimpleNamespace(distillation_loss=_Config(global_batch_info={}, **settings))
        actor = _Config(loss_agg_mode="token-mean", global_batch_info={}, loss_scale_factor=None)
        return distillation_loss(actor, distillation, {"log_probs": _unpadded(r.student_logprobs)}, _batch(r))[0]

    loss.__name__ = f"verl_{mode}_{'reward' if policy_gradient else 'loss'}"
    return loss


class _Config(SimpleNamespace):
    """A configuration that is read by attribute and by `get`, as verl's are."""

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


def _batch(r: opd.Rollouts) -> dict[str, Any]:
    # One prompt token each; padding is inside the response and outside its mask.
    ones = torch.ones(r.tokens.shape[0], r.tokens.shape[1] + 1, dtype=torch.int64)
    batch = {"prompts": r.tokens[:, :1] * 0, "responses": r.tokens, "attention_mask": ones, "response_mask": r.mask > 0}
    batch |= {"teacher_logprobs": _unpadded(r.teacher_logprobs).unsqueeze(-1), "old_log_probs": r.behavior_logprobs}
    return {**batch, "dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}


def _unpadded(values: Tensor) -> Tensor:
    """All positions in one row; the one at token n belongs to token n + 1, and the last to none."""
    return torch.cat([values, values[:, -1:]], 1).flatten()


verl_k1_loss = verl_distillation("k1", policy_gradient=False)
verl_k2_loss = verl_distillation("k2", policy_gradient=False)
verl_k3_loss = verl_distillation("k3", policy_gradient=False)
verl_k1_reward = verl_distillation("k1", policy_gradient=True)
verl_k3_reward = verl_distillation("k3", policy_gradient=True)
verl_abs_reward = verl_distillation("abs", policy_gradient=True)


def verl_kl_penalty(kind: str) -> Loss:
    """`kl_penalty`, which the actor adds to its loss for a KL to the reference policy; summed over tokens."""

    def penalty(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        from verl.trainer.ppo.core_algos import kl_penalty

        return kl_penalty(student_logprobs, teacher_logprobs, kind)

    return from_logprobs(penalty)


verl_kl_k3 = verl_kl_penalty("low_var_kl")
verl_kl_k3_plus = verl_kl_penalty("k3+")
verl_kl_k1_plus = verl_kl_penalty("k1+")
verl_kl_abs = verl_kl_penalty("abs")


def verl_forward_kl_top(k: int) -> Loss:
    """The FSDP engine's forward KL on the teacher's `k` likeliest tokens, averaged over tokens."""

    def loss(r: opd.Rollouts) -> Tensor:
        from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk

        logprobs, ids = r.teacher_logits.log_softmax(-1).flatten(0, 1).topk(k, -1)
        config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))
        nested = (torch.nested.as_nested_tensor([t], layout=torch.jagged) for t in (logprobs, ids))
        values = compute_forward_kl_topk(r.student_logits.flatten(0, 1).unsqueeze(0), *nested, config, "thd")
        # As its caller does: without the tail the two distributions do not sum to one, and the sum can be negative.
        per_token = values["distillation_losses"].reshape(r.mask.shape).clamp_min(0.0)
        return r.token_mean(per_token).float()

    loss.__name__ = f"verl_forward_kl_top_{k}"
    return loss


verl_forward_kl_top_2 = verl_forward_kl_top(2)
