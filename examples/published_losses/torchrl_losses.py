"""The distillation losses of torchrl as functions `loss(rollouts) -> scalar`.

Each adapter imports the published function and calls it; nothing of it is copied.
"""

from __future__ import annotations

from torch import Tensor, nn

import opdtheory as opd


def k3_reverse(r: opd.Rollouts) -> Tensor:
    """The k3 estimate as `DistillationLoss` calls it for the reverse KL, summed over tokens."""
    from torchrl.objectives.llm import k3_kl_token_estimate

    return r.token_sum(k3_kl_token_estimate(r.teacher_logprobs, r.student_logprobs))


def k3_forward(r: opd.Rollouts) -> Tensor:
    """The k3 estimate as `DistillationLoss` calls it for the forward KL, summed over tokens."""
    from torchrl.objectives.llm import k3_kl_token_estimate

    return r.token_sum(k3_kl_token_estimate(r.student_logprobs, r.teacher_logprobs))


def distillation_reverse(r: opd.Rollouts) -> Tensor:
    """`DistillationLoss` itself at its defaults: `kl_direction="reverse"`, mean over each rollout's tokens."""
    return _distillation(r, "reverse")


def distillation_forward(r: opd.Rollouts) -> Tensor:
    """`DistillationLoss` at `kl_direction="forward"`; its tokens are meant to come from the teacher."""
    return _distillation(r, "forward")


def _distillation(r: opd.Rollouts, direction: str) -> Tensor:
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives.llm import DistillationLoss

    # The "history" is the student's log-probabilities, so the student network is the identity.
    student = TensorDictModule(nn.Identity(), in_keys=[("history", "full")], out_keys=[("log_probs", "full")])
    masks = {"all_assistant_mask": r.mask > 0, "all_attention_mask": r.mask > 0}
    batch = {"history": {"full": r.student_logprobs}, "masks": masks}
    batch["next"] = {"teacher_log_probs": {"full": r.teacher_logprobs}}
    return DistillationLoss(student, kl_direction=direction)(TensorDict(batch, [len(r.mask)])).loss_distill


def grpo_kl_to_ref(r: opd.Rollouts) -> Tensor:
    """The KL penalty of `GRPOLoss`, with the teacher as reference policy."""
    from torchrl.objectives.llm import GRPOLoss

    published = opd.bind(GRPOLoss._kl_to_ref, kl_to_ref_coeff=1.0)
    return published({"_cur_log_prob": r.student_logprobs}, ref_log_prob=r.teacher_logprobs, mask=r.mask > 0)[0]
