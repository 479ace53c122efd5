"""Addition by columns, written out in random order."""

from __future__ import annotations

import random

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.vocabulary import CharacterVocabulary
from opdtheory.training.tasks.task import Example, Task

__all__ = ["Addition"]

_COLUMNS = "abcdefgh"


class Addition(Task):
    """The sum of two numbers, with every column's carry.

    `3847+5921=` is answered by its columns in any order, then the sum. A column is its letter, `a` for units, its
    two digits in either order, the carry that comes in, and their sum in two digits: `b4207` says 4 + 2 + 0 = 07
    in the tens. As the order is free, the teacher's distribution is broad where the choice is and sharp where arithmetic
    decides; a column may come before the one whose carry it needs.

    Args:
        digits: of both numbers, 2 to 8.
    """

    def __init__(self, digits: int = 4) -> None:
        if isinstance(digits, bool) or not isinstance(digits, int) or not 2 <= digits <= len(_COLUMNS):
            raise InvalidArgumentError("digits", f"is {digits!r}; an integer in [2, {len(_COLUMNS)}] is needed")
        self.digits = digits
        self.name = "arithmetic" if digits == 4 else f"arithmetic-{digits}"
        self.vocabulary = CharacterVocabulary("0123456789+=" + _COLUMNS[:digits])
        self.max_prompt = 2 * digits + 2
        self.max_response = 6 * digits + 1 + digits + 1 + 4

    def draw(self, rng: random.Random) -> Example:
        """Two numbers of as many digits, leading zeros allowed."""
        first, second = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
        low, high = sorted((first, second))
        return Example(
            prompt=f"{first:0{self.digits}d}+{second:0{self.digits}d}=",
            answer=f"{first + second:0{self.digits + 1}d}",
            problem=f"{low}+{high}",
        )

    def demonstration(self, example: Example, rng: random.Random) -> list[tuple[str, bool]]:
        """Columns in random order, each with its digits in random order, then the sum."""
        first, second = (number[::-1] for number in example.prompt[:-1].split("+"))
        columns, carry = [], 0
        for letter, one, other in zip(_COLUMNS, first, second, strict=False):
            total = int(one) + int(other) + carry
            pair = one + other if rng.random() < 0.5 else other + one
            columns.append(f"{letter}{pair}{carry}{total:02d}")
            carry = total // 10
        rng.shuffle(columns)
        return [("".join(columns) + "=" + example.answer, True)]

    def verify(self, example: Example, response: str) -> bool:
        """Whether the sum after the one equals sign is right, to the digit."""
        _, equals, answer = response.partition("=")
        return bool(equals) and answer == example.answer
