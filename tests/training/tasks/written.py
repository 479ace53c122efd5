"""Every task, its answers by another road, and its demonstrations as one text."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest

from opdtheory.training.tasks import Addition, Example, Modular, Task, Tools

VARIANTS = [Addition(), Addition(2), Tools(), Tools(2), Tools(4), Modular(), Modular(3)]

each_task = pytest.mark.parametrize("subject", VARIANTS, ids=lambda subject: subject.name)


def truth(example: Example) -> str:
    """The answer by another road: Python's own arithmetic."""
    if "?" not in example.prompt:
        text = re.sub(r"\b0+(?=\d)", "", example.prompt[:-1])
        value = str(eval(text))  # noqa: S307
        return value.zfill(len(example.answer)) if "+" in text and example.answer.startswith("0") else value
    body, asked = example.prompt.split("?")
    values: dict[str, Fraction] = {}
    lines = [line for line in body.split(".")]
    for _ in lines:
        for line in lines:
            try:
                values[line[0]] = Fraction(eval(line[1:], {}, values))  # noqa: S307
            except NameError:
                continue
    return str(values[asked] % 10)


def written(subject: Task, example: Example, seed: int = 0) -> str:
    return "".join(text for text, _ in subject.demonstration(example, random.Random(seed)))
