"""Every sequence of a pair: masks, prompts and what rollouts show of an environment."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opdtheory import Rollouts, TabularPolicy
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import Enumeration, random_pair
from opdtheory.exact.enumeration import shown_tables
from tests.tolerances import ENUMERATION


def test_an_end_of_sequence_token_of_the_environment_ends_nothing():
    student, teacher = random_pair(2, 3, eos=0, seed=0, environment=(0,))
    every = Enumeration.build(student, teacher)
    rows = {tuple(y): tuple(m) for y, m in zip(every.tokens.tolist(), every.mask.tolist(), strict=True)}
    assert rows == {
        (x, *y): (0.0, *m)
        for x in (0, 1)
        for y, m in (((0, 0), (1.0, 0.0)), ((1, 0), (1.0, 1.0)), ((1, 1), (1.0, 1.0)))
    }
    assert float(every.probability.sum()) == pytest.approx(1.0, abs=ENUMERATION)
    assert every.prompts.tolist() == every.tokens[:, 0].tolist()


def test_rollouts_of_an_enumeration_pass_every_check():
    student, teacher = random_pair(3, 3, eos=0, seed=0, environment=(0, 2), zeros=1)
    for behavior in (None, student.perturbed(0.5)):
        r = Enumeration.build(student, teacher, behavior).rollouts()
        # Without a setting that asks for more, rollouts hold tensors only.
        fields = {each.name: getattr(r, each.name) for each in dataclasses.fields(Rollouts) if each.name != "extras"}
        assert r.extras is None
        Rollouts(**fields)
        written = torch.tensor([0, 2])
        assert torch.isfinite(r.student_logits[:, written]).all() and torch.isfinite(r.teacher_logits[:, written]).all()
        again = Rollouts.from_logits(r.tokens, r.student_logits, r.teacher_logits, r.mask, r.behavior_logprobs)
        for name, field in fields.items():
            assert torch.equal(field, getattr(again, name))


def test_rows_of_another_batch_are_refused():
    every = Enumeration.build(*random_pair(2, 2))
    with pytest.raises(InvalidArgumentError, match=r"student_logits: must hold rows .*\(4, 2\), got shape \(1, 2, 2\)"):
        every.rollouts(slice(None), torch.zeros(1, 2, 2, dtype=torch.float64))


def test_opinions_of_what_an_environment_writes_differ_by_policy_and_position():
    policy = TabularPolicy([torch.zeros(3**n, 3, dtype=torch.float64) for n in range(2)], environment=(0, 1))
    shown = {role: shown_tables(policy, role) for role in ("student", "teacher", "behavior")}
    assert torch.equal(shown["behavior"][1], policy.logits[1])
    first = [table[0].tolist() for role in ("student", "teacher") for table in shown[role]]
    assert len(set(map(tuple, first))) == 4
    for role in ("student", "teacher"):
        moved = shown_tables(TabularPolicy([z + 5.0 for z in policy.logits], environment=(0, 1)), role)
        torch.testing.assert_close(moved[1], shown[role][1] + 5.0)
