"""Guesses at a cure: most are wrong."""

from __future__ import annotations

from opdtheory.auditing.fixes.candidates import candidates
from tests.auditing.fixes.losses import FAITHFUL, facts_of, zoo


def test_most_guesses_are_refused() -> None:
    """A search that took what it guessed would offer far more than the one cure."""
    facts = facts_of(zoo("opd", "jsd"), "jsd", eos=0)
    verdicts = [(candidate.kind, facts.trial(candidate.loss)[0]) for candidate in candidates(facts)]
    assert [kind for kind, verdict in verdicts if verdict in FAITHFUL] == ["slope", "padding, slope"]
    assert len(verdicts) > 6
