"""Every theorem derives itself, holds to its tolerance, refutes its false twins, and is what its page says."""

from __future__ import annotations

import functools
import json
import math
import re
import time
from pathlib import Path

import pytest

from opdtheory.theorems import Identity, IdentityResult, Step, StepResult, Theorem, TheoremResult, theorems
from opdtheory.theorems.theorem import overlap
from opdtheory.theorems.theorem import same as same_number
from opdtheory.verification.markdown import index, page, slug
from tests.laws.test_docs import same

PAGES = Path(__file__).resolve().parents[2] / "docs" / "theory"
NUMBERS = [theorem.number for theorem in theorems()]


@functools.cache
def theorem(number: str) -> Theorem:
    return theorems()[NUMBERS.index(number)]


# `make verify` runs them all; here they would be run once more.
@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_theorem_holds_and_its_twins_are_refuted(number):
    result = theorem(number).run()
    assert [step.says for step in result.steps if not step.holds] == []
    for identity in result.identities:
        assert identity.cases > 0, identity.name
        assert identity.error <= identity.tolerance, f"{identity.name}: off by {identity.error:.3g}"
        assert identity.twins, f"{identity.name} needs a false twin"
        assert identity.survivors == [], identity.name
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
        kept.append(" | ".join(cells))
    return kept


def test_a_check_says_how_long_it_took():
    start = time.perf_counter()
    one = theorem("T1b").identities[0].run()
    assert 0.0 < one.seconds < time.perf_counter() - start


def test_every_theorem_has_a_derivation_checks_and_words():
    assert {re.match(r"T\d+", number)[0] for number in NUMBERS} == {f"T{n}" for n in range(1, 13)}
    assert len(set(NUMBERS)) == len(NUMBERS)
    for number in NUMBERS:
        one = theorem(number)
        assert one.derivation and one.identities, number
        assert one.hypotheses and one.source and one.advice and one.statement, number
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


def result(**changes) -> IdentityResult:
    fields = {"error": 1e-15, "tolerance": 1e-12, "cases": 3, "twins": {"sign flipped": 0.5}, "seconds": 0.0}
    return IdentityResult(theorem="T0", name="name", statement="x = x", **{**fields, **changes})


def test_what_passes_and_what_does_not():
    assert result().passed
    for changes in (
        {"error": 1e-11},
        {"error": math.nan},
        {"error": math.inf},
        {"cases": 0},
        {"twins": {}},
        {"twins": {"sign flipped": 0.5, "term dropped": 1e-15}},
        {"twins": {"sign flipped": 1e-10}},
    ):
        assert not result(**changes).passed, changes
    assert result(twins={"kept": 1e-13, "refuted": 1.0}).survivors == ["kept"]
    assert result(twins={"blew up": math.inf}).passed


def test_a_false_step_or_check_fails_its_theorem():
    def check(value):
        yield same_number(value, 1, "the number", value)

    def statement(holds: bool, value: int) -> Theorem:
        step = Step("1 = 1", "arithmetic", lambda: holds)
        one = Identity("one", "x = 1", check, value, {"two": 2}, "exact", 0.0)
        return Theorem("T0", "one", "x = 1", ("none",), "here", "nothing", (step,), (one,))

    found = statement(True, 1).run()
    assert found.passed
    assert 0 <= found.seconds < 60 and 0 <= found.identities[0].seconds < 60
    assert not statement(False, 1).run().passed
    wrong = statement(True, 3).run()
    assert not wrong.passed
    assert (wrong.identities[0].theorem, wrong.identities[0].worst) == ("T0", "the number, 3")


def test_intervals_refute_only_what_they_part():
    from mpmath import iv

    one = iv.mpf([1, 2])
    overlapping, disjoint = overlap(one, iv.mpf([1.5, 3])), overlap(one, iv.mpf([2.5, 3]))
    # The joint width, relative to the right one's lower end.
    assert overlapping.error == pytest.approx(2.5 / 1.5)
    assert disjoint.error == math.inf


def test_results_are_plain_numbers():
    assert json.dumps(vars(result()))


def test_a_page_tells_everything():
    one = Theorem(
        "T0",
        "one",
        "x = 1",
        ("first", "second"),
        "here.",
        "Nothing.",
        (Step("1 = 1", "arithmetic.", lambda: True), Step("2 = 2", "more", lambda: True, in_words=True)),
    )
    checks = [result(twins={"sign": math.inf, "term": 0.5}), result(error=0.0, kind="exact", tolerance=0.0)]
    steps = [step.run() for step in one.derivation]
    assert page(one, TheoremResult("T0", "one", steps, checks, 0.0)).splitlines() == [
        "# T0: one",
        "",
        "$$",
        "x = 1",
        "$$",
        "",
        "**Hypotheses.** first; second.",
        "",
        "**Source.** here.",
        "",
        "**What to do.** Nothing.",
        "",
        "## Derivation",
        "",
        "Each step is decided by sympy unless it says otherwise.",
        "",
        "**1.** Arithmetic.",
        "",
        "$$",
        "1 = 1",
        "$$",
        "",
        "**2.** More. *(Proved in words; the machine checks a lemma or an instance.)*",
        "",
        "$$",
        "2 = 2",
        "$$",
        "",
        "## Checks",
        "",
        "| check | claim | how | cases | largest error | tolerance |",
        "|---|---|---|---|---|---|",
        "| name | $x = x$ | numeric, float64 | 3 | 1.0e-15 | 1.0e-12 |",
        "| name | $x = x$ | exact, in fractions | 3 | 0 | 0 |",
        "",
        "## False twins",
        "",
        "Wrong forms of the same claims; the same checks must find them wrong by far more than rounding.",
        "",
        "| check | false twin | off by |",
        "|---|---|---|",
        "| name | sign | refuted outright |",
        "| name | term | 5.0e-01 |",
        "| name | sign flipped | 5.0e-01 |",
    ]
    assert page(one, TheoremResult("T0", "one", steps, checks, 0.0)).endswith(" |\n")
    assert index((one,)) == (
        "# The theorems\n\n| | theorem | what to do |\n|---|---|---|\n| [T0](t0.md) | one | Nothing. |\n"
    )
