"""Shares with intervals, and verdicts, from the rows."""

from __future__ import annotations

import pytest

from opdtheory.reproduction.summary import share_of, summaries
from opdtheory.training.intervals import wilson
from tests.reproduction.rows import row, world


def test_intervals_widen_with_the_spread_between_seeds():
    one = share_of([0.6], 1000)
    assert (one.low, one.high) == pytest.approx(wilson(600, 1000))
    alike, apart = share_of([0.6, 0.6, 0.6], 1000), share_of([0.5, 0.6, 0.7], 1000)
    assert alike.mean == apart.mean
    assert apart.high - apart.low > 3 * (alike.high - alike.low)
    none = share_of([0.0, 0.0], 100)
    assert none.low == 0.0 < none.high


def test_verdicts_follow_from_the_rows():
    table = {each.name: each for each in summaries(world())}
    assert table["forward_kl/opd"].verdict == (
        "collapses: below the student's start in 3 of 3 seeds, further from the teacher in 3 of 3"
    )
    assert table["jsd/opd_plus"].word == "trains"
    assert {each.name: each.word for each in summaries(world(**{"jsd/opd": 0.205}))}["jsd/opd"] == "stays"
    lost = row("jsd/opd", 0.0)
    lost["end"]["test_reverse_kl"] = 1.39  # from 0.7
    assert summaries([lost])[0].word == "declines"
    mixed = [row("jsd/opd", 0.9, 0), row("jsd/opd", 0.0, 1)]
    assert summaries(mixed)[0].word == "mixed"
    failed = [row("jsd/opd", 0.9, 0), {**row("jsd/opd", 0.9, 1), "status": "failed", "error": "the loss is nan"}]
    assert summaries(failed)[0].word == "fails" and summaries(failed)[0].failed == ("seed 1: the loss is nan",)
