"""What a theorem's page says of its proof in Coq."""

from __future__ import annotations

import dataclasses

import pytest

from opdtheory.theorems import TheoremResult, theorems
from opdtheory.theorems.proofs import ProvedStatement, proof
from opdtheory.verification.markdown import axioms_in_words, index, machine_checked, page


def page_of(number: str) -> str:
    (theorem,) = theorems(number)
    return page(theorem, TheoremResult(number, theorem.name, [], [], 0.0))


def test_the_page_says_what_coq_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = proof("T1")
    assert found is not None
    part = page_of("T1").split("## Machine-checked\n")[1].split("\n## ")[0]
    assert found.coq in part and found.checked in part and found.digest[:12] in part
    assert "(../proofs.md#t1)" in part and "`sig_not_dec`" in part
    assert part.count("\n- ") == len(found.statements) + len(found.twins)
    assert r"p<sub>a</sub> (w(u<sub>a</sub>) - E<sub>p</sub>\[w(u)\])" in part
    # Words are no markup, whatever they are.
    hostile = ProvedStatement("T1_x", "<b>x</b> of [a](b) and $c$", "Definition", ())
    monkeypatch.setattr(
        "opdtheory.verification.markdown.proof", lambda _: dataclasses.replace(found, statements=(hostile,), twins=())
    )
    shown = page_of("T1")
    assert r"- &lt;b&gt;x&lt;/b&gt; of \[a\](b) and &#36;c&#36;." in shown and "The proofs use no axioms." in shown


def test_the_page_says_what_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    found = proof("T1")
    assert found is not None and found.left_out == "" and "Not among them" not in page_of("T1")
    partial = dataclasses.replace(found, left_out="the case u_a = 0")
    monkeypatch.setattr("opdtheory.verification.markdown.proof", lambda _: partial)
    assert "\n\nNot among them: the case u<sub>a</sub> = 0.\n\n" in page_of("T1")


def test_a_theorem_without_a_proof_says_nothing_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "[T1](t1.md#machine-checked)" in index(theorems()).splitlines()[-1]
    monkeypatch.setattr("opdtheory.verification.markdown.proof", lambda _: None)
    assert "achine-checked" not in page_of("T1") and "achine-checked" not in index(theorems())


def test_words_for_axioms_and_counts() -> None:
    assert axioms_in_words(("a", "b"), "<{}>").endswith("beyond those of Coq's real numbers: <a>, <b>.")
    assert machine_checked(1) == "1 theorem is machine-checked in Coq"
    assert machine_checked(9) == "9 theorems are machine-checked in Coq"
