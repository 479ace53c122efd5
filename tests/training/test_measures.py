"""What a batch says of the student: distances and clipped tokens."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.training.measures import clipped, distances
from opdtheory.training.models.language_model import rollouts
from tests.tolerances import ALGEBRA
from tests.training.runs import config, first_batch


def test_distances_are_those_of_the_whole_vocabulary() -> None:
    student, teacher, samples = first_batch(config())
    scored = rollouts(student, teacher, samples)
    sums = distances(scored)
    for name in ("reverse_kl", "forward_kl"):
        value = opd.estimator("full_vocab", name).token_loss(scored)
        assert float(sums[name]) == pytest.approx(float((value.detach() * scored.mask).sum()), rel=ALGEBRA)
    p = torch.distributions.Categorical(logits=scored.student_logits.detach())
    assert float(sums["entropy"]) == pytest.approx(float((p.entropy() * scored.mask).sum()), rel=ALGEBRA)
    log_u = scored.log_u.detach()
    bound = float(log_u.abs().median())
    expected = int(((log_u.abs() > bound) & (scored.mask > 0)).sum())
    assert int(clipped(opd.estimator("k2_loss", clip_log_ratio=bound), scored)) == expected > 0
    low, high = -bound, bound
    assert int(clipped(opd.estimator("k1_reward", clip_weight=(low, high)), scored)) == expected
    assert int(clipped(opd.estimator("k1_reward"), scored)) == 0
