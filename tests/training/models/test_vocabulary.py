"""A vocabulary of characters."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.vocabulary import CharacterVocabulary
from tests.training.models.small import VOCABULARY


def test_a_vocabulary_spells_what_it_has():
    assert VOCABULARY.decode(VOCABULARY.encode("dcba[]")) == "dcba[]"
    assert VOCABULARY.containing("]x") == {6}
    assert VOCABULARY.fingerprint == CharacterVocabulary("abcd[]").fingerprint
    assert VOCABULARY.fingerprint != CharacterVocabulary("abcd][").fingerprint
    with pytest.raises(InvalidArgumentError, match="text: must be in the vocabulary .* got 'x' in 'ax'"):
        VOCABULARY.encode("ax")
    with pytest.raises(InvalidArgumentError, match=r"tokens: must be in \[0, 7\), got 7"):
        VOCABULARY.decode([7])
    with pytest.raises(InvalidArgumentError, match="must be different, got 'a' more than once"):
        CharacterVocabulary("aba")
    with pytest.raises(InvalidArgumentError, match="at least one character"):
        CharacterVocabulary("")
