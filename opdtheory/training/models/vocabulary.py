"""Vocabularies: the abstract one, and one of characters."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property

from opdtheory.errors import InvalidArgumentError

__all__ = ["CharacterVocabulary", "Vocabulary"]


class Vocabulary(ABC):
    """Tokens and their text.

    Attributes:
        size: number of tokens V; ids lie in `[0, V)`.
        bos: the token that may open a sequence.
        eos: the token that ends a response.
        pad: the token at positions that a mask marks as padding; the mask decides, not the id.
        fingerprint: equal for two vocabularies exactly if every id means the same text in both.
    """

    size: int
    bos: int
    eos: int
    pad: int

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of every token and of the special ids."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            InvalidArgumentError: no token spells some part of the text.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids, without special tokens."""

    @abstractmethod
    def containing(self, characters: str) -> frozenset[int]:
        """The tokens whose text contains any of the given characters."""


class CharacterVocabulary(Vocabulary):
    """One token per character, and token 0, which opens, ends and pads sequences.

    >>> vocabulary = CharacterVocabulary("0123456789+=")
    >>> vocabulary.encode("1+2="), vocabulary.decode([2, 11, 3, 12, 0]), vocabulary.size
    ([2, 11, 3, 12], '1+2=', 13)
    """

    def __init__(self, characters: str) -> None:
        if not isinstance(characters, str) or not characters:
            raise InvalidArgumentError("characters", f"must be at least one character, got {characters!r}")
        repeated = sorted({c for c in characters if characters.count(c) > 1})
        if repeated:
            raise InvalidArgumentError(
                "characters", f"must be different, got {''.join(repeated)!r} more than once in {characters!r}"
            )
        self.characters = characters
        self.size = len(characters) + 1
        self.bos = self.eos = self.pad = 0
        self._ids = {character: number for number, character in enumerate(characters, start=1)}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the characters in their order."""
        return "characters:" + hashlib.sha256(self.characters.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The id of each character."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise InvalidArgumentError(
                "text", f"must be in the vocabulary {self.characters!r}, got {error.args[0]!r} in {text!r}"
            ) from None

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters of some ids, without token 0."""
        numbers: Sequence[int] = list(tokens)
        bad = next((number for number in numbers if not 0 <= number < self.size), None)
        if bad is not None:
            raise InvalidArgumentError("tokens", f"must be in [0, {self.size}), got {bad}")
        return "".join(self.characters[number - 1] for number in numbers if number)

    def containing(self, characters: str) -> frozenset[int]:
        """The ids of the given characters that the vocabulary has."""
        return frozenset(self._ids[character] for character in characters if character in self._ids)

    def __repr__(self) -> str:
        return f"CharacterVocabulary({self.characters!r})"
