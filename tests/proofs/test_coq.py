"""Asking Coq: what it answers is read strictly, and what is not proved is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from coq import AXIOMS, Coq, Missing, axioms, compile_all, questions, read_axioms, recheck
from sources import Problem, Source

from tests.proofs.theory import T1, theory

ANSWER = """OPD.T1.T1_x_holds : OPD.T1.T1_x
     : OPD.T1.T1_x
begin T1_x
Axioms:
ClassicalDedekindReals.sig_not_dec : forall P : Prop, {~ ~ P} + {~ P}
FunctionalExtensionality.functional_extensionality_dep
  : forall (A : Type) (B : A -> Type) (f g : forall x : A, B x),
    (forall x : A, f x = g x) -> f = g
end T1_x
begin T1_twin_y
Closed under the global context
end T1_twin_y
"""


def read(answer: str) -> dict[str, tuple[str, ...]]:
    return read_axioms("proofs/T1.v", answer, ["T1_x", "T1_twin_y"])


def test_axioms_are_read_by_statement() -> None:
    assert read(ANSWER) == {"T1_x": (AXIOMS[0], AXIOMS[2]), "T1_twin_y": ()}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Axioms:\n", "Axioms:\nClassical_Prop.classic : forall P : Prop, P \\/ ~ P\n", "Classical_Prop.classic"),
        ("Axioms:\n", "Axioms:\nOPD.T1.helper\n  : False\n", "OPD.T1.helper"),
        ("Axioms:\n", "Axioms:\nf is assumed to be guarded.\n", "f is assumed to be guarded"),
        ("ClassicalDedekindReals.sig_not_dec", "Mine.ClassicalDedekindReals.sig_not_dec", "Mine"),
        ("Axioms:\n", "Section Variables:\n", "cannot be read"),
        ("Closed under the global context", "Axioms:", "cannot be read"),
        ("Closed under the global context\n", "", "cannot be read"),
        ("begin T1_twin_y", "begin T1_twin_z", "names no axioms of T1_twin_y"),
        ("end T1_x\n", "", "names no axioms of T1_x"),
    ],
)
def test_any_other_answer_is_refused(old: str, new: str, said: str) -> None:
    assert old in ANSWER
    with pytest.raises(Problem, match=said):
        read(ANSWER.replace(old, new))


def test_every_statement_is_asked_about_by_its_full_name() -> None:
    asked = questions(theory()["T1"])
    assert "Check (OPD.T1.T1_larger_holds : OPD.T1.T1_larger)." in asked
    assert "Check (OPD.T1.T1_twin_smaller_is_false : ~ OPD.T1.T1_twin_smaller)." in asked
    assert "Import" not in asked and asked.count("Print Assumptions") == 2


def answered(coq: Coq, folder: Path, **files: str) -> dict[str, tuple[str, ...]]:
    """The axioms of the tiny theory, without the check of its words that comes before."""
    sources: dict[str, Source] = theory(**files)
    compile_all(coq, folder, sources, 2, lambda *_: None)
    return axioms(coq, folder, sources["T1"])


def test_coq_names_the_axioms(coq: Coq, tmp_path: Path) -> None:
    found = answered(coq, tmp_path)
    assert set(found) == {"T1_larger", "T1_twin_smaller"}
    assert set(found["T1_larger"]) <= set(AXIOMS) and found["T1_larger"]


def test_coq_finds_what_is_not_proved(coq: Coq, tmp_path: Path) -> None:
    admitted = T1.replace("Proof. unfold twice. lra. Qed.", "Admitted.")
    with pytest.raises(Problem, match=r"T1_larger rests on more than Coq's real numbers: .*double"):
        answered(coq, tmp_path, T1=admitted)


def test_coq_finds_the_law_of_excluded_middle(coq: Coq, tmp_path: Path) -> None:
    classical = T1.replace("Reals Lra.", "Reals Lra Classical.").replace(
        "intros x positive.", "intros x positive. destruct (classic (x = 1)) as [_ | _]; [| shelve]."
    )
    classical = classical.replace(
        "rewrite double. lra. Qed.", "rewrite double. lra. Unshelve. rewrite double. lra. Qed."
    )
    with pytest.raises(Problem, match=r"T1_larger rests on more .*: .*classic"):
        answered(coq, tmp_path, T1=classical)


def test_a_notation_of_the_file_does_not_change_what_is_asked(coq: Coq, tmp_path: Path) -> None:
    cheating = T1.replace("Theorem T1_twin", 'Notation "~ P" := (P -> True) : type_scope.\n\nTheorem T1_twin')
    cheating = cheating.replace(
        "Proof. intros twin. specialize (twin 1). rewrite double in twin. lra. Qed.", "Proof. exact (fun _ => I). Qed."
    )
    with pytest.raises(Problem, match="not that of its statement"):
        answered(coq, tmp_path, T1=cheating)


def test_a_file_that_is_refused_is_named_with_coqs_words(coq: Coq, tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r'coqc refuses proofs/T1\.v:\nFile "proofs/T1\.v", line 22.*\n(.*\n)*Error'):
        answered(coq, tmp_path, T1=T1.replace("rewrite double. lra. Qed.", "lra. Qed."))


UNSAFE = "Unset Guard Checking.\nFixpoint absurd (n : nat) : False := absurd n.\n"


@pytest.mark.parametrize(("text", "found"), [("Definition one := 1.\n", ""), (UNSAFE, "unsafe (co)fixpoints: OPD.A")])
def test_the_second_checker_finds_a_check_that_was_switched_off(
    coq: Coq, tmp_path: Path, text: str, found: str
) -> None:
    compile_all(coq, tmp_path, {"A": Source("A", text)}, 1, lambda *_: None)
    if found:
        with pytest.raises(Problem, match="coqchk refuses") as raised:
            recheck(coq, tmp_path, ["A"])
        assert found in " ".join(str(raised.value).split())
    else:
        recheck(coq, tmp_path, ["A"])


def test_the_second_checker_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no coqchk beside .*coqc"):
        recheck(Coq(str(tmp_path / "coqc"), "8.16.1"), tmp_path, ["A"])
