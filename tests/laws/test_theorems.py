"""Every theorem derives itself, holds to its tolerance, refutes its false twins, and agrees with its page."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path

import pytest

from opdtheory.theorems import Identity, IdentityResult, StepResult, Theorem, TheoremResult, theorems
from opdtheory.theorems.theorem import Cases
from opdtheory.verification.markdown import index, page, slug
from tests.laws.test_docs import same

PAGES = Path(__file__).resolve().parents[2] / "docs" / "theory"
NUMBERS = [theorem.number for theorem in theorems()]


@functools.cache
def theorem(number: str) -> Theorem:
    return theorems()[NUMBERS.index(number)]


def watched(identity: Identity, labels: list[str]) -> Identity:
    """The identity, which notes the labels of the cases of its own formula."""

    def check(formula: object) -> Cases:
        for case in identity.check(formula):
            if formula is identity.formula:
                labels.append(case.label)
            yield case

    return dataclasses.replace(identity, check=check)


# `make verify` runs them all; here they would be run once more.
@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_theorem_holds_and_its_twins_are_refuted(number):
    labels: dict[str, list[str]] = {identity.name: [] for identity in theorem(number).identities}
    identities = tuple(watched(identity, labels[identity.name]) for identity in theorem(number).identities)
    result = dataclasses.replace(theorem(number), identities=identities).run()
    assert [step.says for step in result.steps if not step.holds] == []
    for identity in result.identities:
        assert identity.cases > 0, identity.name
        assert identity.error <= identity.tolerance, f"{identity.name}: off by {identity.error:.3g}, {identity.failure}"
        assert identity.twins, f"{identity.name} needs a false twin"
        assert identity.survivors == [], identity.name
        # So that a failure names one case.
        found = labels[identity.name]
        assert len(found) == identity.cases and "" not in found, identity.name
        assert len(set(found)) == identity.cases, f"{identity.name}: {max(found, key=found.count)}"
    assert result.passed
    # The page in docs/theory says what was found; regenerate it with docs/generate_theory.py.
    written = (PAGES / f"{slug(theorem(number))}.md").read_text(encoding="utf-8")
    assert same(written, page(theorem(number), result)), f"python docs/generate_theory.py {number}"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_page_has_the_words_of_the_theorem(number):
    one = theorem(number)
    # All but the numbers, for which it would have to be run.
    steps = [StepResult(step.says, step.why, True, step.in_words) for step in one.derivation]
    identities = [
        IdentityResult(number, i.name, i.statement, 0.0, i.tolerance, 1, dict.fromkeys(i.twins, math.inf), 0.0, i.kind)
        for i in one.identities
    ]
    words = page(one, TheoremResult(number, one.name, steps, identities, 0.0))
    written = (PAGES / f"{slug(one)}.md").read_text(encoding="utf-8")
    assert without_numbers(written) == without_numbers(words)
    assert without_numbers(written.replace("Derivation", "Proof")) != without_numbers(words)


def without_numbers(text: str) -> list[str]:
    """The lines, without what was measured: cases and largest error of a check, distance of a twin."""
    kept = []
    for line in text.splitlines():
        cells = line.split(" | ")
        if line.startswith("| ") and len(cells) == 6:
            cells[3:5] = []
        elif line.startswith("| ") and len(cells) == 3:
            del cells[2]
        counted = re.fullmatch(r"(.* ran, on )[\d,]+( cases in all\. .*)", line)
        kept.append(" | ".join(cells) if counted is None else counted[1] + counted[2])
    return kept


def test_every_theorem_has_a_derivation_checks_and_words():
    families = {int(re.match(r"T(\d+)", number)[1]) for number in NUMBERS}
    assert len(families) >= 12 and families == set(range(1, len(families) + 1))
    assert len(set(NUMBERS)) == len(NUMBERS)
    for number in NUMBERS:
        one = theorem(number)
        assert one.derivation and one.identities, number
        assert one.hypotheses and one.source and one.advice and one.statement and one.meaning, number
        assert len({identity.name for identity in one.identities}) == len(one.identities), number


def test_index_lists_every_theorem():
    assert (PAGES / "index.md").read_text(encoding="utf-8") == index(theorems())
    assert sorted(path.stem for path in PAGES.glob("t*.md")) == sorted(slug(one) for one in theorems())


def test_numeric_tolerances_are_those_of_rounding():
    from tests.tolerances import ALGEBRA

    for one in theorems():
        for identity in one.identities:
            if identity.kind == "exact":
                assert identity.tolerance == 0.0, identity.name
            assert identity.tolerance <= ALGEBRA, f"{one.number} {identity.name}"
