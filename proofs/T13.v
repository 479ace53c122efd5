(** T13, exact on k tokens and sampled on the rest (docs/theory/t13.md).

      ĝ = - Σ_{a ∈ S} p_a (w_a - c) s_a - 1[y ∉ S] (w_y - c) s_y,   E_p[ĝ] = ∇ D_f;
      tr Var[w_y s_y] - tr Var[ĝ] = E_p[1_S w² |s|²] - |g_S|² - 2 g_S·g_T at c = 0. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence T1.
Open Scope R_scope.

(** * Statements *)

(** The estimate ĝ from the sampled token y, in one parameter; A is the weight and s the score of each token. *)
Definition estimate (n : nat) (S : nat -> bool) (p A s : nat -> R) (c : R) (y : nat) : R :=
  - (Σ a < n, indicator (S a) * (p a * (A a - c) * s a)) - indicator (negb (S y)) * ((A y - c) * s y).

(** For every differentiable f, every set S that does not depend on the sampled token, and every constant c: E_p[ĝ]
    = ∇ D_f. *)
Definition T13_unbiased : Prop :=
  forall (n : nat) (f : R -> R) (S : nat -> bool) (c : R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  differentiable_above_zero f ->
  (forall a, (a < n)%nat -> 0 <= q a) ->
  student n p θ ->
  is_derive (fun t : R => D n f q (p t)) θ
    (E n (p θ) (estimate n S (p θ) (fun a => w f (u q (p θ) a)) (score p θ) c)).

(** The same from a token that another policy μ sampled: the sampled part carries the token's ratio p/μ, the exact part
    does not. *)
Definition estimate_off_policy (n : nat) (S : nat -> bool) (p μ A s : nat -> R) (c : R) (y : nat) : R :=
  - (Σ a < n, indicator (S a) * (p a * (A a - c) * s a))
  - indicator (negb (S y)) * (p y / μ y * ((A y - c) * s y)).

(** Off-policy, with the ratio P/M of the histories on both parts, the mean under the sampler is that of ĝ under the
    student, for any finite set of histories h with the probabilities P_h under the student and M_h under the sampler,
    any weights, any scores and any constants c_h. *)
Definition T13_off_policy : Prop :=
  forall (H n : nat) (S : nat -> nat -> bool) (P M c : nat -> R) (p μ A s : nat -> nat -> R),
  positive H M ->
  (forall h, (h < H)%nat -> distribution n (p h) /\ distribution n (μ h)) ->
  E H M (fun h => P h / M h * E n (μ h) (estimate_off_policy n (S h) (p h) (μ h) (A h) (s h) (c h)))
  = E H P (fun h => E n (p h) (estimate n (S h) (p h) (A h) (s h) (c h))).

(** The variance of a vector with d entries, such as a gradient: tr Var[g] = Σ_k E[(g_k - E[g_k])²]. *)
Definition tr_Var (n d : nat) (p : nat -> R) (g : nat -> nat -> R) : R :=
  Σ k < d, E n p (fun y => (g y k - E n p (fun b => g b k)) ^ 2).

(** The product of two vectors, and the part -E_p[1_S w s] of the gradient that lies on a set. *)
Definition dot (d : nat) (x y : nat -> R) : R := Σ k < d, x k * y k.

Definition part (n : nat) (S : nat -> bool) (p A : nat -> R) (s : nat -> nat -> R) (k : nat) : R :=
  - E n p (fun a => indicator (S a) * (A a * s a k)).

Definition rest (S : nat -> bool) (a : nat) : bool := negb (S a).

(** What the split saves, for any weights A and any scores s of d parameters: tr Var[A_y s_y] - tr Var[ĝ] = E_p[1_S
    A² |s|²] - |g_S|² - 2 g_S·g_T at c = 0. *)
Definition T13_variance : Prop :=
  forall (n d : nat) (S : nat -> bool) (p A : nat -> R) (s : nat -> nat -> R),
  distribution n p ->
  let sampled := fun y k => - (A y * s y k) in
  let split := fun y k => estimate n S p A (fun a => s a k) 0 y in
  let g_S := part n S p A s in
  let g_T := part n (rest S) p A s in
  tr_Var n d p sampled - tr_Var n d p split
  = E n p (fun a => indicator (S a) * (A a ^ 2 * dot d (s a) (s a))) - dot d g_S g_S - 2 * dot d g_S g_T.

(** The best constant: c⋆ = (E[1_T A |s|²] - E[1_T A s]·E[1_T s]) / (E[1_T |s|²] - |E[1_T s]|²), where the denominator,
    which is tr Var[1_T s], is not zero. Any other constant c adds (c - c⋆)² tr Var[1_T s] to the variance. *)
Definition T13_best_constant : Prop :=
  forall (n d : nat) (S : nat -> bool) (p A : nat -> R) (s : nat -> nat -> R) (c : R),
  distribution n p ->
  let T := fun a => indicator (rest S a) in
  let mean_As := fun k => E n p (fun a => T a * (A a * s a k)) in
  let mean_s := fun k => E n p (fun a => T a * s a k) in
  let denominator := E n p (fun a => T a * dot d (s a) (s a)) - dot d mean_s mean_s in
  let best := (E n p (fun a => T a * (A a * dot d (s a) (s a))) - dot d mean_As mean_s) / denominator in
  let split := fun c y k => estimate n S p A (fun a => s a k) c y in
  denominator = tr_Var n d p (fun a k => T a * s a k) /\
  (denominator <> 0 ->
   tr_Var n d p (split c) = tr_Var n d p (split best) + (c - best) ^ 2 * denominator /\
   tr_Var n d p (split best) <= tr_Var n d p (split c)).

(** A false twin: the mean is the same if the sampled token is always put into the set. *)
Definition T13_twin_sampled_token_in_the_set : Prop :=
  forall (n : nat) (f : R -> R) (S : nat -> bool) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  differentiable_above_zero f -> distribution n q -> student n p θ ->
  is_derive (fun t : R => D n f q (p t)) θ
    (E n (p θ) (fun y => estimate n (fun a => orb (S a) (Nat.eqb a y)) (p θ) (fun a => w f (u q (p θ) a))
                           (score p θ) 0 y)).

(** A false twin: the parts do not pull together, so that the saving is E_p[1_S w² |s|²] - |g_S|² alone. *)
Definition T13_twin_cross_term_dropped : Prop :=
  forall (n d : nat) (S : nat -> bool) (p A : nat -> R) (s : nat -> nat -> R),
  distribution n p ->
  let g_S := part n S p A s in
  tr_Var n d p (fun y k => - (A y * s y k)) - tr_Var n d p (fun y k => estimate n S p A (fun a => s a k) 0 y)
  = E n p (fun a => indicator (S a) * (A a ^ 2 * dot d (s a) (s a))) - dot d g_S g_S.

(** * Proofs: the mean *)

Lemma indicator_rest S a : indicator (rest S a) = 1 - indicator (S a).
Proof. unfold rest, indicator. destruct (S a); simpl; ring. Qed.

(** Each of the two parts of the mean is a part of one sum over all tokens. *)
Lemma estimate_mean n S p A s c :
  (Σ a < n, p a) = 1 -> E n p (estimate n S p A s c) = - E n p (fun a => (A a - c) * s a).
Proof.
  intros one. unfold estimate.
  rewrite E_minus, E_const, one.
  rewrite (E_ext n p (fun y => indicator (negb (S y)) * ((A y - c) * s y))
             (fun y => (A y - c) * s y - indicator (S y) * ((A y - c) * s y))).
  - rewrite E_minus. unfold E at 2.
    rewrite (sum_ext n (fun a => indicator (S a) * (p a * (A a - c) * s a))
               (fun a => p a * (indicator (S a) * ((A a - c) * s a)))) by (intros; ring).
    unfold E. ring.
  - intros a _. fold (rest S a). rewrite indicator_rest. ring.
Qed.

Lemma student_normalised n p θ : student n p θ -> (Σ a < n, p θ a) = 1.
Proof. intros [_ [_ near]]. now apply locally_singleton in near. Qed.

Theorem T13_unbiased_holds : T13_unbiased.
Proof.
  intros n f S c q p θ derive_f teacher is_student.
  rewrite estimate_mean by now apply student_normalised.
  rewrite (baseline n p θ (fun a => w f (u q (p θ) a)) c) by assumption.
  now apply T1_any_student_holds.
Qed.

Lemma off_policy_mean n S p μ A s c :
  distribution n p -> distribution n μ ->
  E n μ (estimate_off_policy n S p μ A s c) = E n p (estimate n S p A s c).
Proof.
  intros [_ one_p] [positive_μ one_μ]. unfold estimate_off_policy, estimate.
  rewrite !E_minus, !E_const, one_p, one_μ. f_equal.
  apply sum_ext. intros y lt. assert (0 < μ y) by auto. field. lra.
Qed.

Theorem T13_off_policy_holds : T13_off_policy.
Proof.
  intros H n S P M c p μ A s positive_M rows. apply sum_ext. intros h lt.
  destruct (rows h lt) as [is_p is_μ]. rewrite off_policy_mean by assumption.
  assert (0 < M h) by auto. field. lra.
Qed.

(** * Proofs: the variance *)

(** Var[g] = E[g²] - E[g]². *)
Lemma variance_moments n p g :
  (Σ a < n, p a) = 1 ->
  E n p (fun y => (g y - E n p g) ^ 2) = E n p (fun y => g y ^ 2) - E n p g ^ 2.
Proof.
  intros one. set (m := E n p g).
  rewrite (E_ext n p _ (fun y => g y ^ 2 - 2 * m * g y + m ^ 2)) by (intros; ring).
  rewrite E_plus, E_minus, E_scale, E_const, one. fold m. ring.
Qed.

(** A constant moves no variance, and the sign does not matter. *)
Lemma variance_shift n p g h m :
  (Σ a < n, p a) = 1 -> (forall y, g y = m - h y) ->
  E n p (fun y => (g y - E n p g) ^ 2) = E n p (fun y => (h y - E n p h) ^ 2).
Proof.
  intros one shifted.
  assert (mean : E n p g = m - E n p h).
  { rewrite (E_ext n p g (fun y => m - h y)) by auto. rewrite E_minus, E_const, one. ring. }
  apply E_ext. intros y _. rewrite mean, shifted. ring.
Qed.

(** So only the sampled part of the estimate varies. *)
Lemma split_variance n S p A s c :
  (Σ a < n, p a) = 1 ->
  let h y := indicator (rest S y) * ((A y - c) * s y) in
  E n p (fun y => (estimate n S p A s c y - E n p (fun b => estimate n S p A s c b)) ^ 2)
  = E n p (fun y => h y ^ 2) - E n p (fun y => h y) ^ 2.
Proof.
  intros one h.
  rewrite (variance_shift n p (fun b => estimate n S p A s c b) h
             (- Σ a < n, indicator (S a) * (p a * (A a - c) * s a)) one) by reflexivity.
  now apply variance_moments.
Qed.

Lemma indicator_square b : indicator b ^ 2 = indicator b.
Proof. unfold indicator. destruct b; ring. Qed.

(** A sum over the entries of the gradient is taken inside a mean. *)
Lemma E_sum n d p g : E n p (fun a => Σ k < d, g a k) = Σ k < d, E n p (fun a => g a k).
Proof.
  unfold E. rewrite (sum_ext n _ (fun a => Σ k < d, p a * g a k)) by (intros; now rewrite sum_scale).
  apply sum_exchange.
Qed.

Theorem T13_variance_holds : T13_variance.
Proof.
  intros n d S p A s [_ one] sampled split g_S g_T.
  rewrite (E_ext n p _ (fun a => Σ k < d, indicator (S a) * (A a ^ 2 * s a k ^ 2))).
  2: { intros a _. unfold dot. rewrite <- !sum_scale. apply sum_ext. intros. ring. }
  unfold tr_Var, dot. rewrite E_sum, <- !sum_minus.
  replace (2 * Σ k < d, g_S k * g_T k) with (Σ k < d, 2 * (g_S k * g_T k)) by apply sum_scale.
  rewrite <- sum_minus. apply sum_ext. intros k _. unfold split.
  rewrite (split_variance n S p A (fun a => s a k) 0 one), variance_moments by assumption. cbv zeta.
  unfold sampled. rewrite E_opp.
  set (square := fun a => A a ^ 2 * s a k ^ 2). set (inside := fun a => indicator (S a) * square a).
  rewrite (E_ext n p (fun y => (- (A y * s y k)) ^ 2) square) by (intros; unfold square; ring).
  rewrite (E_ext n p (fun y => (indicator (rest S y) * ((A y - 0) * s y k)) ^ 2) (fun y => square y - inside y)).
  2: { intros y _. unfold inside, square.
       replace ((indicator (rest S y) * ((A y - 0) * s y k)) ^ 2)
         with (indicator (rest S y) ^ 2 * (A y ^ 2 * s y k ^ 2)) by ring.
       rewrite indicator_square, indicator_rest. ring. }
  rewrite E_minus.
  assert (tail : E n p (fun y => indicator (rest S y) * ((A y - 0) * s y k)) = - g_T k).
  { unfold g_T, part. rewrite Ropp_involutive. apply E_ext. intros. ring. }
  assert (whole : E n p (fun y => A y * s y k) = - g_S k - g_T k).
  { unfold g_S, g_T, part.
    rewrite (E_ext n p (fun y => A y * s y k)
               (fun y => indicator (S y) * (A y * s y k) + indicator (rest S y) * (A y * s y k))).
    - rewrite E_plus. ring.
    - intros y _. rewrite indicator_rest. ring. }
  rewrite tail, whole. unfold inside, square. ring.
Qed.

(** * Proofs: the best constant *)

(** In c the variance is a parabola. *)
Lemma variance_parabola n d S p A (s : nat -> nat -> R) c :
  (Σ a < n, p a) = 1 ->
  let T a := indicator (rest S a) in
  let mean_As k := E n p (fun a => T a * (A a * s a k)) in
  let mean_s k := E n p (fun a => T a * s a k) in
  tr_Var n d p (fun y k => estimate n S p A (fun a => s a k) c y)
  = tr_Var n d p (fun y k => estimate n S p A (fun a => s a k) 0 y)
    - 2 * c * (E n p (fun a => T a * (A a * dot d (s a) (s a))) - dot d mean_As mean_s)
    + c ^ 2 * (E n p (fun a => T a * dot d (s a) (s a)) - dot d mean_s mean_s).
Proof.
  intros one T mean_As mean_s.
  rewrite (E_ext n p (fun a => T a * (A a * dot d (s a) (s a))) (fun a => Σ k < d, T a * (A a * s a k ^ 2))).
  2: { intros a _. unfold dot. rewrite <- !sum_scale. apply sum_ext. intros. ring. }
  rewrite (E_ext n p (fun a => T a * dot d (s a) (s a)) (fun a => Σ k < d, T a * s a k ^ 2)).
  2: { intros a _. unfold dot. rewrite <- !sum_scale. apply sum_ext. intros. ring. }
  rewrite !E_sum. unfold tr_Var, dot. rewrite <- !sum_minus, <- !sum_scale, <- sum_minus, <- sum_plus.
  apply sum_ext. intros k _.
  rewrite !(split_variance n S p A (fun a => s a k)) by assumption. cbv zeta.
  rewrite (E_ext n p (fun y => (indicator (rest S y) * ((A y - c) * s y k)) ^ 2)
    (fun y => (indicator (rest S y) * ((A y - 0) * s y k)) ^ 2 - 2 * c * (T y * (A y * s y k ^ 2))
              + c ^ 2 * (T y * s y k ^ 2))).
  2: { intros y _. fold (T y). assert (square : T y ^ 2 = T y) by apply indicator_square.
       rewrite !Rpow_mult_distr, square. ring. }
  rewrite (E_ext n p (fun y => indicator (rest S y) * ((A y - c) * s y k))
    (fun y => T y * (A y * s y k) - c * (T y * s y k))) by (intros; unfold T; ring).
  rewrite (E_ext n p (fun y => indicator (rest S y) * ((A y - 0) * s y k))
    (fun y => T y * (A y * s y k))) by (intros; unfold T; ring).
  rewrite E_plus, !E_minus, !E_scale. fold (mean_As k) (mean_s k). ring.
Qed.

Theorem T13_best_constant_holds : T13_best_constant.
Proof.
  intros n d S p A s c [positive_p one] T mean_As mean_s denominator best split.
  assert (is_variance : denominator = tr_Var n d p (fun a k => T a * s a k)).
  { unfold denominator, tr_Var, dot.
    rewrite (E_ext n p _ (fun a => Σ k < d, (T a * s a k) ^ 2)).
    - rewrite E_sum, <- sum_minus. apply sum_ext. intros k _.
      rewrite variance_moments by assumption. unfold mean_s. ring.
    - intros a _. rewrite <- sum_scale. apply sum_ext. intros k _.
      assert (square : T a ^ 2 = T a) by apply indicator_square. rewrite Rpow_mult_distr, square. ring. }
  split; [exact is_variance |]. intros not_zero.
  assert (parabola : forall c, tr_Var n d p (split c)
                               = tr_Var n d p (split 0) - 2 * c * (best * denominator) + c ^ 2 * denominator).
  { intros c0.
    replace (best * denominator) with (E n p (fun a => T a * (A a * dot d (s a) (s a))) - dot d mean_As mean_s).
    - exact (variance_parabola n d S p A s c0 one).
    - unfold best. field. exact not_zero. }
  assert (difference : tr_Var n d p (split c) = tr_Var n d p (split best) + (c - best) ^ 2 * denominator).
  { rewrite (parabola c), (parabola best). ring. }
  split; [exact difference |]. rewrite difference.
  assert (0 <= denominator).
  { rewrite is_variance. apply sum_nonneg. intros k _. apply sum_nonneg. intros a lt.
    apply Rmult_le_pos; [apply Rlt_le; auto | apply pow2_ge_0]. }
  assert (0 <= (c - best) ^ 2) by apply pow2_ge_0. nra.
Qed.

(** * Proofs: the twins *)

(** With no other token in the set, what is put into it is the sampled token alone: half of the gradient is lost where
    two tokens are equally likely. *)
Theorem T13_twin_sampled_token_in_the_set_is_false : ~ T13_twin_sampled_token_in_the_set.
Proof.
  intros twin.
  assert (false := twin 2%nat chi2 (fun _ => false) quarter _ _ chi2_differentiable quarter_distribution
                     (softmax_student 2 even 0 ltac:(lia))).
  rewrite softmax_of_its_logit in false. apply (derive_unique _ _ _ _ true_derivative) in false.
  revert false. unfold E, estimate, u. simpl. rewrite !softmax_score, !chi2_weight, !even_half by lia.
  unfold indicator, quarter. simpl. lra.
Qed.

(** Two equally likely tokens of weight one whose scores are both one: the first part of the estimate is exact, and so
    is the rest, but for the chance that it is not sampled. *)
Theorem T13_twin_cross_term_dropped_is_false : ~ T13_twin_cross_term_dropped.
Proof.
  intros twin.
  assert (half : distribution 2 (fun _ => 1 / 2)).
  { split; [intros a _; lra | simpl; lra]. }
  assert (false := twin 2%nat 1%nat (fun a => Nat.eqb a 0) _ (fun _ => 1) (fun _ _ => 1) half).
  revert false. unfold tr_Var, part, dot, estimate, E, indicator, rest. simpl. lra.
Qed.
