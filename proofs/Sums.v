(** Sums over the tokens 0, ..., n - 1 of a finite vocabulary. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
Open Scope R_scope.

(** [sum n g] is g 0 + ... + g (n - 1). *)
Fixpoint sum (n : nat) (g : nat -> R) : R :=
  match n with
  | O => 0
  | S m => sum m g + g m
  end.

Notation "'Σ' a < n , e" := (sum n (fun a => e))
  (at level 41, a name, n at level 35, e at level 41, format "'Σ'  a  <  n ,  e").

(** What is used of them. *)

Lemma sum_ext n g h : (forall a, (a < n)%nat -> g a = h a) -> sum n g = sum n h.
Proof.
  induction n as [| n IH]; intros same; simpl; [reflexivity |].
  rewrite IH by (intros; apply same; lia). rewrite same by lia. reflexivity.
Qed.

Lemma sum_plus n g h : (Σ a < n, (g a + h a)) = sum n g + sum n h.
Proof. induction n as [| n IH]; simpl; [| rewrite IH]; lra. Qed.

Lemma sum_minus n g h : (Σ a < n, (g a - h a)) = sum n g - sum n h.
Proof. induction n as [| n IH]; simpl; [| rewrite IH]; lra. Qed.

Lemma sum_opp n g : (Σ a < n, - g a) = - sum n g.
Proof. induction n as [| n IH]; simpl; [| rewrite IH]; lra. Qed.

Lemma sum_scale n c g : (Σ a < n, c * g a) = c * sum n g.
Proof. induction n as [| n IH]; simpl; [| rewrite IH]; lra. Qed.

Lemma sum_zero n g : (forall a, (a < n)%nat -> g a = 0) -> sum n g = 0.
Proof.
  induction n as [| n IH]; intros zero; simpl; [reflexivity |].
  rewrite IH by (intros; apply zero; lia). rewrite zero by lia. lra.
Qed.

Lemma sum_constant n c : (Σ a < n, c) = INR n * c.
Proof. induction n as [| n IH]; [simpl; lra |]. rewrite S_INR. simpl. rewrite IH. lra. Qed.

Lemma sum_le n g h : (forall a, (a < n)%nat -> g a <= h a) -> sum n g <= sum n h.
Proof.
  induction n as [| n IH]; intros le; simpl; [lra |].
  assert (sum n g <= sum n h) by (apply IH; intros; apply le; lia).
  assert (g n <= h n) by (apply le; lia). lra.
Qed.

Lemma sum_nonneg n g : (forall a, (a < n)%nat -> 0 <= g a) -> 0 <= sum n g.
Proof.
  intros nonneg. rewrite <- (sum_zero n (fun _ => 0)) by reflexivity. now apply sum_le.
Qed.

Lemma sum_positive n g : (0 < n)%nat -> (forall a, (a < n)%nat -> 0 < g a) -> 0 < sum n g.
Proof.
  destruct n as [| n]; [lia |]. intros _ positive. simpl.
  assert (0 <= sum n g) by (apply sum_nonneg; intros; apply Rlt_le, positive; lia).
  assert (0 < g n) by (apply positive; lia). lra.
Qed.

(** A sum of terms that are not negative is zero only if every term is. *)
Lemma sum_zero_terms n g :
  (forall a, (a < n)%nat -> 0 <= g a) -> sum n g = 0 -> forall a, (a < n)%nat -> g a = 0.
Proof.
  induction n as [| n IH]; intros nonneg zero a lt; [lia |]. simpl in zero.
  assert (0 <= sum n g) by (apply sum_nonneg; intros; apply nonneg; lia).
  assert (0 <= g n) by (apply nonneg; lia).
  destruct (Nat.eq_dec a n) as [-> | different]; [lra |].
  apply IH; [intros; apply nonneg; lia | lra | lia].
Qed.

(** One term may be taken out. *)
Lemma sum_split n g a :
  (a < n)%nat -> sum n g = g a + Σ b < n, (if Nat.eqb b a then 0 else g b).
Proof.
  induction n as [| n IH]; intros lt; [lia |]. simpl.
  destruct (Nat.eq_dec a n) as [-> | different].
  - rewrite Nat.eqb_refl.
    rewrite (sum_ext n (fun b => if Nat.eqb b n then 0 else g b) g); [lra |].
    intros b less. now rewrite (proj2 (Nat.eqb_neq b n)) by lia.
  - rewrite IH by lia. rewrite (proj2 (Nat.eqb_neq n a)) by lia. lra.
Qed.

Lemma sum_single n g a : (a < n)%nat -> (Σ b < n, (if Nat.eqb b a then g b else 0)) = g a.
Proof.
  intros lt. rewrite (sum_split n _ a lt), Nat.eqb_refl.
  rewrite sum_zero; [lra |]. intros b _. now destruct (Nat.eqb b a).
Qed.

(** The order of two sums may be changed. *)
Lemma sum_exchange n m g : (Σ a < n, Σ b < m, g a b) = Σ b < m, Σ a < n, g a b.
Proof.
  induction n as [| n IH]; simpl.
  - symmetry. now apply sum_zero.
  - now rewrite IH, sum_plus.
Qed.

(** A finite sum is differentiated term by term. *)
Lemma sum_derive n (g : R -> nat -> R) (dg : nat -> R) x :
  (forall a, (a < n)%nat -> is_derive (fun t : R => g t a) x (dg a)) ->
  is_derive (fun t : R => sum n (g t)) x (sum n dg).
Proof.
  induction n as [| n IH]; intros each; simpl.
  - apply (is_derive_const (V := R_NormedModule) 0).
  - apply (is_derive_plus (V := R_NormedModule) (fun t => sum n (g t)) (fun t => g t n)).
    + apply IH. intros. apply each. lia.
    + apply each. lia.
Qed.
