"""Differences are paired by seed, and reports and predictions are held to them."""

from __future__ import annotations

import math

import pytest

from opdtheory.reproduction.claims import (
    LEVEL,
    PREDICTIONS,
    REPORTS,
    Comparison,
    Difference,
    Prediction,
    difference,
    find,
    ours,
    predicted,
)
from opdtheory.reproduction.plan import FULL, PLANS
from opdtheory.reproduction.summary import summaries, tuned
from tests.reproduction.rows import ARMS, row, world


def test_a_difference_is_paired_by_seed():
    # Students differ by .2 and the arms by .05 on each: paired, that is certain.
    rows = [row("reverse_kl/opd", 0.4 + 0.2 * seed, seed) for seed in range(3)]
    rows += [row("jsd/opd_plus", 0.45 + 0.2 * seed + 0.001 * seed, seed) for seed in range(3)]
    table = {each.name: each for each in summaries(rows)}
    found = difference(table["jsd/opd_plus"], table["reverse_kl/opd"])
    assert found.place == "above" and found.mean == pytest.approx(0.051)
    # Student's interval of the gaps .050, .051, .052.
    assert found.high - found.mean == pytest.approx(4.302653 * 0.001 / math.sqrt(3))
    # The same ends with the seeds exchanged are no longer so.
    exchanged = [{**each, "seed": (each["seed"] + 1) % 3} if each["name"] == "jsd/opd_plus" else each for each in rows]
    table = {each.name: each for each in summaries(exchanged)}
    assert difference(table["jsd/opd_plus"], table["reverse_kl/opd"]).place == "not resolved"


@pytest.mark.parametrize(
    ("low", "high", "place"),
    [
        (0.01, 0.2, "above"),
        (-0.2, -0.01, "below"),
        (-LEVEL, LEVEL, "level"),
        (-0.01, 0.06, "not resolved"),
        (-math.inf, math.inf, "not resolved"),
    ],
)
def test_level_is_said_only_where_the_whole_interval_is_small(low, high, place):
    assert Difference(5, (low + high) / 2, low, high).place == place


def test_what_is_a_little_below_is_still_close():
    near, far = Difference(5, -0.007, -0.013, -0.002), Difference(5, -0.07, -0.13, -0.002)
    assert near.place == far.place == "below" and near.is_close and not far.is_close
    assert near.bears_out(("level", "above")) and not far.bears_out(("level", "above"))
    assert not near.bears_out(("above",)) and near.bears_out(("below",))
    assert str(near).endswith("below, within 0.05") and str(far).endswith("below")


def test_one_seed_resolves_nothing():
    table = summaries([row("reverse_kl/opd", 0.4), row("jsd/opd_plus", 0.9)])
    assert ours(table, "arithmetic", Comparison("jsd/opd_plus")).place == "not resolved"
    assert ours(table, "tools", Comparison("jsd/opd_plus")) is None
    assert difference(table[0], summaries([row("jsd/opd_plus", 0.9, 1)])[0]) is None


def test_predictions_turn_with_the_rows():
    says = Prediction("", ("above",), (Comparison("jsd/top 8 and tail"), Comparison("jsd/top 8 and tail", "jsd/opd")))
    words, lines = predicted(summaries(world()), ["arithmetic", "tools"], says)
    assert words == "holds in 2 of 2" and len(lines) == 2 and "arithmetic +0.100" in lines[0]
    words, _ = predicted(summaries(world(**{"jsd/top 8 and tail": 0.2})), ["arithmetic"], says)
    assert words == "holds in 1 of 2, fails in 1"
    assert predicted(summaries(world()), ["tools"], says) == ("holds in 0 of 0", [])


def test_reports_and_predictions_speak_of_arms_that_are_run():
    compared = [each.compared for each in REPORTS] + [
        each for prediction in PREDICTIONS for each in prediction.compared
    ]
    known = {arm.name for plan in PLANS.values() for arm in plan.arms()}
    assert {name for each in compared for name in each if name is not None} <= known
    assert len({(each.claim, each.source) for each in REPORTS}) == len(REPORTS)


def test_arms_at_their_own_rate_are_compared_with_each_other():
    arm = ARMS["jsd/opd_plus"]
    tuning = [arm.at_rate(rate, "tuning", 100) for rate in (7e-4, 2e-3, 5e-3)]
    rows = [
        *world(),
        *(row(each.name, 0.1 if each.fields["learning_rate"] > 1e-3 else 0.9, arm=each) for each in tuning),
    ]
    rows += [row(arm.name, 0.8, arm=arm.at_rate(7e-4, "tuned", seed)) for seed in range(3)]
    (found,) = tuned(rows, FULL)
    assert (found.name, found.sampled.mean, found.seeds) == ("jsd/opd_plus", pytest.approx(0.8), (0, 1, 2))
    assert find(summaries(rows), "arithmetic", "jsd/opd_plus").sampled.mean == pytest.approx(0.59)
