(** The notation of the theorems: student, teacher, divergence, weight, score, softmax.

    A vocabulary has n tokens, 0, ..., n - 1. A function [nat -> R] gives a number for each token, such as its
    probability; only the first n numbers matter. All logarithms are natural. *)

From Coq Require Import Reals Lra Lia FunctionalExtensionality.
From Coquelicot Require Import Coquelicot.
From OPD Require Export Sums Calculus Logarithm.
Open Scope R_scope.

(** A distribution in which every token has some probability; tokens that have none are left out of the n. *)
Definition positive (n : nat) (p : nat -> R) : Prop := forall a, (a < n)%nat -> 0 < p a.

Definition distribution (n : nat) (p : nat -> R) : Prop := positive n p /\ (Σ a < n, p a) = 1.

(** The mean E_p[g] = Σ_a p_a g_a. *)
Definition E (n : nat) (p g : nat -> R) : R := Σ a < n, p a * g a.

(** The ratio u = q/p, teacher over student, and the f-divergence D_f(q‖p) = E_p[f(u)]. *)
Definition u (q p : nat -> R) (a : nat) : R := q a / p a.

Definition D (n : nat) (f : R -> R) (q p : nat -> R) : R := E n p (fun a => f (u q p a)).

(** KL(p‖q) = Σ_a p_a log(p_a/q_a). *)
Definition KL (n : nat) (p q : nat -> R) : R := Σ a < n, p a * log (p a / q a).

(** The weight of OPD+: w_f(u) = u f'(u) - f(u). *)
Definition w (f : R -> R) (x : R) : R := x * Derive f x - f x.

(** A student p_θ near θ: positive, differentiable, and normalised. The number θ is any one of the student's
    parameters, while the others are held, or the position on any line through them; so what is said of the derivative
    in θ is said of every entry of the gradient, and of the gradient in every direction. *)
Definition student (n : nat) (p : R -> nat -> R) (θ : R) : Prop :=
  positive n (p θ) /\
  (forall a, (a < n)%nat -> ex_derive (fun t : R => p t a) θ) /\
  locally θ (fun t => (Σ a < n, p t a) = 1).

(** The score s_a = ∂_θ log p_θ(a). *)
Definition score (p : R -> nat -> R) (θ : R) (a : nat) : R := Derive (fun t => log (p t a)) θ.

(** A softmax row with the logits z, and the same row as a function of its logit a alone. *)
Definition softmax (n : nat) (z : nat -> R) (a : nat) : R := exp (z a) / Σ b < n, exp (z b).

Definition moved (z : nat -> R) (a : nat) (t : R) (b : nat) : R := if Nat.eqb b a then t else z b.

Definition softmax_of_logit (n : nat) (z : nat -> R) (a : nat) (t : R) : nat -> R := softmax n (moved z a t).

(** The indicator 1[b]. *)
Definition indicator (b : bool) : R := if b then 1 else 0.

(** * What follows at once *)

Lemma E_ext n p g h : (forall a, (a < n)%nat -> g a = h a) -> E n p g = E n p h.
Proof. intros same. apply sum_ext. intros a lt. now rewrite same. Qed.

Lemma E_plus n p g h : E n p (fun a => g a + h a) = E n p g + E n p h.
Proof. unfold E. rewrite <- sum_plus. apply sum_ext. intros. ring. Qed.

Lemma E_minus n p g h : E n p (fun a => g a - h a) = E n p g - E n p h.
Proof. unfold E. rewrite <- sum_minus. apply sum_ext. intros. ring. Qed.

Lemma E_opp n p g : E n p (fun a => - g a) = - E n p g.
Proof. unfold E. rewrite <- sum_opp. apply sum_ext. intros. ring. Qed.

Lemma E_scale n p c g : E n p (fun a => c * g a) = c * E n p g.
Proof. unfold E. rewrite <- sum_scale. apply sum_ext. intros. ring. Qed.

Lemma E_const n p c : E n p (fun _ => c) = c * Σ a < n, p a.
Proof. unfold E. rewrite <- sum_scale. apply sum_ext. intros. ring. Qed.

Lemma moved_same z a : moved z a (z a) = z.
Proof.
  apply functional_extensionality. intros b. unfold moved.
  destruct (Nat.eqb_spec b a) as [-> |]; reflexivity.
Qed.

Lemma softmax_of_its_logit n z a : softmax_of_logit n z a (z a) = softmax n z.
Proof. unfold softmax_of_logit. now rewrite moved_same. Qed.

Lemma sum_exp_positive n z a : (a < n)%nat -> 0 < Σ b < n, exp (z b).
Proof. intros lt. apply sum_positive; [lia | intros; apply exp_pos]. Qed.

Lemma softmax_positive n z : positive n (softmax n z).
Proof.
  intros a lt. unfold softmax. apply Rdiv_lt_0_compat; [apply exp_pos | now apply (sum_exp_positive n z a)].
Qed.

Lemma softmax_normalised n z : (0 < n)%nat -> (Σ a < n, softmax n z a) = 1.
Proof.
  intros some. unfold softmax, Rdiv.
  rewrite (sum_ext n _ (fun a => / (Σ b < n, exp (z b)) * exp (z a))) by (intros; ring).
  rewrite sum_scale. apply Rinv_l.
  assert (positive := sum_exp_positive n z 0 some). lra.
Qed.

Lemma softmax_distribution n z : (0 < n)%nat -> distribution n (softmax n z).
Proof. intros some. split; [apply softmax_positive | now apply softmax_normalised]. Qed.

(** The Jacobian of a softmax row: ∂p_b/∂z_a = p_b (1[b = a] - p_a). *)
Lemma softmax_derive n z a b :
  (a < n)%nat -> (b < n)%nat ->
  is_derive (fun t : R => softmax_of_logit n z a t b) (z a)
    (softmax n z b * (indicator (Nat.eqb b a) - softmax n z a)).
Proof.
  intros ha hb. unfold softmax_of_logit.
  assert (each : forall c, is_derive (fun t : R => exp (moved z a t c)) (z a) (indicator (Nat.eqb c a) * exp (z c))).
  { intros c. unfold moved, indicator. destruct (Nat.eqb_spec c a) as [-> | _].
    - eapply derive_value; [apply is_derive_exp | ring].
    - eapply derive_value; [apply derive_const | ring]. }
  assert (total : is_derive (fun t : R => Σ c < n, exp (moved z a t c)) (z a) (exp (z a))).
  { eapply derive_value; [apply sum_derive; intros; apply each |].
    unfold indicator. rewrite (sum_ext n _ (fun c => if Nat.eqb c a then exp (z c) else 0)).
    - now apply (sum_single n (fun c => exp (z c))).
    - intros c _. destruct (Nat.eqb c a); ring. }
  assert (some := sum_exp_positive n z a ha).
  assert (here : (Σ c < n, exp (moved z a (z a) c)) = Σ c < n, exp (z c)).
  { apply sum_ext. intros c _. now rewrite moved_same. }
  eapply derive_value.
  - apply (derive_div (fun t => exp (moved z a t b))); [apply each | exact total |]. rewrite here. lra.
  - cbv beta. rewrite here, moved_same. unfold softmax. field. lra.
Qed.

(** So a softmax row is a student as a function of any of its logits. *)
Lemma softmax_student n z a : (a < n)%nat -> student n (softmax_of_logit n z a) (z a).
Proof.
  intros lt. repeat split.
  - rewrite softmax_of_its_logit. apply softmax_positive.
  - intros b hb. eexists. now apply softmax_derive.
  - apply filter_forall. intros t. apply softmax_normalised. lia.
Qed.

(** s_a = ∂_θ p_a / p_a. *)
Lemma score_value n p θ a :
  student n p θ -> (a < n)%nat -> score p θ a = Derive (fun t => p t a) θ / p θ a.
Proof.
  intros [positive_p [derive _]] lt. unfold score. apply is_derive_unique.
  eapply derive_value.
  - apply (derive_comp log (fun t => p t a)); [apply log_derive; now apply positive_p |].
    apply Derive_correct. now apply derive.
  - reflexivity.
Qed.

Lemma probability_derive n p θ a :
  student n p θ -> (a < n)%nat -> is_derive (fun t : R => p t a) θ (p θ a * score p θ a).
Proof.
  intros is_student lt. rewrite (score_value n) by assumption.
  destruct is_student as [positive_p [derive _]].
  apply (derive_value _ θ (Derive (fun t : R => p t a) θ)); [apply Derive_correct; now apply derive |].
  assert (positive_a := positive_p a lt). field. lra.
Qed.

(** E_p[s] = 0. *)
Lemma score_mean n p θ : student n p θ -> E n (p θ) (score p θ) = 0.
Proof.
  intros is_student. apply (derive_unique (fun t => Σ a < n, p t a) θ).
  - apply sum_derive. intros a lt. now apply (probability_derive n).
  - destruct is_student as [_ [_ normalised]].
    apply (derive_local (fun _ => 1)); [| apply derive_const].
    revert normalised. apply filter_imp. now intros t ->.
Qed.

(** A constant c is a baseline: E_p[(A - c) s] = E_p[A s]. *)
Lemma baseline n p θ A c :
  student n p θ -> E n (p θ) (fun a => (A a - c) * score p θ a) = E n (p θ) (fun a => A a * score p θ a).
Proof.
  intros is_student.
  rewrite (E_ext n _ _ (fun a => A a * score p θ a - c * score p θ a)) by (intros; ring).
  rewrite E_minus, E_scale, (score_mean n) by assumption. ring.
Qed.

(** The score of a softmax row in its logit a: 1[b = a] - p_a. *)
Lemma softmax_score n z a b :
  (a < n)%nat -> (b < n)%nat ->
  score (softmax_of_logit n z a) (z a) b = indicator (Nat.eqb b a) - softmax n z a.
Proof.
  intros ha hb. rewrite (score_value n) by (try apply softmax_student; assumption).
  rewrite (derivative (fun t : R => softmax_of_logit n z a t b) _ _ (softmax_derive n z a b ha hb)).
  rewrite softmax_of_its_logit.
  assert (positive_b := softmax_positive n z b hb). field. lra.
Qed.

(** A weight A on the score moves the logit a by E_p[A s] = p_a (A_a - E_p[A]). *)
Lemma softmax_direction n z a A :
  (a < n)%nat ->
  E n (softmax n z) (fun b => A b * score (softmax_of_logit n z a) (z a) b)
  = softmax n z a * (A a - E n (softmax n z) A).
Proof.
  intros lt.
  rewrite (E_ext n _ _ (fun b => indicator (Nat.eqb b a) * A b - softmax n z a * A b)).
  - rewrite E_minus, E_scale. unfold E at 1.
    rewrite (sum_ext n _ (fun b => if Nat.eqb b a then softmax n z b * A b else 0)).
    + rewrite (sum_single n (fun b => softmax n z b * A b)) by assumption. ring.
    + intros b _. unfold indicator. destruct (Nat.eqb b a); ring.
  - intros b hb. rewrite softmax_score by assumption. ring.
Qed.
