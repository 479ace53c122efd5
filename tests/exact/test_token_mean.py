"""Token means at any batch size from single rollouts, against every batch enumerated."""

from __future__ import annotations

import pytest
import torch

from opdtheory import Rollouts, random_pair
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import gradient_moments
from opdtheory.exact.token_mean import token_mean_moments
from opdtheory.testing import gradient_gap
from tests.tolerances import ENUMERATION


def token_sum(r: Rollouts) -> torch.Tensor:
    return r.token_sum(-r.log_u.detach() * r.student_logprobs)


def token_mean(r: Rollouts) -> torch.Tensor:
    return r.token_mean(-r.log_u.detach() * r.student_logprobs)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
@pytest.mark.parametrize("off_policy", [0.0, 0.4])
def test_mean_and_variance_are_those_of_every_batch(batch_size, off_policy):
    student, teacher = random_pair(3, 2, eos=0, seed=1)
    behavior = student.perturbed(off_policy, seed=5) if off_policy else None
    found = token_mean_moments(token_sum, student, teacher, batch_size, behavior)
    every = gradient_moments(token_mean, student, teacher, batch_size, behavior)
    assert gradient_gap(found.mean, every.mean) <= ENUMERATION
    assert found.variance == pytest.approx(every.variance, rel=1e-10)
    # The twin: the mean of the rollouts' own means.
    twin = gradient_moments(lambda r: r.sequence_mean(-r.log_u.detach() * r.student_logprobs), student, teacher, 2)
    assert batch_size == 1 or gradient_gap(found.mean, twin.mean) > 1e-4


def test_a_large_batch_tends_to_the_sum_over_the_mean_length():
    student, teacher = random_pair(3, 2, eos=0, seed=1)
    exact = gradient_moments(token_sum, student, teacher)
    first = float(student.logits[0].softmax(-1)[0, 0])
    length = 1.0 * first + 2.0 * (1.0 - first)
    gaps = []
    for batch_size in (64, 128, 256):
        found = token_mean_moments(token_sum, student, teacher, batch_size)
        gaps.append(gradient_gap([length * level for level in found.mean], exact.mean))
    # The bias falls as 1/B (T11).
    assert gaps[0] < 2e-3 and gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2.0, rel=0.05)


def test_a_batch_needs_a_rollout():
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        token_mean_moments(token_sum, *random_pair(2, 2), 0)
