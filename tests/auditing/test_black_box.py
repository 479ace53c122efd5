"""A loss under audit: what counts as rounding in its own dtype."""

from __future__ import annotations

import torch

from opdtheory.rollouts import Rollouts
from tests.auditing.verdicts import audit
from tests.tolerances import ENUMERATION


def test_a_float32_loss_is_judged_by_its_own_rounding() -> None:
    def loss(r: Rollouts) -> torch.Tensor:
        log_p, log_q = torch.log_softmax(r.student_logits.float(), -1), torch.log_softmax(r.teacher_logits.float(), -1)
        return r.token_sum((log_p.exp() * (log_p - log_q)).sum(-1))

    report = audit(loss, "reverse_kl")
    assert report.verdict == "exact"
    assert report.weight["depends_on_ratio_only"]
    assert report.tolerance > 1e-9
    assert report.relative_bias > ENUMERATION
