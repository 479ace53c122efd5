"""The plan of the experiment: one budget for all, whole seeds first, a rate tuned on a seed of its own."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.reproduction.plan import (
    CONTROLS,
    DIVERGENCES,
    FULL,
    QUICK,
    RATES,
    REFERENCE,
    SMOLLM2,
    TUNING_SEED,
    plan_of,
)
from tests.reproduction.rows import ARMS, row

COMPARED = 1 + len(DIVERGENCES) * len(FULL.forms)


def test_the_plan_compares_all_forms_with_one_budget_of_rollouts():
    arms = FULL.arms()
    assert len({arm.key for arm in arms}) == len(arms)
    main = [arm for arm in arms if arm.group == "main"]
    assert len(main) == 2 * 5 * COMPARED
    assert len([arm for arm in arms if arm.group == "control"]) == 2 * 2 * len(CONTROLS)
    shared = {"task": "", "pair_seed": 0, "seed": 0}
    assert all({**arm.fields, **shared} == {**ARMS[arm.name].fields, **shared} for arm in main)
    configs = {name: arm.config() for name, arm in ARMS.items()}
    budgets = {(each.batch_size * each.steps, each.learning_rate, each.clip_gradient) for each in configs.values()}
    assert len(budgets) == 1
    # What weighs the sampled token alone is clipped, all alike, but for the control of the clip.
    clips = {name: config.clip_log_ratio for name, config in configs.items()}
    sampled = {name for name in clips if "/opd" in name}
    assert {name for name, clip in clips.items() if clip == 6.0} == sampled - {"forward_kl/opd_plus, clip 2"}


def test_an_interrupted_run_has_a_whole_seed_first():
    seeds = [arm.seed for arm in FULL.arms() if arm.group == "main"]
    assert seeds == sorted(seeds)
    groups = [arm.group for arm in FULL.arms()]
    assert groups == sorted(groups, key=["main", "control", "tuning"].index)


def test_the_rate_is_tuned_on_a_seed_that_is_not_used_again():
    tuning = [arm for arm in FULL.arms() if arm.group == "tuning"]
    assert {arm.seed for arm in tuning} == {arm.fields["pair_seed"] for arm in tuning} == {TUNING_SEED}
    assert TUNING_SEED not in {arm.seed for arm in FULL.arms() if arm.group != "tuning"}
    assert {arm.fields["learning_rate"] for arm in tuning} == set(RATES)
    # The best of the three on that seed is run with the seeds of the comparison, if it is not the common rate.
    mine = [arm for arm in tuning if (arm.task, arm.name) == ("arithmetic", REFERENCE)]
    ends = dict(zip(RATES, (0.5, 0.4, 0.3), strict=True))
    rows = [row(arm.name, ends[arm.fields["learning_rate"]], arm=arm) for arm in mine]
    assert FULL.chosen_rates(rows) == {("arithmetic", REFERENCE): RATES[0]}
    tuned = FULL.tuned_arms(rows)
    assert [arm.seed for arm in tuned] == list(range(5)) and {arm.group for arm in tuned} == {"tuned"}
    assert {arm.fields["learning_rate"] for arm in tuned} == {RATES[0]}
    # Nothing is chosen before all three have ended, and what fails is not chosen.
    assert FULL.chosen_rates(rows[:2]) == {}
    failed = [{**rows[0], "status": "failed"}, *rows[1:]]
    assert FULL.chosen_rates(failed) == {("arithmetic", REFERENCE): RATES[1]} and FULL.tuned_arms(failed) == []


def test_a_plan_of_a_real_language_model():
    arms = SMOLLM2.arms()
    assert {arm.base for arm in arms} == {"smollm2"} and FULL.arms()[0].base is None
    assert {arm.fields["k"] for arm in arms if "k" in arm.fields} == {16, 64}
    assert plan_of("smollm2", steps=2, tasks=["tools"]).arms()[0].config().warmup_steps == 0


def test_the_quick_plan_is_a_part_of_the_full_one():
    assert {arm.name for arm in QUICK.arms()} < {arm.name for arm in FULL.arms()}
    assert plan_of("quick", seeds=2, tasks=["tools"]).arms()[-1].task == "tools"
    for wrong in ({"seeds": 0}, {"steps": -1}, {"tasks": ["chess"]}):
        with pytest.raises(InvalidArgumentError):
            plan_of("quick", **wrong)
    with pytest.raises(InvalidArgumentError, match="plan"):
        plan_of("slow")
