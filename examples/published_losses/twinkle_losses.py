"""The GKD loss of twinkle-kit as functions `loss(rollouts) -> scalar`.

The adapter imports the published class and calls it; nothing of it is copied.
"""

from __future__ import annotations

from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_logits, from_top_k


def twinkle_gkd(beta: float) -> Loss:
    """`GKDLoss` with the teacher's logits over the whole vocabulary."""

    def twinkle(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        from twinkle.loss.gkd import GKDLoss

        return GKDLoss(beta=beta)({"labels": labels}, {"logits": student_logits}, teacher_logits=teacher_logits)["loss"]

    return from_logits(twinkle)


twinkle_gkd_0 = twinkle_gkd(0.0)
twinkle_gkd_0_5 = twinkle_gkd(0.5)
twinkle_gkd_1 = twinkle_gkd(1.0)


def twinkle_gkd_top_2(r: opd.Rollouts) -> Tensor:
    """At beta = 0.5, the default, when the teacher reports its two likeliest tokens only."""

    def twinkle(student_logits: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor) -> Tensor:
        from twinkle.loss.gkd import GKDLoss

        teacher = {"teacher_topk_logprobs": logprobs, "teacher_topk_indices": ids}
        return GKDLoss(beta=0.5)({"labels": labels}, {"logits": student_logits}, **teacher)["loss"]

    return from_top_k(twinkle, 2)(r)
