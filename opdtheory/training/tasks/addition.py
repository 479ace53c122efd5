"""Addition by columns, written out in random order."""

from __future__ import annotations

import random

from opdtheory.training.models.vocabulary import CharacterVocabulary
from opdtheory.training.tasks.task import Example, Task, check_size

__all__ = ["Addition"]

_COLUMNS = "abcdefgh"


class Addition(Task):
    """The sum of two numbers, with every column's carry.

    `3847+5921=` is answered by its columns in any order, then the sum. A column is its letter, `a` for units, its
    two digits in either order, the incoming carry, and their sum in two digits: `b4207` means 4 + 2 + 0 = 07 in the
    tens. Since the order is free, the teacher's distribution is broad where there is a choice and sharp where
    arithmetic decides. A column may come before the one whose carry it needs.

    Args:
        digits: number of digits of both numbers, 2 to 8.
    """

    def __init__(self, digits: int = 4) -> None:
        check_size("digits", digits, 2, len(_COLUMNS))
        self.digits = digits
        self.name = "arithmetic" if digits == 4 else f"arithmetic-{digits}"
        self.vocabulary = CharacterVocabulary("0123456789+=" + _COLUMNS[:digits])
        self.max_prompt = 2 * digits + 2
        self.max_response = 6 * digits + 1 + digits + 1 + 4

    def draw(self, rng: random.Random) -> Example:
        """Draw two numbers; leading zeros are allowed."""
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
