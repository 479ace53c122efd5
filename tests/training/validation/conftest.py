"""Prefixes that the student met, and those of another sampler."""

from __future__ import annotations

import pytest

from opdtheory.training.validation import Prefixes
from tests.training.validation.pairs import PROMPTS, STALE, STUDENT, TEACHER


@pytest.fixture(scope="module")
def prefixes() -> Prefixes:
    return Prefixes.sample(STUDENT, TEACHER, PROMPTS, max_new_tokens=6, seed=1)


@pytest.fixture(scope="module")
def off_policy() -> Prefixes:
    return Prefixes.sample(STUDENT, TEACHER, PROMPTS, max_new_tokens=6, behavior=STALE, seed=1)
