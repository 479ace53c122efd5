"""Policies that sample in the student's place, for losses run as black boxes."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.exact import TabularPolicy, exact_gradient, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import Pair, sampled_gradient
from opdtheory.theorems.instances.one_sample import log_rows

__all__ = ["CAP", "HIGH", "LOW", "Triple", "behaviors", "log_ratios", "near_and_far", "one_step"]

# Where a ratio is cut, and between which bounds a mask keeps it.
CAP, LOW, HIGH = Fraction(5, 4), Fraction(4, 5), Fraction(6, 5)


class Triple(NamedTuple):
    """A student, a teacher and the policy that samples, with what the latter is called."""

    student: TabularPolicy
    teacher: TabularPolicy
    behavior: TabularPolicy
    name: str

    @property
    def label(self) -> str:
        """The case in words: `bfloat16, 5 tokens`."""
        return f"{self.name}, {self.student.vocab_size} tokens"

    @property
    def pair(self) -> Pair:
        """Student and teacher."""
        return self.student, self.teacher

    @property
    def rows(self) -> list[Tensor]:
        """The first rows of log-probabilities of student, teacher and behavior."""
        return log_rows(self.student, self.teacher, self.behavior)

    def gradient(self, name: str, divergence: str | None = None, importance: str | None = None) -> list[Tensor]:
        """Expected gradient of an estimator on rollouts of the behavior, run as a black box."""
        return sampled_gradient(name, divergence, self.pair, behavior=self.behavior, importance=importance)


@functools.cache
def behaviors() -> tuple[Triple, ...]:
    """The student one step ago, a noisy inference engine, and logits rounded to bfloat16."""
    found = []
    for student, teacher in (random_pair(3, 2, eos=0, seed=6), random_pair(5, 1, distance=1.5, seed=8)):
        step = exact_gradient(student, teacher, "reverse_kl")
        stale = [torch.add(z, g, alpha=0.5) for z, g in zip(student.logits, step, strict=True)]
        sampling = {
            "stale student": TabularPolicy(stale, eos=student.eos),
            "perturbed engine": student.perturbed(0.3, seed=3),
            "bfloat16": TabularPolicy([z.bfloat16().double() for z in student.logits], eos=student.eos),
        }
        found += [Triple(student, teacher, mu, name) for name, mu in sampling.items()]
    return tuple(found)


def one_step() -> list[Triple]:
    """The behaviors on rollouts of one token."""
    return [triple for triple in behaviors() if triple.student.horizon == 1]


@functools.cache
def near_and_far() -> tuple[Triple, ...]:
    """The behaviors, and samplers far enough from the student for every bound to matter."""
    far = [
        triple._replace(behavior=triple.student.perturbed(1.0, seed=5), name="another policy") for triple in behaviors()
    ]
    return (*behaviors(), far[0], far[-1])


def log_ratios(r: Rollouts) -> Tensor:
    r"""$\log\rho$ of each token, detached, and 0 at padding."""
    assert r.behavior_logprobs is not None
    return (r.mask * (r.student_logprobs - r.behavior_logprobs)).detach()
