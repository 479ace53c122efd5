"""Definitions modulo ten."""

from __future__ import annotations

from opdtheory.training.tasks import Modular
from tests.training.tasks.written import written


def test_modular_steps_use_only_what_is_known():
    subject = Modular()
    for example in subject.examples("train", 80, 5):
        steps, answer = written(subject, example).split("=")
        parts = [steps[start : start + 5] for start in range(0, len(steps), 5)]
        values = {}
        for name, one, sign, other, value in parts:
            line = next(line for line in example.prompt.split("?")[0].split(".") if line[0] == name)
            digits = [operand if operand.isdigit() else values[operand] for operand in (line[1], line[3])]
            assert sign == line[2]
            assert [one, other] == digits or (sign != "-" and [other, one] == digits)
            assert eval(f"{one}{sign}{other}") % 10 == int(value)  # noqa: S307
            values[name] = value
        assert values[example.prompt[-1]] == answer and len(values) == 5
