"""The plan of the experiment: one budget for all, whole seeds first."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.reproduction.plan import CONTROLS, DIVERGENCES, ESTIMATORS, FULL, QUICK, TWINS, plan_of
from tests.reproduction.rows import ARMS


def test_the_plan_is_the_whole_grid_with_one_budget_of_rollouts():
    arms = FULL.arms()
    assert len({arm.key for arm in arms}) == len(arms) == 2 * 3 * (15 + len(CONTROLS) + len(TWINS))
    grid = {(arm.task, arm.seed, arm.name) for arm in arms if arm.group == "grid"}
    assert len(grid) == 2 * 3 * len(DIVERGENCES) * len(ESTIMATORS)
    shared = {"task": "", "pair_seed": 0, "seed": 0}
    assert all({**arm.fields, **shared} == {**ARMS[arm.name].fields, **shared} for arm in arms)
    configs = {name: arm.config() for name, arm in ARMS.items()}
    budgets = {(each.batch_size * each.steps, each.learning_rate, each.clip_gradient) for each in configs.values()}
    assert len(budgets) == 1
    # The estimators that can be clipped are, all alike, but for the arm that is there to see what the clip does.
    unclipped = {name for name, config in configs.items() if config.clip_log_ratio != 6.0}
    assert unclipped == {f"{name}/full_vocab" for name in DIVERGENCES} | {
        *("supervised", "constant advantage -1", "sign", "reverse_kl/opd, no clip")
    }


def test_an_interrupted_run_has_a_whole_seed_first():
    seeds = [arm.seed for arm in FULL.arms()]
    assert seeds == sorted(seeds)
    groups = [arm.group for arm in FULL.arms() if arm.seed == 0]
    assert groups[:30] == ["grid"] * 30 and "grid" not in groups[30:]


def test_a_twin_differs_in_its_rollouts_only():
    for name, twin in TWINS.items():
        one, two = ARMS[name].fields, ARMS[twin].fields
        assert {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)} == {"seed"}
        assert one["pair_seed"] == two["pair_seed"]


def test_the_quick_plan_is_a_part_of_the_full_one():
    assert {arm.name for arm in QUICK.arms()} < {arm.name for arm in FULL.arms()}
    assert plan_of("quick", seeds=2, tasks=["tools"]).arms()[-1].task == "tools"
    for wrong in ({"seeds": 0}, {"steps": -1}, {"tasks": ["chess"]}):
        with pytest.raises(InvalidArgumentError):
            plan_of("quick", **wrong)
    with pytest.raises(InvalidArgumentError, match="plan"):
        plan_of("slow")
