"""T19 holds step by step, and random rows yield no counterexample to what bounds what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdtheory.exact import least_variance
from opdtheory.testing import divergences, policy_pairs
from opdtheory.theorems import theorems
from opdtheory.theorems.instances.freedom import freedom, laws
from tests.sparse import some
from tests.tolerances import ENUMERATION

THEOREMS = theorems("T19", "T19b", "T19c")

one_row = policy_pairs(vocab_size=(2, 5), horizon=1, eos=None, distinct=True)


@pytest.mark.parametrize("theorem", some(THEOREMS, ids=(theorem.number for theorem in THEOREMS)))
def test_every_part_holds_and_every_twin_is_refuted(theorem):
    result = theorem.run()
    assert result.passed and result.seconds < 20.0  # on a slow machine; about a second otherwise
    assert all(len(identity.twins) >= 2 for identity in theorem.identities)


@given(one_row, divergences(smooth=True), st.integers(0, 5), st.sampled_from(["teacher", "student"]))
def test_nothing_unbiased_has_less_than_the_floor(pair, d, k, support):
    student, teacher = (policy.logits[0] for policy in pair)
    found = least_variance(student, teacher, d, min(k, student.shape[-1]), support, group=3)
    size = ENUMERATION * (1.0 + float(found.leave_one_out.variance) + float(found.split_level.variance))

    def at_most(low, high):
        return float(low.variance) <= float(high.variance) + size

    assert all(at_most(found.floor, other) for other in (found.split, found.event, found.sampled))
    assert at_most(found.split, found.split_level)
    assert at_most(found.event, found.sampled) and at_most(found.sampled, found.centred)
    assert at_most(found.sampled, found.leave_one_out)


def test_the_grid_holds_every_law():
    assert list(laws(2, 4)) == [(1, 3), (2, 2), (3, 1)]
    assert list(laws(3, 6, (2,))) == [(2, 1, 3), (2, 2, 2), (2, 3, 1)]
    assert freedom(3, 0) == 1 and freedom(2, 0) == 16


def test_the_constants_are_those_that_are_named():
    p, q = (torch.tensor([row]).double().log() for row in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]))
    found = least_variance(p, q, "forward_kl", k=1)
    assert float(found.centred.constant) == 1.0
    assert float(found.split_level.constant) == pytest.approx((0.2 + 0.3) / (0.5 + 0.2))
    assert float(found.leave_one_out.constant) == pytest.approx(1.0)
