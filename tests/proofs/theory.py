"""A tiny theory with one foundation and one theorem, which coqc checks in a second or two."""

from __future__ import annotations

from pathlib import Path

from sources import Source

BASE = """(** What is shared. *)

From Coq Require Import Reals.
Open Scope R_scope.

(** Twice a number. *)
Definition twice (x : R) : R := x + x.
"""

T1 = """(** T1, the tiny theorem (docs/theory/t1.md). x < 2x. *)

From Coq Require Import Reals Lra.
From OPD Require Import Base.
Open Scope R_scope.

(** * Statements *)

(** Twice a positive number is
    larger. *)
Definition T1_larger : Prop := forall x, 0 < x -> x < twice x.

(** A false twin: it is smaller. *)
Definition T1_twin_smaller : Prop := forall x, 0 < x -> twice x < x.

(** * Proofs *)

Lemma double x : twice x = 2 * x.
Proof. unfold twice. lra. Qed.

Theorem T1_larger_holds : T1_larger.
Proof. intros x positive. rewrite double. lra. Qed.

Theorem T1_twin_smaller_is_false : ~ T1_twin_smaller.
Proof. intros twin. specialize (twin 1). rewrite double in twin. lra. Qed.
"""


def theory(**files: str) -> dict[str, Source]:
    """The tiny theory as sources, with some files in place of its own or beside them."""
    return {name: Source(name, text) for name, text in {"Base": BASE, "T1": T1, **files}.items()}


def repository(root: Path, **files: str) -> Path:
    """The tiny theory as a repository."""
    for folder in ("proofs", "opdtheory/theorems"):
        (root / folder).mkdir(parents=True)
    for name, source in theory(**files).items():
        (root / "proofs" / f"{name}.v").write_text(source.text, encoding="utf-8")
    return root
