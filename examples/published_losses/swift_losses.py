"""The GKD loss of ms-swift as functions `loss(rollouts) -> scalar`.

The adapter imports the published function and calls it; nothing of it is copied. Its trainer divides the returned total
by the number of valid tokens, and so do these.
"""

from __future__ import annotations

from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_logits, from_top_k


def swift_gkd(beta: float) -> Loss:
    """`gkd_loss` with the teacher's logits over the whole vocabulary."""

    def swift(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

        teacher = TeacherOutput(full_logits=teacher_logits, labels=labels)
        total, valid = gkd_loss(student_logits, teacher, labels, beta=beta, temperature=1.0)
        return total / valid.clamp_min(1)

    return from_logits(swift)


swift_gkd_0 = swift_gkd(0.0)
swift_gkd_0_1 = swift_gkd(0.1)
swift_gkd_0_5 = swift_gkd(0.5)
swift_gkd_1 = swift_gkd(1.0)


def swift_gkd_top_2(r: opd.Rollouts) -> Tensor:
    """At beta = 0.5, the default, when the teacher reports its two likeliest tokens only."""

    def swift(student_logits: Tensor, ids: Tensor, logprobs: Tensor, labels: Tensor) -> Tensor:
        from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

        teacher = TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=labels)
        total, valid = gkd_loss(student_logits, teacher, labels, beta=0.5, temperature=1.0)
        return total / valid.clamp_min(1)

    return from_top_k(swift, 2)(r)
