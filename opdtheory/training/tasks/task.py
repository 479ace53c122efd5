"""Tasks: generated problems with an exact verifier and demonstrations."""

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

__all__ = ["Example", "Split", "Task", "check_size", "split_of"]

Split = Literal["train", "test"]

_TEST_SHARE = 0.125
_TRIES = 2000  # draws in a row without a new problem after which a split counts as exhausted


@dataclass(frozen=True)
class Example:
    """A problem.

    Attributes:
        prompt: text of the prompt.
        answer: what a right response ends with.
        problem: the same for prompts that pose the same problem, such as `2+3` and `3+2`; it decides the split.
    """

    prompt: str
    answer: str
    problem: str


class Task(ABC):
    """A family of problems.

    Attributes:
        name: name of the task, as on the command line.
        vocabulary: vocabulary of every prompt, demonstration and reply.
        max_prompt: longest prompt, in tokens.
        max_response: length at which a response is cut off; every demonstration is shorter.
        environment: answers the policy's calls, if it is not None.
    """

    name: str
    vocabulary: Vocabulary
    max_prompt: int
    max_response: int
    environment: Environment | None = None

    @abstractmethod
    def draw(self, rng: random.Random) -> Example:
        """Draw a problem of either split."""

    @abstractmethod
    def demonstration(self, example: Example, rng: random.Random) -> list[tuple[str, bool]]:
        """A right response in pieces, each with whether the policy, not the environment, writes it.

        The end-of-sequence token, which the policy writes last, is left out.
        """

    def spelled(
        self, example: Example, rng: random.Random, vocabulary: Vocabulary | None = None
    ) -> tuple[list[int], list[bool]]:
        """A demonstration as tokens, the end-of-sequence token included, each with whether the policy writes it.

        Args:
            example: the problem.
            rng: draws the demonstration.
            vocabulary: vocabulary of the tokens; by default the task's.
        """
        vocabulary = vocabulary or self.vocabulary
        pieces = [(vocabulary.encode(text), own) for text, own in self.demonstration(example, rng)]
        tokens = [token for ids, _ in pieces for token in ids]
        return [*tokens, vocabulary.eos], [*(own for ids, own in pieces for _ in ids), True]

    def verify(self, example: Example, response: str) -> bool:
        """Whether a response that ended by itself is right: by default, whether the answer follows its equals sign."""
        _, equals, answer = response.partition("=")
        return bool(equals) and answer == example.answer

    def examples(self, split: Split, count: int, seed: int) -> list[Example]:
        """Different problems of one split; the same arguments give the same problems.

        A hash of the problem decides its split, so the splits are disjoint for all seeds.

        Raises:
            InvalidArgumentError: the split is unknown or the count is negative.
            BudgetExceededError: the split seems to have fewer problems.
        """
        if split not in ("train", "test"):
            raise InvalidArgumentError("split", f"must be 'train' or 'test', got {split!r}")
        if count < 0:
            raise InvalidArgumentError("count", f"must be at least 0, got {count}")
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
        """Whether each response is right; a response that was cut off is wrong.

        Args:
            examples: the problems.
            samples: a response to each.
            vocabulary: vocabulary of the model that responded; by default the task's.
        """
        texts, ended = samples.texts(vocabulary or self.vocabulary), samples.ended.tolist()
        return [done and self.verify(example, text) for example, text, done in zip(examples, texts, ended, strict=True)]


def split_of(task: str, problem: str) -> Split:
    """The split of a problem: one in eight is in the test split."""
    digest = hashlib.sha256(f"{task}:{problem}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64 else "train"


def check_size(argument: str, value: object, low: int, high: int) -> None:
    """Raise unless the size of a task is an integer in its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(argument, f"must be an integer in [{low}, {high}], got {value!r}")
