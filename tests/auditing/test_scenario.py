"""The pairs of policies on which an audit runs: with prompts, tools and groups of one prompt."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory import divergence, estimator, exact_gradient
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import expected_gradient, gradient_moments, random_pair
from opdtheory.objective import Objective
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
        pytest.param("prompts", {"prompts": 1.5}, marks=pytest.mark.bad_input),
        ("environment", {"environment": (-1,)}),
        ("environment", {"environment": (3,)}),
        pytest.param("environment", {"environment": ("1",)}, marks=pytest.mark.bad_input),
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size: must be an integer of at least 1, got 0"),
        ({"batch_size": True}, "batch_size: must be an integer of at least 1, got True"),
        ({"seed": -1}, "seed: must be an integer of at least 0, got -1"),
        ({"prompts": 1.5}, "prompts: must be an integer of at least 1, got 1.5"),
        ({"environment": (0, 3)}, r"environment: must be an integer in \[0, 2\], got 3"),
        ({"off_policy": -0.1}, "off_policy: must be a finite number of at least 0, got -0.1"),
        ({"off_policy": float("inf")}, "off_policy: must be a finite number of at least 0, got inf"),
    ],
)
@pytest.mark.bad_input
def test_a_scenario_out_of_range_is_refused(settings, message):
    with pytest.raises(InvalidArgumentError, match=f"^{message}$"):
        Scenario(**settings)


def test_more_rollouts_than_can_be_enumerated_are_refused():
    with pytest.raises(BudgetExceededError, match="batches of 64 rollouts .* smaller batch_size"):
        Scenario(64).pairs()


def test_what_a_scenario_says_of_its_rollouts():
    grouped = Scenario(4, eos=1, off_policy=0.2, seed=3, prompts=2, environment=(1,), shared_prompt=True)
    assert grouped.coupled and not Scenario().coupled and not grouped.single.coupled
    assert grouped.single == Scenario(1, 1, 0.2, 3, 2, (1,), True)
    assert grouped.to_dict()["environment"] == (1,) and Scenario(**grouped.to_dict()) == grouped
    assert not Scenario(3).masks
    for masking in ({"eos": 0}, {"prompts": 2}, {"environment": (0,)}):
        assert Scenario(**masking).masks
    student = Scenario().pairs()[0].student
    assert Scenario().behavior(student, 1) is None
    noisy = grouped.behavior(student, 1)
    assert noisy is not None and all(map(torch.equal, noisy.logits, student.perturbed(0.2, seed=1).logits))


@pytest.mark.parametrize("scenario", [Scenario(2, off_policy=0.3), Scenario(2, prompts=2, shared_prompt=True)])
def test_moments_are_those_of_the_gradient(scenario):
    case = scenario.pairs()[3]
    loss = estimator("opd", "jsd", baseline="group_mean")
    found = scenario.moments(loss, case, thorough=True)
    policies = (case.student, case.teacher)
    exact = gradient_moments(loss, *policies, 2, case.behavior, shared_prompt=scenario.shared_prompt)
    assert gradient_gap(found.mean, exact.mean) == 0.0 and found.variance == exact.variance
    # Another sampling policy, or other groups, make other moments.
    other = gradient_moments(loss, *policies, 2, shared_prompt=not scenario.shared_prompt and scenario.prompts > 1)
    assert found.variance != other.variance
    with pytest.raises(BudgetExceededError):
        scenario.moments(loss, case, budget=10)


def test_the_gradient_of_a_sum_is_the_sum_of_gradients():
    case = Scenario().pairs()[2]
    terms = ((2.0, divergence("reverse_kl")), (-0.5, divergence("jsd")))
    found = case.exact(Objective(terms, "sequence"))
    parts = [exact_gradient(case.student, case.teacher, d, "sequence") for _, d in terms]
    expected = [2.0 * a - 0.5 * b for a, b in zip(*parts, strict=True)]
    assert gradient_gap(found, expected) <= ENUMERATION
    assert gradient_gap(case.exact(Objective(terms)), expected) > 1e-3
