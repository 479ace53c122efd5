"""Equations in shuffled order, solved step by step modulo ten."""

from __future__ import annotations

import random
import re

from opdtheory.training.models.vocabulary import CharacterVocabulary
from opdtheory.training.tasks.task import Example, Task, check_size

__all__ = ["Modular"]

_NAMES = "abcdefghij"
_EQUATION = re.compile(r"([a-j])([0-9a-j])([-+*])([0-9a-j])")


class Modular(Task):
    """A chain of definitions modulo 10, and a question for the value of one variable.

    `cb*a.a3+9.ba-7?c` defines c = b·a, a = 3+9 and b = a-7, in any order, and asks for c. The response works out every
    variable by name, operands and value, in any order in which each is known when it is used, then gives the answer:
    `a3+92b2-75c5*20=0`. The operands of sums and products may be swapped. The policy must look up definitions by name
    and values in its own text, and recognise which definition is ready.

    Args:
        variables: number of definitions, 2 to 10; the answer need not use all.
    """

    def __init__(self, variables: int = 5) -> None:
        check_size("variables", variables, 2, len(_NAMES))
        self.variables = variables
        self.name = "modular" if variables == 5 else f"modular-{variables}"
        self.vocabulary = CharacterVocabulary("0123456789+-*=.?" + _NAMES[:variables])
        self.max_prompt = 5 * variables + 1
        self.max_response = 5 * variables + 3 + 4

    def draw(self, rng: random.Random) -> Example:
        """Draw definitions, each of which may use two earlier ones, and ask for the last."""
        names = rng.sample(_NAMES[: self.variables], self.variables)
        lines = []
        for place, name in enumerate(names):
            known = names[:place]
            first = rng.choice(known) if known and rng.random() < 0.7 else str(rng.randrange(10))
            second = rng.choice(known) if known and rng.random() < 0.4 else str(rng.randrange(10))
            operands = (first, second) if rng.random() < 0.5 else (second, first)
            lines.append(name + operands[0] + rng.choice("+-*") + operands[1])
        key = ".".join(sorted(lines)) + "?" + names[-1]
        rng.shuffle(lines)
        prompt = ".".join(lines) + "?" + names[-1]
        values = _solve(prompt)
        return Example(prompt=prompt, answer=str(values[names[-1]]), problem=key)

    def demonstration(self, example: Example, rng: random.Random) -> list[tuple[str, bool]]:
        """The definitions, each drawn from those that are ready, then the answer."""
        lines = _lines(example.prompt)
        values = _solve(example.prompt)
        todo, done, text = set(lines), set[str](), ""
        while todo:
            ready = sorted(name for name in todo if all(x.isdigit() or x in done for x in lines[name][::2]))
            name = rng.choice(ready)
            first, sign, second = lines[name]
            if sign != "-" and rng.random() < 0.5:
                first, second = second, first
            text += f"{name}{values.get(first, first)}{sign}{values.get(second, second)}{values[name]}"
            todo.discard(name)
            done.add(name)
        return [(f"{text}={example.answer}", True)]


def _lines(prompt: str) -> dict[str, tuple[str, str, str]]:
    found = [_EQUATION.fullmatch(line) for line in prompt.partition("?")[0].split(".")]
    return {m[1]: (m[2], m[3], m[4]) for m in found if m is not None}


def _solve(prompt: str) -> dict[str, int]:
    lines = _lines(prompt)
    values: dict[str, int] = {}

    def value(operand: str) -> int:
        if operand.isdigit():
            return int(operand)
        if operand not in values:
            first, sign, second = lines[operand]
            one, other = value(first), value(second)
            values[operand] = (one + other if sign == "+" else one - other if sign == "-" else one * other) % 10
        return values[operand]

    for name in lines:
        value(name)
    return values
