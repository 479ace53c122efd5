(** T3, the gauge (docs/theory/t3.md).

      D_{f + c(u-1)} = D_f;   w_{f + c(u-1)} = w_f + c;   g_{sg}[f + c(u-1)] = g_{sg}[f] - c ∇ KL(q‖p). *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence T1 T2.
Open Scope R_scope.

(** * Statements *)

(** A change of gauge: f(u) + c (u - 1). *)
Definition gauge (f : R -> R) (c : R) (x : R) : R := f x + c * (x - 1).

(** The value of the divergence does not depend on the gauge: D_{f + c(u-1)} = D_f. *)
Definition T3_value : Prop :=
  forall (n : nat) (f : R -> R) (c : R) (q p : nat -> R),
  distribution n p ->
  (Σ a < n, q a) = 1 ->
  D n (gauge f c) q p = D n f q p.

(** The weight gains a constant: w_{f + c(u-1)} = w_f + c. *)
Definition T3_weight : Prop :=
  forall (f : R -> R) (c x : R),
  ex_derive f x ->
  w (gauge f c) x = w f x + c.

(** So the exact direction, - E_p[w s], does not depend on the gauge. *)
Definition T3_exact_direction : Prop :=
  forall (n : nat) (f : R -> R) (c : R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  differentiable_above_zero f ->
  positive n q ->
  student n p θ ->
  E n (p θ) (fun a => w (gauge f c) (u q (p θ) a) * score p θ a)
  = E n (p θ) (fun a => w f (u q (p θ) a) * score p θ a).

(** The direction of stop-gradient does: g_{sg}[f + c(u-1)] = g_{sg}[f] - c ∇ KL(q‖p), for every f, differentiable or
    not. *)
Definition T3_stop_gradient_direction : Prop :=
  forall (n : nat) (f : R -> R) (c : R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  (forall a, (a < n)%nat -> 0 <= q a) ->
  student n p θ ->
  exists g_KL : R,
    is_derive (fun t : R => KL n q (p t)) θ g_KL /\
    g_sg n (gauge f c) q p θ = g_sg n f q p θ - c * g_KL.

(** What the gauge adds to the reward of a later token is a martingale difference. For every finite set of histories h
    with probabilities P_h, and every g_h that is known at h, such as the score of an earlier token, the mean of
    g_h c (u - 1) is zero. *)
Definition T3_martingale : Prop :=
  forall (H n : nat) (P g : nat -> R) (c : R) (q p : nat -> nat -> R),
  (forall h, (h < H)%nat -> distribution n (p h) /\ (Σ a < n, q h a) = 1) ->
  E H P (fun h => E n (p h) (fun a => g h * (c * (u (q h) (p h) a - 1)))) = 0.

(** A false twin: the value is kept by f(u) + c u as well. *)
Definition T3_twin_without_minus_one : Prop :=
  forall (n : nat) (f : R -> R) (c : R) (q p : nat -> R),
  distribution n p -> distribution n q ->
  D n (fun x => f x + c * x) q p = D n f q p.

(** A false twin: stop-gradient moves by + c times the gradient of the forward KL. *)
Definition T3_twin_sign_flipped : Prop :=
  forall (n : nat) (f : R -> R) (c : R) (q z : nat -> R) (a : nat),
  distribution n q -> (a < n)%nat ->
  g_sg n (gauge f c) q (softmax_of_logit n z a) (z a)
  = g_sg n f q (softmax_of_logit n z a) (z a)
    + c * Derive (fun t => KL n q (softmax_of_logit n z a t)) (z a).

(** * Proofs *)

(** p u = q, token by token. *)
Lemma ratio_times_student q p a : 0 < p a -> p a * u q p a = q a.
Proof. intros positive_a. unfold u. field. lra. Qed.

Lemma ratio_mean n q p : distribution n p -> (Σ a < n, q a) = 1 -> E n p (fun a => u q p a - 1) = 0.
Proof.
  intros [positive_p one_p] one_q. rewrite E_minus, E_const, one_p.
  unfold E. rewrite (sum_ext n _ (fun a => q a)); [rewrite one_q; ring |].
  intros a lt. apply ratio_times_student. auto.
Qed.

Theorem T3_value_holds : T3_value.
Proof.
  intros n f c q p is_p one_q. unfold D, gauge.
  rewrite E_plus, E_scale, ratio_mean by assumption. ring.
Qed.

Theorem T3_weight_holds : T3_weight.
Proof.
  intros f c x derive_f. unfold w.
  assert (slope : is_derive (gauge f c) x (Derive f x + c)).
  { unfold gauge. eapply derive_value.
    - apply derive_plus; [now apply Derive_correct |].
      apply derive_scale, derive_minus; [apply derive_id | apply derive_const].
    - simpl. change (Derive (fun y : R => f y) x) with (Derive f x). ring. }
  rewrite (derivative _ _ _ slope). unfold gauge. ring.
Qed.

Theorem T3_exact_direction_holds : T3_exact_direction.
Proof.
  intros n f c q p θ derive_f teacher is_student.
  rewrite <- (baseline n p θ (fun a => w (gauge f c) (u q (p θ) a)) c) by assumption.
  apply E_ext. intros a lt. rewrite T3_weight_holds; [ring |].
  apply derive_f, Rdiv_lt_0_compat; [now apply teacher | now apply is_student].
Qed.

(** ∇ KL(q‖p) = - E_q[s]. *)
Lemma forward_KL_derive n q p θ :
  (forall a, (a < n)%nat -> 0 <= q a) -> student n p θ ->
  is_derive (fun t : R => KL n q (p t)) θ (- E n q (score p θ)).
Proof.
  intros teacher is_student. unfold KL, E. rewrite <- sum_opp.
  apply (sum_derive n (fun t a => q a * log (q a / p t a))). intros a lt.
  assert (positive_a : 0 < p θ a) by now apply is_student.
  destruct (Rle_lt_or_eq_dec _ _ (teacher a lt)) as [some | <-].
  - eapply derive_value.
    + apply derive_scale, (derive_comp log (fun t => q a / p t a)).
      * apply log_derive. now apply Rdiv_lt_0_compat.
      * apply (derive_div (fun _ => q a)); [apply derive_const | now apply (probability_derive n) | lra].
    + simpl. field. lra.
  - apply (derive_ext (fun _ => 0)); [intros; ring |].
    eapply derive_value; [apply derive_const | ring].
Qed.

Theorem T3_stop_gradient_direction_holds : T3_stop_gradient_direction.
Proof.
  intros n f c q p θ teacher is_student.
  exists (- E n q (score p θ)). split; [now apply forward_KL_derive |].
  unfold g_sg, gauge.
  rewrite (E_ext n _ _ (fun a => f (u q (p θ) a) * score p θ a
                                 + c * ((u q (p θ) a - 1) * score p θ a))) by (intros; ring).
  rewrite E_plus, E_scale, (baseline n) by assumption.
  replace (E n (p θ) (fun a => u q (p θ) a * score p θ a)) with (E n q (score p θ)); [ring |].
  apply sum_ext. intros a lt. rewrite <- Rmult_assoc, ratio_times_student by now apply is_student. reflexivity.
Qed.

Theorem T3_martingale_holds : T3_martingale.
Proof.
  intros H n P g c q p rows. unfold E at 1. apply sum_zero. intros h lt.
  destruct (rows h lt) as [is_p one_q].
  rewrite (E_ext n _ _ (fun a => g h * c * (u (q h) (p h) a - 1))) by (intros; ring).
  rewrite E_scale, ratio_mean by assumption. ring.
Qed.

(** * Proofs: the twins *)

Theorem T3_twin_without_minus_one_is_false : ~ T3_twin_without_minus_one.
Proof.
  intros twin.
  assert (false := twin 2%nat (fun _ => 0) 1 quarter (softmax 2 even)
    (softmax_distribution 2 even ltac:(lia)) quarter_distribution).
  revert false. unfold D, E, u. simpl. rewrite !even_half. unfold quarter. simpl. lra.
Qed.

Theorem T3_twin_sign_flipped_is_false : ~ T3_twin_sign_flipped.
Proof.
  intros twin.
  assert (false := twin 2%nat (fun _ => 0) 1 quarter even 0%nat quarter_distribution ltac:(lia)).
  assert (nonneg : forall b, (b < 2)%nat -> 0 <= quarter b) by (intros; apply Rlt_le; now apply quarter_distribution).
  assert (slope := forward_KL_derive 2 quarter _ _ nonneg (softmax_student 2 even 0 ltac:(lia))).
  rewrite (derivative _ _ _ slope) in false. revert false.
  unfold g_sg, gauge, E, u. simpl. rewrite !softmax_score, !softmax_of_its_logit by lia.
  unfold indicator. simpl. rewrite !even_half. unfold quarter. simpl. lra.
Qed.
