"""What a theorem is made of: comparisons, checks, false twins, and the pages and tables that report them."""

from __future__ import annotations

import json
import math
import sys
import time
import types
from collections.abc import Callable
from fractions import Fraction

import pytest
import sympy
import torch
from torch import Tensor

from opdtheory import cli, theorems
from opdtheory.divergences import Divergence, divergence
from opdtheory.exact import TabularPolicy, random_pair
from opdtheory.theorems import Identity, IdentityResult, Step, Theorem, TheoremResult
from opdtheory.theorems.instances import cases
from opdtheory.theorems.theorem import ALGEBRA, Comparison, close, furthest, holds, overlap, same
from opdtheory.verification.markdown import index, page
from opdtheory.verification.page import render_page
from opdtheory.verification.verify import Verification, verify

# One comparison.


@pytest.mark.parametrize(
    ("where", "label"),
    [
        ((), ""),
        (("chi2", "gamma 0.6"), "chi2, gamma 0.6"),
        ((divergence("chi2"), 3, Fraction(1, 2)), "chi2, 3, 1/2"),
        ((random_pair(3, 2, eos=0), "sequence"), "3 tokens x 2 steps, eos 0, sequence"),
        ((TabularPolicy.random(4, 1, seed=0),), "4 tokens x 1 steps"),
        (((Fraction(5, 7), Fraction(1, 7), Fraction(1, 7)),), "(5/7, 1/7, 1/7)"),
        ((sympy.Symbol("u") ** 2, [sympy.Rational(1, 3), 1]), "u**2, (1/3, 1)"),
        ((torch.zeros(2), "b"), "b"),
    ],
)
def test_labels_name_what_has_a_short_name(where, label):
    assert Comparison(0.0, where).label == label


def test_errors_are_relative_and_nan_and_other_shapes_are_infinitely_far():
    one = torch.tensor([1.0, 10.0], dtype=torch.float64)
    assert close(one + 1e-3, one, "a").error == pytest.approx(1e-4)
    assert close([one, one / 100 + 1e-3], [one, one / 100]).error == pytest.approx(1e-3)
    assert close(one * math.nan, one).error == math.inf
    assert close(one, one * math.nan).error == math.inf
    # No broadcasting: a column equal to each entry of a row is another tensor.
    assert close(torch.ones(2, 1), torch.ones(1, 2)).error == close(one[:1], one[0]).error == math.inf
    assert same([1, Fraction(1, 2)], (1, Fraction(1, 2))).error == 0.0
    assert same([1], [1, 2]).error == same(1, 2).error == holds(False).error == math.inf
    assert holds(True).error == 0.0


def test_intervals_refute_only_what_they_part():
    from mpmath import iv

    one = iv.mpf([1, 2])
    overlapping, disjoint = overlap(one, iv.mpf([1.5, 3])), overlap(one, iv.mpf([2.5, 3]))
    # The joint width, relative to the right one's lower end.
    assert overlapping.error == pytest.approx(2.5 / 1.5)
    assert disjoint.error == math.inf


def test_the_search_for_the_largest_error_stops_at_infinity():
    seen = []

    def errors(*values: float):
        for value in values:
            seen.append(value)
            yield Comparison(value)

    assert furthest(errors()) == 0.0
    assert furthest(errors(0.1, 0.3, 0.2)) == 0.3
    seen.clear()
    assert furthest(errors(0.1, math.inf, 0.2)) == math.inf
    assert seen == [0.1, math.inf]
    far = close(torch.tensor(math.nan), torch.tensor(0.0))
    assert furthest(iter([Comparison(1.0), far])) == math.inf


# Checks and theorems.


def test_a_check_says_how_long_it_took():
    start = time.perf_counter()
    one = theorems.theorems("T1b")[0].identities[0].run()
    assert 0.0 < one.seconds < time.perf_counter() - start


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
        yield same(value, 1, "the number", value)

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


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("symbolic", 0.0), ("exact", 0.0), ("rigorous", 0.0), ("numeric", ALGEBRA)]
)
def test_the_tolerance_follows_from_how_a_check_decides(kind, tolerance):
    assert Identity("one", "x = 1", lambda value: iter(()), 1, {}, kind).tolerance == tolerance
    assert Identity("one", "x = 1", lambda value: iter(()), 1, {}, kind, 1e-40).tolerance == 1e-40


def test_a_failure_names_the_worst_case_everywhere():
    wrong = result(error=1e-3, worst="chi2, <3 tokens>")
    assert wrong.failure == "worst: chi2, <3 tokens>"
    # The largest rounding error is no failure, and neither is a case without a label.
    assert result(worst="chi2").failure == "" == result(error=1.0).failure
    assert result(worst="chi2", twins={"kept": 0.0}).failure == ""
    failed, fine = (
        Verification([TheoremResult("T0", "one", [], [check], 0.0)], [], 0.0) for check in (wrong, result(worst="chi2"))
    )
    assert "worst: chi2, &lt;3 tokens&gt;" in render_page(failed)
    assert "worst:" not in render_page(fine)
    assert json.loads(json.dumps(failed.to_dict()))["theorems"][0]["identities"][0]["worst"] == "chi2, <3 tokens>"


class Heavier(Divergence):
    """A divergence whose numeric weight is wrong by a thousandth."""

    def weight(self, log_u: Tensor) -> Tensor:
        return 1.001 * super().weight(log_u)


def test_a_wrong_weight_fails_t1_and_is_named(monkeypatch):
    wrong = [divergence("reverse_kl"), Heavier(**vars(divergence("chi2"))), divergence("jsd")]
    monkeypatch.setattr(cases, "catalogue", lambda: wrong)
    (identity,) = (one for one in theorems.theorems("T1")[0].identities if one.name == "OPD+ identity")
    found = identity.run("T1")
    assert not found.holds and not found.passed and found.survivors == []
    assert found.error == pytest.approx(1e-3, rel=1e-6)
    assert found.worst == "chi2, 2 tokens x 4 steps, eos 1"
    assert found.cases == 3 * len(cases.pairs())
    monkeypatch.undo()
    monkeypatch.setattr(cases, "catalogue", lambda: [divergence("reverse_kl"), divergence("chi2"), divergence("jsd")])
    assert identity.run("T1").passed


# A theorem of one's own: one module, and its line in the table of contents.


def throw_away(formula: Callable[[Fraction], Fraction], twin: Callable[[Fraction], Fraction]) -> types.ModuleType:
    """A module that states T99, the sum of the two probabilities of a coin."""

    def check(total):
        for p in (Fraction(1, 3), Fraction(1, 2)):
            yield same(p + (1 - p), total(p), f"p {p}")

    def statements() -> list[Theorem]:
        step = Step("p + (1 - p) = 1", "arithmetic", lambda: True)
        one = Identity("the sum", "p + q = 1", check, formula, {"another": twin}, "exact")
        return [Theorem("T99", "a coin", "p + q = 1", ("0 < p < 1",), "here", "Toss it.", (step,), (one,))]

    module = types.ModuleType("opdtheory.theorems.throw_away")
    module.theorems = statements
    return module


@pytest.fixture
def added(monkeypatch):
    """Adds a module to the table of contents for the length of the test."""

    def add(module: types.ModuleType) -> None:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(theorems, "_MODULES", (*contents, module.__name__.removeprefix("opdtheory.theorems.")))
        theorems._all.cache_clear()

    contents = theorems._MODULES
    yield add
    monkeypatch.undo()
    theorems._all.cache_clear()


def one_in(p: Fraction) -> Fraction:
    return Fraction(1)


def twice(p: Fraction) -> Fraction:
    return 2 * p


def test_a_new_theorem_needs_one_module_and_one_line(added, capsys):
    added(throw_away(one_in, twice))
    (one,) = theorems.theorems("T99")
    found = verify(["T99"])
    assert found.passed and found.twins_refuted == 1
    assert [(r.number, r.name) for r in found.theorems] == [("T99", "a coin")]
    written = page(one, found.theorems[0])
    assert written.startswith("# T99: a coin\n")
    assert "| the sum | $p + q = 1$ | exact, in fractions | 2 | 0 | 0 |" in written
    assert "| the sum | another | refuted outright |" in written
    assert "[T99](t99.md)" in index(theorems.theorems())
    assert "a coin" in render_page(found)
    assert cli.main(["verify", "T99", "--workers", "1", "--no-report"]) == 0
    assert "1 of 1 theorems hold" in capsys.readouterr().out


def test_its_wrong_twin_fails_and_says_where(added, capsys, monkeypatch):
    monkeypatch.setattr("opdtheory.commands.verify.console_of", lambda: None)
    added(throw_away(twice, one_in))
    (wrong,) = verify(["T99"]).identities
    # `2 p` is right at one half only.
    assert (wrong.error, wrong.worst, wrong.survivors) == (math.inf, "p 1/3", ["another"])
    assert cli.main(["verify", "T99", "--workers", "1", "--no-report"]) == 1
    out = capsys.readouterr().out
    assert "the sum (worst: p 1/3)" in out and "0 of 1 theorems hold" in out
    added(throw_away(one_in, one_in))
    assert verify(["T99"]).identities[0].survivors == ["another"]
    assert cli.main(["verify", "T99", "--workers", "1", "--no-report"]) == 1
    assert "worst" not in capsys.readouterr().out


def test_a_number_is_a_letter_t_a_number_and_maybe_a_letter(added):
    module = throw_away(one_in, twice)
    module.theorems = lambda: [Theorem("99", "a coin", "1", ("none",), "here", "nothing")]
    added(module)
    with pytest.raises(ValueError, match="must be like T4 or T4b, got '99'"):
        theorems.theorems()


def test_results_are_plain_numbers():
    assert json.dumps(vars(result()))


def test_a_page_tells_everything():
    one = Theorem(
        "T0",
        "one",
        r"x = 1;\quad \text{a; \quad b}",
        ("first", "second"),
        "here.",
        "Nothing.",
        meaning="Nothing is lost.",
        derivation=(Step("1 = 1", "arithmetic.", lambda: True), Step("2 = 2", "more", lambda: True, in_words=True)),
    )
    checks = [result(twins={"sign": math.inf, "term": 0.5}), result(error=0.0, kind="exact", tolerance=0.0)]
    steps = [step.run() for step in one.derivation]
    written = page(one, TheoremResult("T0", "one", steps, checks, 0.0))
    assert (
        written
        == """# T0: one

Nothing is lost.

## Statement

$$
x = 1
$$

$$
\\text{a; \\quad b}
$$

**Hypotheses.** First; second.

## Derivation

Sympy decides each step, except where it says otherwise.

**Step 1.** Arithmetic.

$$
1 = 1
$$

**Step 2.** More. *(Proved in words; the machine checks a lemma or an instance.)*

$$
2 = 2
$$

## What to do

Nothing.

## What was checked

2 checks ran, on 6 cases in all. Beside each stand wrong forms of its claim, 3 in all, which the same check must find \
wrong by far more than rounding.

<details markdown="1">
<summary>The checks</summary>

| check | claim | how | cases | largest error | tolerance |
|---|---|---|---|---|---|
| name | $x = x$ | numeric, float64 | 3 | 1.0e-15 | 1.0e-12 |
| name | $x = x$ | exact, in fractions | 3 | 0 | 0 |

</details>

<details markdown="1">
<summary>The false twins</summary>

| check | false twin | off by |
|---|---|---|
| name | sign | refuted outright |
| name | term | 5.0e-01 |
| name | sign flipped | 5.0e-01 |

</details>

**Source.** Here.
"""
    )
    assert index((one,)) == (
        "# The theorems\n\n| | theorem | what to do |\n|---|---|---|\n| [T0](t0.md) | one | Nothing. |\n"
    )
