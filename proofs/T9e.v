(** T9e, a detached top-k reward (docs/theory/t9e.md).

      E_p[A(h_n) s_n | h_n] = 0 for an advantage A that depends on the history alone. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence T1.
Open Scope R_scope.

(** * Statements *)

(** Given the history, an advantage that does not depend on the sampled token has a mean of zero, for every student. *)
Definition T9e_given_the_history : Prop :=
  forall (n : nat) (p : R -> nat -> R) (θ A : R),
  student n p θ ->
  E n (p θ) (fun a => A * score p θ a) = 0.

(** So it has over all histories h, whatever their probabilities P_h and the advantages A_h. *)
Definition T9e_over_histories : Prop :=
  forall (H n : nat) (P A : nat -> R) (p : nat -> R -> nat -> R) (θ : R),
  (forall h, (h < H)%nat -> student n (p h) θ) ->
  E H P (fun h => E n (p h θ) (fun a => A h * score (p h) θ a)) = 0.

(** The truncated divergence Σ_{b ∈ S} p_b f(u_b) of a set S of tokens, such as the k likeliest. *)
Definition top_k (n : nat) (S : nat -> bool) (f : R -> R) (q p : nat -> R) : R :=
  Σ b < n, indicator (S b) * (p b * f (u q p b)).

(** If S is chosen before the token is sampled, the divergence is such an advantage: as a detached penalty, or with its
    sign changed as a reward, it has the expected gradient zero. *)
Definition T9e_top_k : Prop :=
  forall (n : nat) (S : nat -> bool) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  student n p θ ->
  E n (p θ) (fun a => top_k n S f q (p θ) * score p θ a) = 0.

(** If the sampled token is put into the set, what remains of the reward is the sampled token's own term outside S:
    - E_p[1[a ∉ S] p_a f(u_a) s_a]. *)
Definition T9e_sampled_token_in_the_set : Prop :=
  forall (n : nat) (S : nat -> bool) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  student n p θ ->
  E n (p θ) (fun a => - top_k n (fun b => orb (S b) (Nat.eqb b a)) f q (p θ) * score p θ a)
  = - E n (p θ) (fun a => indicator (negb (S a)) * (p θ a * f (u q (p θ) a)) * score p θ a).

(** A false twin: nothing remains of the reward if the sampled token is put into the set. *)
Definition T9e_twin_sampled_token_in_the_set : Prop :=
  forall (n : nat) (S : nat -> bool) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  distribution n q -> student n p θ ->
  E n (p θ) (fun a => - top_k n (fun b => orb (S b) (Nat.eqb b a)) f q (p θ) * score p θ a) = 0.

(** * Proofs *)

Theorem T9e_given_the_history_holds : T9e_given_the_history.
Proof. intros n p θ A is_student. rewrite E_scale, (score_mean n) by assumption. ring. Qed.

Theorem T9e_over_histories_holds : T9e_over_histories.
Proof.
  intros H n P A p θ students. apply sum_zero. intros h lt.
  rewrite T9e_given_the_history_holds by auto. ring.
Qed.

Theorem T9e_top_k_holds : T9e_top_k.
Proof. intros n S f q p θ is_student. now apply T9e_given_the_history_holds. Qed.

Lemma one_more_token n S f q p a :
  (a < n)%nat ->
  top_k n (fun b => orb (S b) (Nat.eqb b a)) f q p = top_k n S f q p + indicator (negb (S a)) * (p a * f (u q p a)).
Proof.
  intros lt. unfold top_k.
  rewrite <- (sum_single n (fun b => indicator (negb (S b)) * (p b * f (u q p b))) a lt), <- sum_plus.
  apply sum_ext. intros b _. unfold indicator. destruct (S b), (Nat.eqb b a); simpl; ring.
Qed.

Theorem T9e_sampled_token_in_the_set_holds : T9e_sampled_token_in_the_set.
Proof.
  intros n S f q p θ is_student.
  rewrite (E_ext n _ _ (fun a => - (top_k n S f q (p θ) * score p θ a)
             - indicator (negb (S a)) * (p θ a * f (u q (p θ) a)) * score p θ a)).
  - rewrite E_minus, E_opp, T9e_top_k_holds by assumption. ring.
  - intros a lt. rewrite one_more_token by assumption. ring.
Qed.

(** Of two equally likely tokens the first is in the set; only the other one changes the reward when it is sampled. *)
Theorem T9e_twin_sampled_token_in_the_set_is_false : ~ T9e_twin_sampled_token_in_the_set.
Proof.
  intros twin.
  assert (false := twin 2%nat (fun b => Nat.eqb b 0) chi2 quarter _ _ quarter_distribution
                     (softmax_student 2 even 0 ltac:(lia))).
  revert false. rewrite softmax_of_its_logit.
  unfold E, top_k, u. simpl. rewrite !softmax_score by lia. unfold indicator, chi2, quarter. simpl.
  rewrite !even_half. lra.
Qed.
