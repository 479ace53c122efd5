"""Markov chains over more sequences than anybody enumerates."""

from __future__ import annotations

from opdtheory.exact import MarkovPolicy


def chains(vocab_size: int = 32, horizon: int = 16, eos: int | None = 0) -> tuple[MarkovPolicy, MarkovPolicy]:
    """A student and a teacher over 32**16 sequences."""
    student = MarkovPolicy.random(vocab_size, horizon, eos=eos, seed=0)
    noise = MarkovPolicy.random(vocab_size, horizon, eos=eos, seed=1)
    return student, MarkovPolicy(
        student.initial + 0.5 * noise.initial, student.transition + 0.5 * noise.transition, horizon, eos=eos
    )
