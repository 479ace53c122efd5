"""The usable tokens of tensors, arrays and lists are the same; what is left out is counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.tokens import SampledTokens


def padded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher, behavior = (-torch.rand(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    return student, teacher, behavior, torch.rand(5, 7, generator=generator) > 0.3


def same(first, second):
    names = ("student", "teacher", "behavior", "rollout")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_tensors_arrays_lists_and_nested_tensors_give_the_same_tokens():
    student, teacher, behavior, mask = given = padded()
    found = SampledTokens.of(*given)
    assert torch.equal(found.student, student[mask])
    assert torch.equal(found.log_u, (teacher - student)[mask])
    assert torch.equal(found.behavior, behavior[mask])
    assert torch.equal(found.rollout, torch.arange(5).repeat_interleave(mask.sum(-1)))
    nested = [torch.nested.nested_tensor(list(each), layout=torch.jagged) for each in given]
    forms = (
        [each.numpy() for each in given],
        [each.tolist() for each in given],
        [list(each) for each in given],
        nested,
    )
    for form in forms:
        assert same(SampledTokens.of(*form), found)
    assert not same(SampledTokens.of(teacher, student, behavior, mask), found)
    assert not same(SampledTokens.of(student, teacher, behavior, ~mask), found)


def test_columns_of_several_forms_may_be_mixed():
    student, teacher, behavior, mask = padded()
    found = SampledTokens.of(student, teacher.tolist(), behavior.numpy(), [list(row) for row in mask.int().tolist()])
    assert same(found, SampledTokens.of(student, teacher, behavior, mask))


def test_a_single_rollout_has_one_dimension():
    student, teacher, behavior, mask = (each[0] for each in padded())
    found = SampledTokens.of(student, teacher, behavior, mask)
    assert found.rollouts == 1
    assert torch.equal(found.teacher, teacher[mask])


def test_read_only_arrays_are_copied():
    array = np.full((2, 3), -1.0)
    array.flags.writeable = False
    assert len(SampledTokens.of(array, array)) == 6


def test_rows_that_differ_in_length_are_left_out_whole():
    found = SampledTokens.of([[-1.0, -2.0], [-3.0], []], [[-1.0], [-3.0], []])
    assert found.student.tolist() == [-3.0]
    assert found.left_out == {"ragged": 2}
    assert found.rollouts == 1


def test_every_token_that_cannot_be_used_is_counted_once():
    student = [-1.0, math.nan, -math.inf, 0.5, 0.005, -1.0, None]
    teacher = [-math.inf, 1.0, math.nan, -1.0, -1.0, 0.5, -1.0]
    found = SampledTokens.of(student, teacher)
    assert found.left_out == {"nan": 3, "above_zero": 2}
    assert found.student.tolist() == [-1.0, 0.0]
    assert SampledTokens.of([-math.inf, -1.0], [-1.0, -1.0]).left_out == {"impossible": 1}
    assert SampledTokens.of(student, teacher, mask=[1, 0, 0, 0, 0, 0, 0]).left_out == {}


def test_gradients_are_not_kept():
    student = (-torch.ones(2, 2)).requires_grad_()
    assert not SampledTokens.of(student, student).student.requires_grad


@pytest.mark.bad_input
def test_what_is_no_rows_of_numbers_is_refused():
    for bad in ("text", 3.0, torch.zeros(2, 3, 4), [["a"]]):
        with pytest.raises(InvalidArgumentError):
            SampledTokens.of(bad, bad)
    with pytest.raises(InvalidArgumentError, match="rows"):
        SampledTokens.of(torch.zeros(2, 3), torch.zeros(3, 3))
