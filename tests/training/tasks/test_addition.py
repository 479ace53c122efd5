"""Addition by columns."""

from __future__ import annotations

from opdtheory.training.tasks import Addition
from tests.training.tasks.written import written


def test_the_columns_of_a_sum_are_right():
    subject = Addition(4)
    for example in subject.examples("train", 50, 5):
        columns, answer = written(subject, example).split("=")
        parts = {columns[start]: columns[start + 1 : start + 6] for start in range(0, len(columns), 6)}
        assert sorted(parts) == list("abcd")
        for letter, (one, other, carry, tens, units) in parts.items():
            assert int(one) + int(other) + int(carry) == 10 * int(tens) + int(units)
            assert units == answer[::-1]["abcd".index(letter)]
