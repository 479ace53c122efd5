"""The distillation losses of Liger Kernel that run without Triton, as functions `loss(rollouts) -> scalar`.

`LigerFusedLinearJSDLoss` writes its own backward pass over chunks of hidden states, in plain torch. The adapter imports
it and calls it; nothing of it is copied.
"""

from __future__ import annotations

from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_hidden


def chunked_jsd(beta: float, weight_hard_loss: float = 0.0) -> Loss:
    """The chunked fused linear JSD, of which the hard loss on the labels is a part of the given weight.

    Sixteen rows to a chunk, so that chunks are put together again as in use.
    """

    def liger_jsd(
        student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor
    ) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        settings = {"weight_hard_loss": weight_hard_loss, "weight_soft_loss": 1.0 - weight_hard_loss, "beta": beta}
        published = LigerFusedLinearJSDLoss(**settings, compiled=False, chunk_size=16)
        # Its sum over chunks is kept in the default dtype; float32 is what its users hand over.
        tensors = (t.float() for t in (student, student_head, teacher, teacher_head))
        return published(*tensors, labels)

    return from_hidden(liger_jsd, flat=True)


liger_jsd_0 = chunked_jsd(0.0)
liger_jsd_0_5 = chunked_jsd(0.5)
liger_jsd_1 = chunked_jsd(1.0)


def liger_jsd_default(r: opd.Rollouts) -> Tensor:
    """At the defaults: half of it the cross-entropy of the labels, which on student rollouts are its own samples."""
    return chunked_jsd(0.5, weight_hard_loss=0.5)(r)
