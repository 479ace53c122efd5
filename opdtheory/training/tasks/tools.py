"""Expressions worked out with calls to a calculator."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from opdtheory.training.models.vocabulary import CharacterVocabulary
from opdtheory.training.tasks.task import Example, Task, check_size

__all__ = ["Calculator", "Tools"]

_CALL = re.compile(r"\[(-?\d{1,6})([-+*])(-?\d{1,6})\]\Z")
_TOKEN = re.compile(r"\d+|[-+*]")


@dataclass(frozen=True)
class Calculator:
    """Answers `[12*7]` with `84;`, and anything else between brackets with `?;`.

    >>> Calculator().reply("5+12*7=[12*7]"), Calculator().reply("5=[*]"), Calculator().reply("5=]")
    ('84;', '?;', None)
    """

    closers: str = "]"

    def reply(self, text: str) -> str | None:
        """The result of the call that `text` ends with."""
        start = text.rfind("[")
        if not text.endswith("]") or "]" in text[start:-1] or start < 0:
            return None
        call = _CALL.match(text, start)
        return "?;" if call is None else f"{_apply(int(call[1]), call[2], int(call[3]))};"


class Tools(Task):
    """An expression of sums, differences and products, one calculator call for each operation.

    `12+7*35=` is answered by `[7*35]`, to which the environment adds `245;`, `[245+12]`, to which it adds `257;`,
    and `=257`. Products come first, then sums in any order that keeps the value. Every operation can be written in
    two ways, such as `a-b` and `-b+a`.

    Args:
        terms: number of terms of an expression, 2 to 4.
    """

    def __init__(self, terms: int = 3) -> None:
        check_size("terms", terms, 2, 4)
        self.terms = terms
        self.name = "tools" if terms == 3 else f"tools-{terms}"
        self.vocabulary = CharacterVocabulary("0123456789+-*=[];?")
        self.environment = Calculator()
        self.max_prompt = 3 * terms
        self.max_response = 22 * (terms - 1) + 8

    def draw(self, rng: random.Random) -> Example:
        """Draw numbers below 100, with at most one product."""
        numbers = [rng.randrange(1, 100) for _ in range(self.terms)]
        signs = [rng.choice("+-") for _ in range(self.terms - 1)]
        product = rng.randrange(2 * len(signs))  # in one expression of two
        if product < len(signs):
            signs[product] = "*"
        text = str(numbers[0]) + "".join(sign + str(number) for sign, number in zip(signs, numbers[1:], strict=True))
        return Example(prompt=text + "=", answer=str(_value(text)), problem=text)

    def demonstration(self, example: Example, rng: random.Random) -> list[tuple[str, bool]]:
        """One call for each operation, in an order drawn from those that keep the value."""
        numbers, signs = _parse(example.prompt[:-1])
        pieces: list[tuple[str, bool]] = []
        while signs:
            place = rng.choice(_reducible(signs))
            left, sign, right = numbers[place], signs.pop(place), numbers.pop(place + 1)
            numbers[place] = _apply(left, sign, right)
            if rng.random() < 0.5:
                left, sign, right = (-right, "+", left) if sign == "-" else (right, sign, left)
            pieces += [(f"[{left}{sign}{right}]", True), (f"{numbers[place]};", False)]
        return [*pieces, (f"={example.answer}", True)]


def _parse(text: str) -> tuple[list[int], list[str]]:
    parts = _TOKEN.findall(text)
    return [int(part) for part in parts[::2]], parts[1::2]


def _reducible(signs: list[str]) -> list[int]:
    """Where an operation can be worked out now: products first, then the leftmost, or any of sums after sums."""
    products = [place for place, sign in enumerate(signs) if sign == "*"]
    return products or [place for place in range(len(signs)) if "-" not in signs[: place + 1] or place == 0]


def _value(text: str) -> int:
    numbers, signs = _parse(text)
    while signs:
        place = signs.index("*") if "*" in signs else 0
        numbers[place : place + 2] = [_apply(numbers[place], signs.pop(place), numbers[place + 1])]
    return numbers[0]


def _apply(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right
