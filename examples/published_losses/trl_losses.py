"""The distillation losses of TRL as functions `loss(rollouts) -> scalar`.

Each adapter imports the published function and calls it; nothing of it is copied. The import is part of the adapter,
so that auditing one loss loads one trainer: `opdtheory audit examples/published_losses/trl_losses.py:gkd_jsd_0_5`.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import opdtheory as opd

# The way TRL itself documents to import `trl.experimental` without its notice.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

Loss = Callable[[opd.Rollouts], Tensor]


def gkd_jsd(beta: float) -> Loss:
    """GKD's generalised Jensen-Shannon divergence over the whole vocabulary, averaged over tokens."""

    def loss(r: opd.Rollouts) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        return GKDTrainer.generalized_jsd_loss(r.student_logits, r.teacher_logits, r.labels, beta=beta)

    loss.__name__ = f"gkd_jsd_{beta:g}".replace(".", "_")
    return loss


gkd_jsd_0 = gkd_jsd(0)
gkd_jsd_0_1 = gkd_jsd(0.1)
gkd_jsd_0_5 = gkd_jsd(0.5)
gkd_jsd_0_9 = gkd_jsd(0.9)
gkd_jsd_1 = gkd_jsd(1)


def distillation_chunked(beta: float) -> Loss:
    """The loss of `DistillationTrainer`; with the identity as output layer, hidden states are logits."""

    def loss(r: opd.Rollouts) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        head = torch.eye(r.student_logits.shape[-1], dtype=r.student_logits.dtype)
        return _chunked_divergence_loss(r.student_logits, r.teacher_logits, head, head, r.mask, beta)[0]

    loss.__name__ = f"distillation_chunked_{beta:g}".replace(".", "_")
    return loss


distillation_chunked_0 = distillation_chunked(0.0)
distillation_chunked_0_5 = distillation_chunked(0.5)
distillation_chunked_1 = distillation_chunked(1.0)


def sdpo_sampled_token(r: opd.Rollouts) -> Tensor:
    """The default of SDPO and SDFT, reduced as their trainers do: a mean over each rollout's tokens."""
    from trl.experimental.sdpo.loss_utils import compute_sampled_token_self_distillation_loss as published

    return r.sequence_mean(published(r.student_logits, r.teacher_logits, r.tokens, distillation_alpha=1.0))


def sdpo_full_logits(r: opd.Rollouts) -> Tensor:
    """SDPO and SDFT over the whole vocabulary, at the default alpha = 1."""
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss as published

    return r.sequence_mean(published(r.student_logits, r.teacher_logits, distillation_alpha=1.0))


def sdpo_top_2(r: opd.Rollouts) -> Tensor:
    """SDPO and SDFT on the student's two likeliest tokens, renormalised."""
    return _sdpo_top_k(r, 2, add_tail=False)


def sdpo_top_2_tail(r: opd.Rollouts) -> Tensor:
    """SDPO and SDFT on the student's two likeliest tokens and one bucket for the rest."""
    return _sdpo_top_k(r, 2, add_tail=True)


def _sdpo_top_k(r: opd.Rollouts, k: int, add_tail: bool) -> Tensor:
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss as published

    settings = {"distillation_topk": k, "distillation_alpha": 1.0, "distillation_add_tail": add_tail}
    return r.sequence_mean(published(r.student_logits, r.teacher_logits, **settings))


def iw_opd(r: opd.Rollouts) -> Tensor:
    """Importance-weighted on-policy distillation at the default gamma = 0.5."""
    return _iw_opd(r, gamma=0.5)


def iw_opd_unweighted(r: opd.Rollouts) -> Tensor:
    """The same at gamma = 0, where every token weighs the same."""
    return _iw_opd(r, gamma=0.0)


def _iw_opd(r: opd.Rollouts, gamma: float) -> Tensor:
    from trl.experimental.iw_opd import IWOPDTrainer

    attributes = {"temperature": 1.0, "iw_opd_gamma": gamma, "iw_opd_epsilon": 1e-8, **_logging()}
    published = opd.bind(IWOPDTrainer._compute_iw_opd_loss, **attributes)
    return published(r.student_logits, r.tokens, r.labels, r.teacher_logprobs)


def iw_opd_jsd_top_2(r: opd.Rollouts) -> Tensor:
    """The other objective of `IWOPDTrainer`, reverse KL on the student's two likeliest tokens, renormalised."""
    from trl.experimental.iw_opd import IWOPDTrainer

    published = IWOPDTrainer.generalized_jsd_loss
    return published(r.student_logits, r.teacher_logits, r.labels, beta=1, top_k=2, add_tail=False)


def iw_opd_jsd_top_2_tail(r: opd.Rollouts) -> Tensor:
    """The same with one bucket for the rest."""
    from trl.experimental.iw_opd import IWOPDTrainer

    return IWOPDTrainer.generalized_jsd_loss(r.student_logits, r.teacher_logits, r.labels, beta=1, top_k=2)


def server_top_1_tail(r: opd.Rollouts) -> Tensor:
    """The teacher-server loss at beta = 1: the sampled token and one bucket for the rest."""
    return _server_top_1(r, 1.0, add_tail=True)


def server_top_1(r: opd.Rollouts) -> Tensor:
    """The same without the bucket: the sampled token, renormalised."""
    return _server_top_1(r, 1.0, add_tail=False)


def server_jsd_tail(r: opd.Rollouts) -> Tensor:
    """The teacher-server loss at beta = 0.5: the teacher's likeliest token, the sampled one and a bucket."""
    return _server_top_1(r, 0.5, add_tail=True)


def _server_top_1(r: opd.Rollouts, beta: float, add_tail: bool) -> Tensor:
    from trl.experimental.server_distillation import ServerDistillationTrainer as Trainer

    published = opd.bind(
        Trainer._compute_sparse_top_1_divergence_loss,
        beta=beta,
        loss_add_tail=add_tail,
        _reduce_divergence_loss=Trainer._reduce_divergence_loss,
    )
    top = r.teacher_logits.log_softmax(-1).max(-1)
    log_p = r.student_logits.log_softmax(-1)
    return published(log_p, top.indices, top.values, r.tokens, r.teacher_logprobs, r.labels)


def server_forward_top_2_tail(r: opd.Rollouts) -> Tensor:
    """The teacher-server loss at beta = 0: the teacher's two likeliest tokens and one bucket for the rest."""
    from trl.experimental.server_distillation import ServerDistillationTrainer as Trainer

    published = opd.bind(
        Trainer._compute_server_forward_kl_loss,
        loss_add_tail=True,
        _reduce_divergence_loss=Trainer._reduce_divergence_loss,
    )
    top = r.teacher_logits.log_softmax(-1).topk(2)
    teacher = {"topk_logprobs": top.values, "topk_token_ids": top.indices}
    return published(teacher, r.student_logits.log_softmax(-1), r.labels)


def async_forward_all(r: opd.Rollouts) -> Tensor:
    """The loss of `AsyncDistillationTrainer` at its default beta = 0, when the teacher reports every token."""
    log_q = r.teacher_logits.log_softmax(-1)
    return _async(r, torch.arange(log_q.shape[-1]).expand_as(log_q), log_q, beta=0.0, add_tail=False)


def async_sampled_tail(r: opd.Rollouts) -> Tensor:
    """The same at beta = 1, where the trainer narrows the support to the sampled token and a bucket."""
    return _async(r, r.tokens.unsqueeze(-1), r.teacher_logprobs.unsqueeze(-1), beta=1.0, add_tail=True)


def _async(r: opd.Rollouts, support: Tensor, log_q: Tensor, beta: float, add_tail: bool) -> Tensor:
    from trl.experimental.async_distillation.async_distillation_trainer import _jsd_loss_chunk

    # The trainer hands over the valid positions alone and divides by their number.
    valid = r.mask > 0
    head = torch.eye(r.student_logits.shape[-1], dtype=r.student_logits.dtype)
    usable = torch.ones_like(support[valid], dtype=torch.bool)
    arguments = (r.student_logits[valid], head, None, 1.0, None, support[valid], log_q[valid].float(), usable)
    return _jsd_loss_chunk(*arguments, beta, 1.0, add_tail, None, 1)[0] / valid.sum().clamp_min(1)


def gold_hybrid(beta: float) -> Loss:
    """GOLD's hybrid loss between tokenizers that share all tokens but the last, at its adaptive weights."""

    def loss(r: opd.Rollouts) -> Tensor:
        from trl.experimental.gold.gold_trainer import ULDLoss

        shared = r.student_logits.shape[-1] - 1
        published = opd.bind(
            ULDLoss._compute_hybrid_uld_loss,
            hybrid_matched_weight=None,
            mapping_tensor=torch.arange(shared),
            _teacher_matched_ids=set(range(shared)),
            _compute_jsd_loss_for_matched_tokens=opd.bind(ULDLoss._compute_jsd_loss_for_matched_tokens, beta=beta),
        )
        valid = r.mask > 0
        return published(r.student_logits[valid].softmax(-1), r.teacher_logits[valid].softmax(-1))

    loss.__name__ = f"gold_hybrid_{beta:g}".replace(".", "_")
    return loss


gold_hybrid_0_5 = gold_hybrid(0.5)
gold_hybrid_1 = gold_hybrid(1)


def grpo_kl(r: opd.Rollouts) -> Tensor:
    """GRPO's KL penalty alone: all advantages zero, beta = 1, the teacher as reference model."""
    return _grpo(r, bias_correction=True)


def grpo_kl_uncorrected(r: opd.Rollouts) -> Tensor:
    """The same with `use_bias_correction_kl=False`: plain k3 as a loss."""
    return _grpo(r, bias_correction=False)


def _grpo(r: opd.Rollouts, bias_correction: bool) -> Tensor:
    from trl import GRPOTrainer

    entropies = torch.zeros_like(r.mask)
    published = opd.bind(
        GRPOTrainer._compute_loss,
        beta=1.0,
        args=SimpleNamespace(use_bias_correction_kl=bias_correction, delta=None),
        loss_type="dr_grpo",
        max_completion_length=r.tokens.shape[1],
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (r.student_logprobs, entropies, None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        **_logging(),
    )
    batch = {"prompt_ids": r.tokens[:, :0], "prompt_mask": r.tokens[:, :0], "advantages": r.mask.new_zeros(len(r.mask))}
    batch |= {"completion_ids": r.tokens, "completion_mask": r.mask, "ref_per_token_logps": r.teacher_logprobs}
    batch |= {"old_per_token_logps": r.behavior_logprobs}
    return published(None, batch)


def _logging() -> dict[str, Any]:
    """What the trainers' logging reads from `self`; the metrics are thrown away."""
    metrics = {"train": defaultdict(lambda: deque(maxlen=0))}
    return {"model": SimpleNamespace(training=True), "_metrics": metrics}
