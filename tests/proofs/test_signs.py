"""Which signs are changed and to what, and that a change that does not matter is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from coq import Coq, compile_all
from signs import Outcome, changes, tried
from sources import Source

from tests.proofs.theory import T1, theory


def changed(body: str) -> list[str]:
    """The bodies of a definition after each change."""
    source = Source("Base", f"Definition d (x : R) : R := {body}.")
    return [change.text[len("Definition d (x : R) : R := ") : -1] for change in changes(source)]


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ("a + b - c", ["a - b - c", "a + b + c"]),
        ("- a * (- b)", [" a * (- b)", "- a * ( b)"]),
        ("if c then - a else f x - a", ["if c then  a else f x - a", "if c then - a else f x + a"]),
        ("a <= b -> b >= c", ["a >= b -> b >= c", "a <= b -> b <= c"]),
        ("a < b <-> b > a", ["a > b <-> b > a", "a < b <-> b < a"]),
        ("forall a, (a < n - 1)%nat -> p a <> 0", []),
        ("Σ a < n, Σ b < m, (g a + h b)", ["Σ a < n, Σ b < m, (g a - h b)"]),
        ("fun a => f a", []),
        ("0 < x <= 1 -> c", ["0 > x /\\ x <= 1 -> c", "0 < x /\\ x >= 1 -> c"]),
        ("(0 < x) = (x < 1)", ["(0 > x) = (x < 1)", "(0 < x) = (x > 1)"]),
        ("f x' - (a (* - *) + b)", ["f x' + (a (* - *) + b)", "f x' - (a (* - *) - b)"]),
        ("1 -1", ["1 +1"]),
    ],
)
def test_every_sign_is_changed_once(body: str, after: list[str]) -> None:
    found = changed(body)
    assert [" ".join(each.split()) for each in found] == [" ".join(each.split()) for each in after]


def test_statements_and_definitions_are_changed_and_twins_and_lemmas_are_not() -> None:
    sources = theory(T1=T1.replace("(** * Statements *)", "Definition half (x : R) : R := x - x / 2."))
    found = [(change.where, change.says) for source in sources.values() for change in changes(source)]
    assert found == [
        ("twice", "+ becomes -"),
        ("half", "- becomes +"),
        ("T1_larger", "< becomes >"),
        ("T1_larger", "< becomes >"),
    ]
    assert next(changes(sources["Base"])).label == (
        "proofs/Base.v:7: twice: + becomes - in `Definition twice (x : R) : R := x + x.`"
    )


def outcomes(coq: Coq, folder: Path, **files: str) -> list[Outcome]:
    sources = theory(**files)
    compile_all(coq, folder, sources, 2, lambda *_: None)
    some = [change for source in sources.values() for change in changes(source)]
    return tried(coq, folder, sources, dict.fromkeys(sources, 1.0), some, 2, lambda _: None)


def test_coq_refuses_every_change_of_a_sharp_statement(coq: Coq, tmp_path: Path) -> None:
    found = outcomes(coq, tmp_path)
    assert [(each.verdict, each.by, each.fails) for each in found] == [("refused", "T1", False)] * 3
    assert list((tmp_path / "signs").iterdir()) == []


def test_a_change_that_does_not_matter_is_found(coq: Coq, tmp_path: Path) -> None:
    blunt = T1.replace("x < twice x.", "Rabs (- x) = Rabs x.", 1)
    blunt = blunt.replace("rewrite double. lra.", "unfold Rabs. repeat destruct Rcase_abs; lra.", 1)
    found = {(each.change.where, each.change.says): each for each in outcomes(coq, tmp_path, T1=blunt)}
    assert found["T1_larger", "unary - is dropped"].verdict == "SURVIVES"
    assert found["T1_larger", "unary - is dropped"].fails
    # The hypothesis is not needed either.
    assert found["T1_larger", "< becomes >"].fails and not found["twice", "+ becomes -"].fails


def test_a_change_without_an_answer_is_not_refused(coq: Coq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signs._LEAST", 0.01)
    sources = theory()
    found = tried(coq, tmp_path, sources, dict.fromkeys(sources, 0.0), changes(sources["Base"]), 1, lambda _: None)
    assert [(each.verdict, each.fails) for each in found] == [("NO ANSWER", True)]


def test_a_change_that_is_no_coq_is_told_from_a_refused_proof(coq: Coq, tmp_path: Path) -> None:
    sources = theory(Base="Definition sign : unit + bool := inl tt.\n" + theory()["Base"].text)
    compile_all(coq, tmp_path, sources, 2, lambda *_: None)
    # A sum of types, of which there is no difference.
    body = theory(Base=sources["Base"].text.replace("unit + bool := inl tt", "Type := (unit + bool)%type"))
    (first, *_) = tried(
        coq, tmp_path, body, dict.fromkeys(body, 1.0), list(changes(body["Base"]))[:1], 1, lambda _: None
    )
    assert first.verdict == "no statement" and not first.fails
