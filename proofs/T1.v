(** T1, the OPD+ identity (docs/theory/t1.md).

      ∇_θ D_f(q‖p_θ) = - E_{p_θ}[w_f(u) s],   w_f(u) = u f'(u) - f(u),   u = q/p_θ,   s = ∇_θ log p_θ. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence.
Open Scope R_scope.

(** * Statements *)

(** For every differentiable f, every teacher q and every student p_θ: ∇_θ D_f(q‖p_θ) = - E_p[w_f(u) s]. The teacher
    may leave tokens out (q = 0); there u = 0, and f(0) is any number. *)
Definition T1_any_student : Prop :=
  forall (n : nat) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  differentiable_above_zero f ->
  (forall a, (a < n)%nat -> 0 <= q a) ->
  student n p θ ->
  is_derive (fun t : R => D n f q (p t)) θ
    (- E n (p θ) (fun a => w f (u q (p θ) a) * score p θ a)).

(** For softmax logits z, the derivative in the logit of token a is ∂D/∂z_a = - p_a (w(u_a) - E_p[w(u)]). *)
Definition T1_softmax : Prop :=
  forall (n : nat) (f : R -> R) (q z : nat -> R) (a : nat),
  differentiable_above_zero f ->
  (forall b, (b < n)%nat -> 0 <= q b) ->
  (a < n)%nat ->
  let p := softmax n z in
  is_derive (fun t : R => D n f q (softmax_of_logit n z a t)) (z a)
    (- p a * (w f (u q p a) - E n p (fun b => w f (u q p b)))).

(** A false twin: the sign of the weight flipped, ∇ D_f = + E_p[w_f(u) s]. *)
Definition T1_twin_sign_flipped : Prop :=
  forall (n : nat) (f : R -> R) (q z : nat -> R) (a : nat),
  differentiable_above_zero f -> distribution n q -> (a < n)%nat ->
  is_derive (fun t : R => D n f q (softmax_of_logit n z a t)) (z a)
    (E n (softmax n z) (fun b => w f (u q (softmax n z) b) * score (softmax_of_logit n z a) (z a) b)).

(** A false twin: the term u f' dropped, so that the weight is that of stop-gradient, - f(u). *)
Definition T1_twin_stop_gradient : Prop :=
  forall (n : nat) (f : R -> R) (q z : nat -> R) (a : nat),
  differentiable_above_zero f -> distribution n q -> (a < n)%nat ->
  is_derive (fun t : R => D n f q (softmax_of_logit n z a t)) (z a)
    (- E n (softmax n z) (fun b => - f (u q (softmax n z) b) * score (softmax_of_logit n z a) (z a) b)).

(** * Proofs *)

(** One token: d/dθ [p f(q/p)] = - p w_f(u) s. *)
Lemma one_token n f q p θ a :
  (0 < q a -> ex_derive f (u q (p θ) a)) -> 0 <= q a -> student n p θ -> (a < n)%nat ->
  is_derive (fun t : R => p t a * f (q a / p t a)) θ (p θ a * (- w f (u q (p θ) a) * score p θ a)).
Proof.
  intros derive_f teacher is_student lt.
  assert (derive_p := probability_derive n p θ a is_student lt).
  assert (positive_a : 0 < p θ a) by now apply is_student.
  unfold w, u. destruct (Rle_lt_or_eq_dec _ _ teacher) as [some | <-].
  - eapply derive_value.
    + apply derive_mult; [exact derive_p |].
      apply (derive_comp f (fun t => q a / p t a)).
      * now apply Derive_correct, derive_f.
      * apply (derive_div (fun _ => q a)); [apply derive_const | exact derive_p | lra].
    + simpl. field. lra.
  - (* The ratio is zero whatever the student. *)
    apply (derive_ext (fun t => p t a * f 0)); [intros t; unfold Rdiv; now rewrite Rmult_0_l |].
    eapply derive_value; [apply derive_mult; [exact derive_p | apply derive_const] |].
    unfold Rdiv. rewrite Rmult_0_l. ring.
Qed.

(** It is enough that f is differentiable at the ratios that occur. *)
Lemma opd_plus n f q p θ :
  (forall a, (a < n)%nat -> 0 < q a -> ex_derive f (u q (p θ) a)) ->
  (forall a, (a < n)%nat -> 0 <= q a) ->
  student n p θ ->
  is_derive (fun t : R => D n f q (p t)) θ (- E n (p θ) (fun a => w f (u q (p θ) a) * score p θ a)).
Proof.
  intros derive_f teacher is_student.
  eapply derive_value.
  - apply (sum_derive n (fun t a => p t a * f (q a / p t a))).
    intros a lt. apply (one_token n); auto.
  - rewrite <- E_opp. apply sum_ext. intros. ring.
Qed.

Theorem T1_any_student_holds : T1_any_student.
Proof.
  intros n f q p θ derive_f teacher is_student. apply opd_plus; try assumption.
  intros a lt some. apply derive_f, Rdiv_lt_0_compat; [assumption | now apply is_student].
Qed.

Theorem T1_softmax_holds : T1_softmax.
Proof.
  intros n f q z a derive_f teacher lt p.
  eapply derive_value.
  - apply T1_any_student_holds; [assumption | assumption | now apply softmax_student].
  - rewrite softmax_of_its_logit.
    rewrite (softmax_direction n z a (fun b => w f (u q (softmax n z) b))) by assumption. unfold p. ring.
Qed.

(** The twins fail at two tokens that the student finds equally likely, with the teacher at 1/4 and 3/4. *)
Definition even : nat -> R := fun _ => 0.

Definition quarter (a : nat) : R := if Nat.eqb a 0 then 1 / 4 else 3 / 4.

Lemma even_half a : softmax 2 even a = 1 / 2.
Proof. unfold softmax, even. simpl. rewrite exp_0. field. Qed.

Lemma quarter_distribution : distribution 2 quarter.
Proof.
  split; [| unfold quarter; simpl; lra].
  intros a _. unfold quarter. destruct (Nat.eqb a 0); lra.
Qed.

(** f = (u - 1)², with w_f = u² - 1. *)
Definition chi2 (x : R) : R := (x - 1) * (x - 1).

Lemma chi2_derive x : is_derive chi2 x (2 * (x - 1)).
Proof.
  assert (line : is_derive (fun y : R => y - 1) x (1 - 0)).
  { apply derive_minus; [apply derive_id | apply derive_const]. }
  eapply derive_value; [exact (derive_mult _ _ x _ _ line line) | simpl; ring].
Qed.

Lemma chi2_slope x : Derive chi2 x = 2 * (x - 1).
Proof. apply derivative, chi2_derive. Qed.

Lemma chi2_differentiable : differentiable_above_zero chi2.
Proof. intros x _. eexists. apply chi2_derive. Qed.

Lemma chi2_weight x : w chi2 x = x * x - 1.
Proof. unfold w. rewrite chi2_slope. unfold chi2. ring. Qed.

(** The derivative there, in the first logit. *)
Lemma true_derivative :
  is_derive (fun t : R => D 2 chi2 quarter (softmax_of_logit 2 even 0 t)) (even 0) (1 / 2).
Proof.
  eapply derive_value.
  - apply T1_softmax_holds; [apply chi2_differentiable | | lia].
    intros b lt. apply Rlt_le. now apply quarter_distribution.
  - cbv zeta. unfold E, u. simpl. rewrite !chi2_weight, !even_half. unfold quarter. simpl. field.
Qed.

Theorem T1_twin_sign_flipped_is_false : ~ T1_twin_sign_flipped.
Proof.
  intros twin.
  assert (false := twin 2%nat chi2 quarter even 0%nat chi2_differentiable quarter_distribution ltac:(lia)).
  apply (derive_unique _ _ _ _ true_derivative) in false.
  rewrite (softmax_direction 2 even 0 (fun b => w chi2 (u quarter (softmax 2 even) b))) in false by lia.
  revert false. unfold E, u. simpl. rewrite !chi2_weight, !even_half. unfold quarter. simpl. lra.
Qed.

Theorem T1_twin_stop_gradient_is_false : ~ T1_twin_stop_gradient.
Proof.
  intros twin.
  assert (false := twin 2%nat chi2 quarter even 0%nat chi2_differentiable quarter_distribution ltac:(lia)).
  apply (derive_unique _ _ _ _ true_derivative) in false.
  rewrite (softmax_direction 2 even 0 (fun b => - chi2 (u quarter (softmax 2 even) b))) in false by lia.
  revert false. unfold E, u, chi2. simpl. rewrite !even_half. unfold quarter. simpl. lra.
Qed.
