"""What is read in a file of proofs, what is refused in one, and the digest of a theorem."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import Problem, Source, affected, closure, digest, ordered, problems, read

from tests.proofs.theory import BASE, T1, theory

PROOFS = Path(__file__).resolve().parents[2] / "proofs"


def code(text: str) -> str:
    return Source("T1", text).code


def test_comments_and_strings_are_blank() -> None:
    assert code("a (* b (* c *) d *) e") == "a" + " " * 19 + "e"
    assert code('a "(* b" c') == "a" + " " * 8 + "c"
    # A string within a comment hides the end of the comment, and "" within a string does not end it.
    assert code('a (* "*)" *) b').split() == ["a", "b"]
    assert code('a "b "" (* c" d').split() == ["a", "d"]
    assert code("a (* b\n c *)\nd").count("\n") == 2


@pytest.mark.parametrize("text", ["a (* b (* c *)", 'a "b', "a *) b", '(* a "b *)'])
def test_what_does_not_end_is_named_with_its_line(text: str) -> None:
    with pytest.raises(Problem, match=r"proofs/T1\.v:2: a (comment|string)"):
        code(f"x.\n{text}")


def test_statements_have_their_words_and_their_text() -> None:
    source = theory()["T1"]
    larger, smaller = source.statements
    assert (larger.name, larger.words, larger.is_twin) == ("T1_larger", "Twice a positive number is larger.", False)
    assert larger.text == "Definition T1_larger : Prop := forall x, 0 < x -> x < twice x."
    assert (smaller.words, smaller.is_twin, smaller.theorem) == ("it is smaller.", True, "T1_twin_smaller_is_false")
    assert source.title == "the tiny theorem" and source.requires == ("Base",)
    assert [name for name, _ in theory()["Base"].definitions] == ["twice"]


def test_a_name_and_a_number_end_no_sentence() -> None:
    source = Source("T1", "Check Nat.add. (* a. *) Check (1.5)%R.")
    assert [sentence.code for sentence in source.sentences] == ["Check Nat.add.", "Check (1.5)%R."]


@pytest.mark.parametrize("after", [". x < 2x.", "; and more.", ": x < 2x."])
def test_a_title_may_be_followed_by_more(after: str) -> None:
    source = Source("T1", T1.replace(". x < 2x.", after))
    assert source.title == "the tiny theorem" and list(source.problems()) == []


def test_what_is_left_out_ends_the_comment_at_the_start() -> None:
    assert Source("T1", T1).left_out == ""
    source = Source("T1", T1.replace(". x < 2x. *)", ". x < 2x.\n\n    Not here: the case\n    x < 0. *)"))
    assert source.left_out == "the case x < 0" and source.title == "the tiny theorem" and not list(source.problems())


def test_records_and_fixpoints_are_definitions() -> None:
    text = (
        "Record pair : Set := { left : nat }.\nFixpoint zero (n : nat) : nat := 0.\nLemma no : True.\nProof. easy. Qed."
    )
    assert [name for name, _ in Source("Base", text).definitions] == ["pair", "zero"]


def test_definitions_are_those_that_a_statement_may_rest_on() -> None:
    before = T1.replace("(** * Statements *)", "(** Half. *)\nDefinition half (x : R) : R := x / 2.")
    source = Source("T1", before.replace("Lemma double", "Definition late := 1.\n\nLemma double"))
    ((name, sentence),) = source.definitions
    assert name == "half"
    assert source.original(sentence) == "(** Half. *)\nDefinition half (x : R) : R := x / 2."


@pytest.mark.parametrize(
    "word",
    [
        *("Admitted.", "admit.", "give_up.", "Axiom a : False.", "Axioms a b : False.", "Parameter a : False."),
        *("Conjecture a : False.", "Variable a : False.", "Hypothesis a : False.", "Hypotheses a b : False."),
        *("Context (a : False).", "Unset Guard Checking.", "#[bypass_check(guard)] Fixpoint f := f."),
        *("Unset Universe Checking.", "Declare Module M : T.", "Local Axiom a : False.", "Load other."),
    ],
)
def test_what_proves_nothing_is_refused_with_its_line(word: str) -> None:
    found = problems(theory(Base=BASE + word))
    assert len(found) == 1 and found[0].startswith("proofs/Base.v:8: ")
    assert problems(theory(Base=BASE + f'(* {word} *) Definition said := "{word}".')) == []


def test_words_that_only_contain_a_refused_one_are_accepted() -> None:
    assert problems(theory(Base=BASE + "Lemma admitted_axiom : True.\nProof. exact I. Qed.\n(** The context. *)")) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("(** Twice a positive number is\n    larger. *)", "", "T1.v:10: T1_larger needs a comment in words"),
        ("(** Twice a positive number is\n    larger. *)", "(* Not for readers. *)", "T1_larger needs a comment"),
        ("A false twin: it", "It", "T1_twin_smaller: a twin, and nothing else, starts with 'A false twin:'"),
        ("(** Twice a", "(** A false twin: twice a", "T1_larger: a twin, and nothing else"),
        ("T1_larger_holds : T1_larger.", "T1_larger_holds : True.", "needs its theorem, `Theorem T1_larger_holds"),
        ("Theorem T1_larger_holds", "Lemma T1_larger_holds", "T1_larger needs its theorem"),
        (": ~ T1_twin", ": T1_twin", "`Theorem T1_twin_smaller_is_false : ~ T1_twin_smaller.`"),
        ("T1_larger : Prop", "T1_larger (y : R) : Prop", "there is no statement"),
        ("T1_larger : Prop", "T1_larger (y : R) : Prop", "T1_larger must be a statement"),
        ("Definition T1_twin_smaller", "Definition twin_smaller", "there is no false twin"),
        ("Definition T1_twin_smaller", "Definition twin_smaller", "T1_twin_smaller_is_false is the theorem of no"),
        ("(** T1, ", "(** T2, ", "T1.v:1: a theorem's file must start with"),
        ("docs/theory/t1.md", "docs/theory/t2.md", "T1.v:1: a theorem's file must start with"),
        ("From OPD Require Import Base", "Require Import OPD.Base", "by `From OPD Require`"),
    ],
)
def test_a_theorem_that_is_not_whole_is_refused(old: str, new: str, said: str) -> None:
    assert old in T1
    found = problems(theory(T1=T1.replace(old, new)))
    assert any(said in each for each in found), found


def test_files_are_ordered_by_what_they_require() -> None:
    above = T1.replace("T1", "T2").replace("t1.md", "t2.md").replace("Import Base", "Import T1")
    sources = theory(T2=above, Other=BASE)
    assert problems(sources) == []
    found = ordered(sources)
    assert found.index("Base") < found.index("T1") < found.index("T2")
    assert closure(sources, "T2") == {"T2", "T1", "Base"} and affected(sources, "Base") == ["Base", "T1", "T2"]
    with pytest.raises(Problem, match=r"proofs/T1\.v:\d+: there is no proofs/Base\.v"):
        ordered({"T1": sources["T1"]})
    with pytest.raises(Problem, match="require each other: .*Base"):
        ordered(theory(Base=BASE + "From OPD Require T1."))


def test_a_digest_is_that_of_all_that_a_theorem_requires() -> None:
    sources = theory(Other=BASE)
    same = digest(sources, "T1")
    assert len(same) == 64 and same == digest(dict(reversed(sources.items())), "T1")
    assert same == digest(theory(Other=BASE + " "), "T1")
    for changed in (theory(T1=T1 + " "), theory(Base=BASE + " "), theory(T1=T1.replace("x < 2x", "x<2x"))):
        assert digest(changed, "T1") != same
    # Text may not move from one file to another.
    assert digest(theory(Base=BASE[:-1], T1="\n" + T1), "T1") != same


def test_the_proofs_of_the_repository_are_whole() -> None:
    sources = read(PROOFS)
    assert problems(sources) == [] and "T1" in sources
    assert [name for name in sources if sources[name].is_theorem] == list(sources)[-sum(map(theorem, sources)) :]


def theorem(name: str) -> bool:
    return Source(name, "").is_theorem
