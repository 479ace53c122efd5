"""A task: generated problems with an exact verifier and demonstrations."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.training.models.samples import Environment, Samples
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["Example", "Split", "Task", "split_of"]

Split = Literal["train", "test"]

_TEST_SHARE = 0.125
_TRIES = 2000  # draws in a row without a new problem, after which a split counts as used up


@dataclass(frozen=True)
class Example:
    """A problem.

    Attributes:
        prompt: its text.
        answer: what a right response ends with.
        problem: the same for two prompts that pose one problem, `2+3` and `3+2`; it decides the split.
    """

    prompt: str
    answer: str
    problem: str


class Task(ABC):
    """A family of problems.

    Attributes:
        name: as on the command line.
        vocabulary: spells every prompt, demonstration and reply.
        max_prompt: longest prompt, in tokens.
        max_response: length at which a response is cut off; every demonstration is shorter.
        environment: answers the policy's calls, or None.
    """

    name: str
    vocabulary: Vocabulary
    max_prompt: int
    max_response: int
    environment: Environment | None = None

    @abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """A problem of either split."""

    @abstractmethod
    def demonstration(self, example: Example, rng: random.Random) -> list[tuple[str, bool]]:
        """A right response in pieces, each with whether the policy writes it (else the environment).

        The end-of-sequence token, which the policy writes last, is left out.
        """

    @abstractmethod
    def verify(self, example: Example, response: str) -> bool:
        """Whether a response that ended by itself is right."""

    def examples(self, split: Split, count: int, seed: int) -> list[Example]:
        """Different problems of one split; the same arguments give the same ones.

        A problem belongs to the split that a hash of it names, so the splits share none, whatever the seeds.

        Raises:
            InvalidArgumentError: an unknown split or a negative count.
            BudgetExceededError: the split has hardly as many problems.
        """
        if split not in ("train", "test"):
            raise InvalidArgumentError("split", f"is {split!r}; 'train' or 'test' is needed")
        if count < 0:
            raise InvalidArgumentError("count", f"is {count}; it cannot be negative")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Example] = {}
        tries = 0
        while len(found) < count and tries < _TRIES:
            example = self.draw(rng)
            tries += 1
            if example.problem not in found and split_of(self.name, example.problem) == split:
                found[example.problem] = example
                tries = 0
        if len(found) < count:
            raise BudgetExceededError(
                f"a {split} set of the task {self.name}", count, len(found), "ask for fewer examples"
            )
        return list(found.values())

    def prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """The prompts as tokens."""
        return [self.vocabulary.encode(example.prompt) for example in examples]

    def correct(
        self, examples: Sequence[Example], samples: Samples, vocabulary: Vocabulary | None = None
    ) -> list[bool]:
        """Whether each response is right; one that was cut off is not.

        Args:
            examples: the problems.
            samples: a response to each.
            vocabulary: of the model that responded, if it has not the task's.
        """
        texts, ended = samples.texts(vocabulary or self.vocabulary), samples.ended.tolist()
        return [done and self.verify(example, text) for example, text, done in zip(examples, texts, ended, strict=True)]


def split_of(task: str, problem: str) -> Split:
    """The split that a problem belongs to: one in eight is kept for the test."""
    digest = hashlib.sha256(f"{task}:{problem}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64 else "train"
