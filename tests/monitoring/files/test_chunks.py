"""Blocks become chunks: none lost, none cut within a rollout, a bounded number waiting."""

from __future__ import annotations

import numpy as np
import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.files import chunks
from opdtheory.monitoring.files.blocks import Block, Key
from opdtheory.monitoring.files.chunks import Grouper, Scales, chunk_of
from opdtheory.monitoring.files.faults import FAULTS, LeftOut
from opdtheory.monitoring.tokens import REASONS


def block(step, lengths, first=0):
    column = -1.0 - np.arange(first, first + sum(lengths))
    key = Key(step, None, ("student", "teacher"), False)
    return Block(key, {"student": column, "teacher": column - 1}, np.array(lengths))


def gathered(blocks):
    grouper = Grouper()
    found = [whole for each in blocks for _, whole in grouper.add(each)]
    return [*found, *(whole for _, whole in grouper.rest())]


@pytest.mark.parametrize("together", [1, 10, 37, 10_000])
def test_nothing_is_lost_and_rollouts_stay_whole(together, monkeypatch):
    monkeypatch.setattr(chunks, "_TOGETHER", together)
    lengths = np.random.default_rng(0).integers(1, 9, 200).tolist()
    (whole,) = [block(0, lengths)]
    found = gathered([whole])
    assert np.array_equal(np.concatenate([each.columns["student"] for each in found]), whole.columns["student"])
    assert np.concatenate([each.lengths for each in found]).tolist() == lengths
    assert all(each.lengths.sum() == len(each.columns["teacher"]) for each in found)
    assert max(len(each.columns["student"]) for each in found) <= 2 * together + 8


def test_steps_come_in_their_order_and_few_tokens_wait(monkeypatch):
    monkeypatch.setattr(chunks, "_WAITING", 50)
    found = gathered([block(step, [5]) for step in range(40)])
    assert [each.key.step for each in found] == list(range(40))
    grouper = Grouper()
    for step in range(40):
        list(grouper.add(block(step, [5])))
        assert sum(grouper._tokens.values()) < 50


def test_a_step_that_is_full_does_not_overtake_an_older_one(monkeypatch):
    monkeypatch.setattr(chunks, "_TOGETHER", 10)
    found = gathered([block(0, [5]), block(1, [12]), block(0, [5])])
    assert [each.key.step for each in found] == [0, 1, 0]


def test_scales_of_columns_with_one_number_below_zero_pass():
    scales = Scales()
    scales.add(block(0, [3]))
    zeros = block(0, [3])
    zeros.columns["student"][:] = 0.0
    scales.add(zeros)
    scales.check()
    twin = Scales()
    twin.add(zeros)
    with pytest.raises(InvalidArgumentError, match="student: the 3 values are zero throughout"):
        twin.check()


def test_left_out_tokens_have_words():
    found = LeftOut()
    bad = block(0, [4])
    bad.columns["student"][0], bad.columns["teacher"][1] = np.nan, 3.0
    chunk = chunk_of(bad.key, bad, found)
    assert chunk is not None and len(chunk.tokens) == found.tokens == 2
    assert found.counts == {"nan": 1, "above_zero": 1}
    assert len(found.words) == 2
    assert str(LeftOut()) == "Nothing was left out."
    assert set(REASONS) <= set(FAULTS)
