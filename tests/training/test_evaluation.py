"""Accuracy on the test split."""

from __future__ import annotations

import opdtheory as opd
from opdtheory.training.intervals import wilson
from tests.training.runs import (
    TASK,
    config,
    model,
)


def test_evaluation_counts_and_brackets() -> None:
    settings = config(eval_examples=9, eval_every=2, steps=3, prompts_per_step=4)
    result = opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK)
    assert [row["step"] for row in result.evaluations] == [0, 2, 3]
    row = result.evaluations[0]
    assert (row["greedy_low"], row["greedy_high"]) == wilson(round(9 * row["greedy_accuracy"]), 9)
    assert row["test_reverse_kl"] > 0
