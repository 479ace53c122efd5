"""The knowledge-distillation loss of torchdistill as functions `loss(rollouts) -> scalar`; imported, not copied."""

from __future__ import annotations

from torch import Tensor

import opdtheory as opd


def torchdistill_kd(r: opd.Rollouts) -> Tensor:
    """`KDLoss` at temperature 1 without the loss on labels, on the unmasked positions."""
    from torchdistill.losses.mid_level import KDLoss

    published = KDLoss("model", "output", "model", "output", temperature=1.0, alpha=0.0)
    student, teacher = r.student_logits[r.mask > 0], r.teacher_logits[r.mask > 0]
    return published({"model": {"output": student}}, {"model": {"output": teacher}})
