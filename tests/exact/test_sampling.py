"""Rollouts drawn from tables."""

from __future__ import annotations

import torch

from opdtheory.exact import random_pair
from opdtheory.exact.sampling import Sampler
from opdtheory.rollouts import gather_logprobs


def test_drawn_logprobs_are_those_of_the_drawn_logits():
    student, teacher = random_pair(4, 3, eos=1, zeros=1)
    sample = Sampler.build(student, teacher, student.perturbed(0.3)).draw(50, torch.Generator().manual_seed(0))
    r = sample.rollouts
    expected = gather_logprobs(r.teacher_logits, r.tokens, r.mask)
    assert torch.equal(r.teacher_logprobs, expected)
