"""Pairs of policies to draw from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opdtheory.auditing.scenario import Case
from opdtheory.exact import random_pair
from opdtheory.rollouts import Rollouts
from tests.exact.chains import chains

Loss = Callable[[Rollouts], Tensor]
ORIGIN = torch.zeros((), dtype=torch.float64)


def small_case(
    vocab_size: int = 3, horizon: int = 2, eos: int | None = None, off_policy: float = 0.0, seed: int = 0
) -> Case:
    student, teacher = random_pair(vocab_size, horizon, eos=eos, scale=1.0, distance=1.0, seed=seed)
    behavior = student.perturbed(off_policy, seed=77) if off_policy else None
    return Case(student, teacher, behavior, "small")


def long_case() -> Case:
    """A pair with 32**16 sequences."""
    return Case(*chains(), None, "chains")  # type: ignore[arg-type]
