"""The pairs of policies on which an audit runs: with prompts, tools and groups of one prompt."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory import estimator, exact_gradient
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import expected_gradient, random_pair
from opdtheory.testing import gradient_gap
from tests.tolerances import ENUMERATION


def test_the_panel_without_prompts_is_the_random_pairs():
    for case, again in zip(
        Scenario(2, eos=0, seed=3).pairs(), Scenario(2, eos=0, seed=3, prompts=1, environment=()).pairs(), strict=True
    ):
        assert all(map(torch.equal, case.student.logits, again.student.logits))
        assert case.student.environment == again.student.environment == ()
    student, teacher = random_pair(4, 3, scale=1.0, distance=0.03, seed=1000 * 3)
    assert all(map(torch.equal, Scenario(seed=3).pairs()[0].student.logits, student.logits))
    assert all(map(torch.equal, Scenario(seed=3).pairs()[0].teacher.logits, teacher.logits))


@pytest.mark.parametrize("off_policy", [0.0, 0.3])
@pytest.mark.parametrize(("prompts", "environment", "levels"), [(2, (), (0,)), (3, (1,), (0, 2)), (1, (2,), (2,))])
def test_panels_with_prompts_and_tools(prompts, environment, levels, off_policy):
    loss = estimator("opd_plus", "jsd", importance="prefix")
    for case in Scenario(eos=0, off_policy=off_policy, prompts=prompts, environment=environment).pairs()[::3]:
        assert case.student.environment == case.teacher.environment == levels
        assert case.student.horizon - 1 not in levels
        assert int(torch.isfinite(case.student.logits[0]).sum()) == (prompts if prompts > 1 else 4)
        found = expected_gradient(loss, case.student, case.teacher, behavior=case.behavior)
        assert gradient_gap(found, exact_gradient(case.student, case.teacher, "jsd")) <= ENUMERATION


def test_groups_of_one_prompt_keep_the_larger_policies():
    assert Scenario(4, eos=0, prompts=2, shared_prompt=True).pairs()[0].student.vocab_size == 3
    assert Scenario(4, eos=0, prompts=2).pairs()[0].student.vocab_size == 2


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("prompts", {"prompts": 0}),
        ("prompts", {"prompts": 5}),
        ("prompts", {"prompts": 1.5}),
        ("environment", {"environment": (-1,)}),
        ("environment", {"environment": (3,)}),
        ("environment", {"environment": ("1",)}),
    ],
)
def test_panels_out_of_range_are_refused(argument, settings):
    with pytest.raises(InvalidArgumentError) as caught:
        Scenario(**settings).pairs()
    assert caught.value.argument == argument


def test_panel_pairs_differ_in_distance_and_length() -> None:
    for eos in (None, 0):
        cases = Scenario(eos=eos).pairs()
        assert len(cases) == 6
        assert all(case.student.eos == eos for case in cases)
        distances = [float(opd.exact_value(case.student, case.teacher, "jsd")) for case in cases]
        assert max(distances) > 100 * min(distances)
