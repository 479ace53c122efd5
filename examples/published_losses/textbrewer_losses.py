"""The soft-label losses of TextBrewer as functions `loss(rollouts) -> scalar`; imported and called, not copied.

They average over every position they are given, so the adapter hands over the unmasked ones alone.
"""

from __future__ import annotations

from torch import Tensor

import opdtheory as opd


def textbrewer_kd_ce(r: opd.Rollouts) -> Tensor:
    """`kd_ce_loss` at temperature 1: the cross-entropy to the teacher's distribution."""
    from textbrewer.losses import kd_ce_loss

    return kd_ce_loss(r.student_logits[r.mask > 0], r.teacher_logits[r.mask > 0])


def textbrewer_kd_ce_hot(r: opd.Rollouts) -> Tensor:
    """The same at temperature 2, scaled by its square as Hinton et al. (1503.02531) do."""
    from textbrewer.losses import kd_ce_loss

    return 4 * kd_ce_loss(r.student_logits[r.mask > 0], r.teacher_logits[r.mask > 0], temperature=2)


def textbrewer_kd_mse(r: opd.Rollouts) -> Tensor:
    """`kd_mse_loss` at temperature 1: the mean squared difference of the logits."""
    from textbrewer.losses import kd_mse_loss

    return kd_mse_loss(r.student_logits[r.mask > 0], r.teacher_logits[r.mask > 0])
