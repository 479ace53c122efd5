(** T2, the bias of stop-gradient (docs/theory/t2.md).

      g_{sg} = ∇ D_f + E_p[u f'(u) s];   the bias vanishes for all p and q exactly if f = - c log u + d. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence Convex T1.
Open Scope R_scope.

(** * Statements *)

(** The divergence with its ratios frozen at a student p₀, E_p[f(q/p₀)]: a loss with the detached reward - f(u)
    descends it, at p₀ = p. *)
Definition frozen (n : nat) (f : R -> R) (q p0 p : nat -> R) : R := E n p (fun a => f (u q p0 a)).

(** The direction of stop-gradient, g_{sg} = E_p[f(u) s]. *)
Definition g_sg (n : nat) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R) : R :=
  E n (p θ) (fun a => f (u q (p θ) a) * score p θ a).

(** For every differentiable f, every teacher and every student: the loss with frozen ratios has the gradient g_{sg} =
    E_p[f(u) s] = ∇ D_f + E_p[u f'(u) s]. *)
Definition T2_bias : Prop :=
  forall (n : nat) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  differentiable_above_zero f ->
  (forall a, (a < n)%nat -> 0 <= q a) ->
  student n p θ ->
  is_derive (fun t : R => frozen n f q (p θ) (p t)) θ (g_sg n f q p θ) /\
  exists g : R,
    is_derive (fun t : R => D n f q (p t)) θ g /\
    g_sg n f q p θ = g + E n (p θ) (fun a => u q (p θ) a * Derive f (u q (p θ) a) * score p θ a).

(** The frozen value E_{p_t}[f(u_θ)] equals the divergence at t = θ and leaves it at first order: their difference
    is E_p[u f'(u) s] (t - θ) + o(t - θ). *)
Definition T2_value : Prop :=
  forall (n : nat) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  differentiable_above_zero f ->
  (forall a, (a < n)%nat -> 0 <= q a) ->
  student n p θ ->
  frozen n f q (p θ) (p θ) - D n f q (p θ) = 0 /\
  is_derive (fun t : R => frozen n f q (p θ) (p t) - D n f q (p t)) θ
    (E n (p θ) (fun a => u q (p θ) a * Derive f (u q (p θ) a) * score p θ a)).

(** The remainder is O((t - θ)²), for every teacher and every student that is twice differentiable. *)
Definition second_order_remainder (n : nat) (f : R -> R) : Prop :=
  forall (q : nat -> R) (p : R -> nat -> R) (θ : R),
  positive n q ->
  locally θ (fun t => student n p t) ->
  locally θ (fun t => forall a, (a < n)%nat -> ex_derive (Derive (fun r => p r a)) t) ->
  let bias := E n (p θ) (fun a => u q (p θ) a * Derive f (u q (p θ) a) * score p θ a) in
  exists K, locally θ (fun t =>
    Rabs (frozen n f q (p θ) (p t) - D n f q (p t) - bias * (t - θ)) <= K * (t - θ) ^ 2).

(** If f and the student are twice differentiable, the remainder is O((t - θ)²). *)
Definition T2_value_second_order : Prop :=
  forall (n : nat) (f : R -> R),
  differentiable_above_zero f -> differentiable_above_zero (Derive f) -> second_order_remainder n f.

(** The "if" direction: if f(u) = - c log u + d, the bias is zero for every student. *)
Definition T2_reverse_KL_has_no_bias : Prop :=
  forall (n : nat) (f : R -> R) (c d : R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  (forall x, 0 < x -> f x = - c * log x + d) ->
  positive n q ->
  student n p θ ->
  E n (p θ) (fun a => u q (p θ) a * Derive f (u q (p θ) a) * score p θ a) = 0.

(** Stop-gradient has no bias on n tokens: for every teacher and every softmax student, every entry of its gradient is
    that of the divergence. Pairs with a token of ratio one are left out, as f need not be differentiable at one. *)
Definition unbiased (n : nat) (f : R -> R) : Prop :=
  forall (q z : nat -> R) (a : nat),
  distribution n q ->
  (forall b, (b < n)%nat -> q b <> softmax n z b) ->
  (a < n)%nat ->
  Derive (fun t => frozen n f q (softmax n z) (softmax_of_logit n z a t)) (z a)
  = Derive (fun t => D n f q (softmax_of_logit n z a t)) (z a).

(** Both directions, on any number n ≥ 2 of tokens, for every f that is continuous, and differentiable away from
    one: stop-gradient has no bias for all p and q exactly if u f'(u) is constant, and exactly if f(u) = - c log u + d.
    *)
Definition T2_only_the_reverse_KL : Prop :=
  forall (n : nat) (f : R -> R),
  (2 <= n)%nat ->
  (forall x, 0 < x -> x <> 1 -> ex_derive f x) ->
  continuous f 1 ->
  (unbiased n f <-> exists c, forall x, 0 < x -> x <> 1 -> x * Derive f x = c) /\
  (unbiased n f <-> exists c d, forall x, 0 < x -> f x = - c * log x + d).

(** A false twin: stop-gradient has no bias, whatever f. *)
Definition T2_twin_never_biased : Prop :=
  forall (n : nat) (f : R -> R), (2 <= n)%nat -> differentiable_above_zero f -> unbiased n f.

(** A false twin: the remainder of the value is O((t - θ)²) for every convex f that is differentiable once. For f(u)
    = |u - 1|^(3/2) it is not. *)
Definition T2_twin_remainder : Prop :=
  forall (n : nat) (f : R -> R),
  convex f -> differentiable_above_zero f -> f 1 = 0 -> second_order_remainder n f.

(** A false twin: the sign of the bias flipped. *)
Definition T2_twin_sign_flipped : Prop :=
  forall (n : nat) (f : R -> R) (q z : nat -> R) (a : nat),
  differentiable_above_zero f -> distribution n q -> (a < n)%nat ->
  Derive (fun t => frozen n f q (softmax n z) (softmax_of_logit n z a t)) (z a)
  = Derive (fun t => D n f q (softmax_of_logit n z a t)) (z a)
    - E n (softmax n z) (fun b => u q (softmax n z) b * Derive f (u q (softmax n z) b)
                                  * score (softmax_of_logit n z a) (z a) b).

(** * Proofs: the bias *)

Lemma frozen_derive n f q p θ :
  student n p θ ->
  is_derive (fun t : R => frozen n f q (p θ) (p t)) θ (g_sg n f q p θ).
Proof.
  intros is_student.
  eapply derive_value.
  - apply (sum_derive n (fun t a => p t a * f (u q (p θ) a))). intros a lt.
    apply derive_mult; [now apply (probability_derive n) | apply derive_const].
  - apply sum_ext. intros. simpl. ring.
Qed.

(** f(u) s = - w_f(u) s + u f'(u) s, token by token. *)
Lemma weight_and_bias n f q p θ :
  g_sg n f q p θ
  = - E n (p θ) (fun a => w f (u q (p θ) a) * score p θ a)
    + E n (p θ) (fun a => u q (p θ) a * Derive f (u q (p θ) a) * score p θ a).
Proof. unfold g_sg. rewrite <- E_opp, <- E_plus. apply E_ext. intros. unfold w. ring. Qed.

Theorem T2_bias_holds : T2_bias.
Proof.
  intros n f q p θ derive_f teacher is_student.
  split; [now apply frozen_derive |]. eexists. split.
  - now apply T1_any_student_holds.
  - apply weight_and_bias.
Qed.

Theorem T2_value_holds : T2_value.
Proof.
  intros n f q p θ derive_f teacher is_student. split; [unfold frozen, D; ring |].
  eapply derive_value.
  - exact (derive_minus _ _ _ _ _ (frozen_derive n f q p θ is_student)
             (T1_any_student_holds n f q p θ derive_f teacher is_student)).
  - rewrite weight_and_bias. ring.
Qed.

(** The slope of the remainder: Σ_a p_a'(t) (f(u_a(θ)) + w_f(u_a(t))), less a constant. *)
Definition remainder_slope (n : nat) (f : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ bias t : R) : R :=
  (Σ a < n, Derive (fun r => p r a) t * (f (u q (p θ) a) + w f (u q (p t) a))) - bias.

Lemma remainder_derive n f q p θ bias t :
  differentiable_above_zero f -> positive n q -> student n p t ->
  is_derive (fun r : R => frozen n f q (p θ) (p r) - D n f q (p r) - bias * (r - θ)) t
    (remainder_slope n f q p θ bias t).
Proof.
  intros derive_f teacher is_student.
  assert (value : is_derive (fun r : R => frozen n f q (p θ) (p r)) t
                    (Σ a < n, Derive (fun r => p r a) t * f (u q (p θ) a))).
  { apply (sum_derive n (fun r a => p r a * f (u q (p θ) a))). intros a lt.
    apply (derive_value _ t (Derive (fun r => p r a) t * f (u q (p θ) a) + p t a * 0)); [| ring].
    apply (derive_mult (fun r => p r a) (fun _ => f (u q (p θ) a))); [| apply derive_const].
    apply Derive_correct. now apply is_student. }
  assert (exact := T1_any_student_holds n f q p t derive_f (fun a lt => Rlt_le _ _ (teacher a lt)) is_student).
  eapply derive_value.
  - apply derive_minus; [exact (derive_minus _ _ _ _ _ value exact) |].
    apply derive_scale, derive_minus; [apply derive_id | apply derive_const].
  - unfold remainder_slope.
    rewrite (sum_ext n (fun a => Derive (fun r => p r a) t * (f (u q (p θ) a) + w f (u q (p t) a)))
      (fun a => Derive (fun r => p r a) t * f (u q (p θ) a) + p t a * (w f (u q (p t) a) * score p t a))).
    + rewrite sum_plus. unfold E. ring.
    + intros a lt. rewrite (score_value n) by assumption.
      assert (0 < p t a) by now apply is_student. field. lra.
Qed.

Lemma weight_differentiable f x :
  differentiable_above_zero f -> differentiable_above_zero (Derive f) -> 0 < x -> ex_derive (w f) x.
Proof.
  intros derive_f derive_slope hx. eexists. apply derive_minus; [apply derive_mult |].
  - apply derive_id.
  - apply Derive_correct. auto.
  - apply Derive_correct. auto.
Qed.

Lemma remainder_slope_derive n f q p θ bias t :
  differentiable_above_zero f -> differentiable_above_zero (Derive f) -> positive n q -> student n p t ->
  (forall a, (a < n)%nat -> ex_derive (Derive (fun r => p r a)) t) ->
  ex_derive (remainder_slope n f q p θ bias) t.
Proof.
  intros derive_f derive_slope teacher is_student twice. eexists. apply derive_minus; [| apply derive_const].
  apply (sum_derive n (fun r a => Derive (fun y => p y a) r * (f (u q (p θ) a) + w f (u q (p r) a)))
    (fun a => Derive (fun r => Derive (fun y => p y a) r * (f (u q (p θ) a) + w f (u q (p r) a))) t)).
  intros a lt. apply Derive_correct. assert (positive_a : 0 < p t a) by now apply is_student.
  eexists. apply derive_mult; [apply Derive_correct; auto |].
  apply derive_plus; [apply derive_const |].
  apply (derive_comp (w f) (fun r => q a / p r a)).
  - apply Derive_correct, weight_differentiable; auto. now apply Rdiv_lt_0_compat; auto.
  - apply (derive_div (fun _ => q a)); [apply derive_const | | lra]. apply Derive_correct. now apply is_student.
Qed.

Theorem T2_value_second_order_holds : T2_value_second_order.
Proof.
  intros n f derive_f derive_slope q p θ teacher students twice bias.
  assert (is_student := locally_singleton _ _ students).
  assert (curve := remainder_slope_derive n f q p θ bias θ derive_f derive_slope teacher is_student
                     (locally_singleton _ _ twice)).
  destruct curve as [l curve].
  apply (second_order _ (remainder_slope n f q p θ bias) θ l).
  - revert students. apply filter_imp. intros t here. now apply remainder_derive.
  - assert (both := filter_and _ _ students twice). revert both. apply filter_imp. intros t [here slopes].
    apply (ex_derive_continuous (V := R_NormedModule)). now apply remainder_slope_derive.
  - unfold frozen, D. ring.
  - unfold remainder_slope, bias, E.
    rewrite (sum_ext n _ (fun a => p θ a * (u q (p θ) a * Derive f (u q (p θ) a) * score p θ a))); [ring |].
    intros a lt. rewrite (score_value n) by assumption. unfold w.
    assert (0 < p θ a) by now apply is_student. field. lra.
  - exact curve.
Qed.

(** * Proofs: if *)

Lemma logarithm_slope f c d x :
  (forall y, 0 < y -> f y = - c * log y + d) -> 0 < x -> is_derive f x (- c / x).
Proof.
  intros is_log positive_x.
  apply (derive_local (fun y => - c * log y + d)).
  - apply (filter_imp (fun y => 0 < y)); [| now apply locally_positive].
    intros y positive_y. symmetry. now apply is_log.
  - eapply derive_value.
    + apply derive_plus; [apply derive_scale, log_derive; assumption | apply derive_const].
    + field. lra.
Qed.

Theorem T2_reverse_KL_has_no_bias_holds : T2_reverse_KL_has_no_bias.
Proof.
  intros n f c d q p θ is_log teacher is_student.
  rewrite (E_ext n _ _ (fun a => - c * score p θ a)).
  - rewrite E_scale, (score_mean n) by assumption. ring.
  - intros a lt.
    assert (positive_u : 0 < u q (p θ) a).
    { apply Rdiv_lt_0_compat; [now apply teacher | now apply is_student]. }
    rewrite (derivative _ _ _ (logarithm_slope f c d _ is_log positive_u)). field. lra.
Qed.

(** * Proofs: only if *)

(** The two gradients in a logit of a softmax row differ by p_a (k_a - E_p[k]), with k = u f'(u). *)
Lemma softmax_bias n f q z a :
  (forall b, (b < n)%nat -> ex_derive f (u q (softmax n z) b)) -> distribution n q -> (a < n)%nat ->
  let k b := u q (softmax n z) b * Derive f (u q (softmax n z) b) in
  Derive (fun t => frozen n f q (softmax n z) (softmax_of_logit n z a t)) (z a)
  - Derive (fun t => D n f q (softmax_of_logit n z a t)) (z a)
  = softmax n z a * (k a - E n (softmax n z) k).
Proof.
  intros derive_f [teacher _] lt k.
  assert (is_student := softmax_student n z a lt).
  assert (one := frozen_derive n f q (softmax_of_logit n z a) (z a) is_student).
  assert (two := opd_plus n f q (softmax_of_logit n z a) (z a)).
  unfold g_sg in one. rewrite softmax_of_its_logit in *.
  specialize (two ltac:(auto) ltac:(intros; apply Rlt_le; auto) is_student).
  rewrite (derivative _ _ _ one), (derivative _ _ _ two).
  rewrite <- (softmax_direction n z a k lt), <- E_opp, <- E_minus. apply E_ext. intros. unfold w, k. ring.
Qed.

(** Any two ratios x < 1 < y occur together: p gives (y - 1)/(y - x) to the first token and shares out the rest; the
    teacher has the ratio x there and y elsewhere. *)
Definition first_mass (x y : R) : R := (y - 1) / (y - x).

Definition two_ratios_p (n : nat) (x y : R) (a : nat) : R :=
  if Nat.eqb a 0 then first_mass x y else (1 - first_mass x y) / INR (n - 1).

Definition two_ratios_q (n : nat) (x y : R) (a : nat) : R := two_ratios_p n x y a * (if Nat.eqb a 0 then x else y).

Lemma first_mass_inside x y : 0 < x < 1 -> 1 < y -> 0 < first_mass x y < 1.
Proof.
  intros hx hy. unfold first_mass. split.
  - apply Rdiv_lt_0_compat; lra.
  - apply (Rmult_lt_reg_r (y - x)); [lra |]. unfold Rdiv. rewrite Rmult_assoc, Rinv_l; lra.
Qed.

(** A function that is g at the first token and h at all others has the sum g + (n - 1) h. *)
Lemma sum_first_rest n g h : (2 <= n)%nat -> (Σ a < n, (if Nat.eqb a 0 then g else h)) = g + INR (n - 1) * h.
Proof.
  intros two. rewrite (sum_split n _ 0) by lia. rewrite Nat.eqb_refl. f_equal.
  destruct n as [| [| m]]; [lia | lia |].
  assert (total : forall k, (Σ b < S k, (if Nat.eqb b 0 then 0 else if Nat.eqb b 0 then g else h)) = INR k * h).
  { induction k as [| k IH]; [simpl; ring |].
    change (sum (S (S k)) ?F) with (sum (S k) F + F (S k)). cbv beta. rewrite IH, S_INR. simpl. ring. }
  now rewrite total.
Qed.

Lemma two_ratios_positive n x y : (2 <= n)%nat -> 0 < x < 1 -> 1 < y -> positive n (two_ratios_p n x y).
Proof.
  intros two hx hy a _. assert (inside := first_mass_inside x y hx hy).
  assert (some : 0 < INR (n - 1)) by (apply lt_0_INR; lia).
  unfold two_ratios_p. destruct (Nat.eqb a 0); [lra |]. apply Rdiv_lt_0_compat; lra.
Qed.

Lemma two_ratios_sums n x y :
  (2 <= n)%nat -> 0 < x < 1 -> 1 < y ->
  (Σ a < n, two_ratios_p n x y a) = 1 /\ (Σ a < n, two_ratios_q n x y a) = 1.
Proof.
  intros two hx hy. assert (some : 0 < INR (n - 1)) by (apply lt_0_INR; lia). split.
  - unfold two_ratios_p. rewrite sum_first_rest by assumption. field. lra.
  - unfold two_ratios_q, two_ratios_p.
    rewrite (sum_ext n _ (fun a => if Nat.eqb a 0 then first_mass x y * x
                                   else (1 - first_mass x y) / INR (n - 1) * y)).
    + rewrite sum_first_rest by assumption. unfold first_mass. field. lra.
    + intros a _. now destruct (Nat.eqb a 0).
Qed.

(** Every distribution is a softmax row, with its logarithms as logits. *)
Lemma softmax_log n p a : distribution n p -> (a < n)%nat -> softmax n (fun b => log (p b)) a = p a.
Proof.
  intros [positive_p normalised] lt. unfold softmax.
  rewrite (sum_ext n _ (fun b => p b)) by (intros; apply exp_log; auto).
  rewrite normalised, exp_log by auto. field.
Qed.

Lemma same_at_two_ratios n f x y :
  (2 <= n)%nat -> (forall t, 0 < t -> t <> 1 -> ex_derive f t) -> unbiased n f ->
  0 < x < 1 -> 1 < y -> x * Derive f x = y * Derive f y.
Proof.
  intros two derive_f no_bias hx hy.
  destruct (two_ratios_sums n x y two hx hy) as [sum_p sum_q].
  assert (positive_p := two_ratios_positive n x y two hx hy).
  assert (inside := first_mass_inside x y hx hy).
  assert (some : 0 < INR (n - 1)) by (apply lt_0_INR; lia).
  set (p := two_ratios_p n x y) in *. set (q := two_ratios_q n x y) in *. set (z := fun b => log (p b)).
  assert (row : forall a, (a < n)%nat -> softmax n z a = p a) by (intros; now apply softmax_log).
  assert (ratio : forall a, (a < n)%nat -> u q (softmax n z) a = if Nat.eqb a 0 then x else y).
  { intros a lt. unfold u. rewrite row by assumption. unfold q, two_ratios_q. fold p.
    assert (0 < p a) by auto. field. lra. }
  assert (teacher : distribution n q).
  { split; [| exact sum_q]. intros a lt. unfold q, two_ratios_q. fold p.
    apply Rmult_lt_0_compat; [auto |]. destruct (Nat.eqb a 0); lra. }
  assert (never_one : forall b, (b < n)%nat -> q b <> softmax n z b).
  { intros b lt same. assert (one := ratio b lt). unfold u in one. rewrite same in one.
    assert (0 < softmax n z b) by (rewrite row; auto).
    unfold Rdiv in one. rewrite Rinv_r in one by lra. destruct (Nat.eqb b 0); lra. }
  assert (differentiable : forall b, (b < n)%nat -> ex_derive f (u q (softmax n z) b)).
  { intros b lt. rewrite ratio by assumption. apply derive_f; destruct (Nat.eqb b 0); lra. }
  assert (bias := softmax_bias n f q z 0 differentiable teacher ltac:(lia)). cbv zeta in bias.
  rewrite (no_bias q z 0%nat teacher never_one ltac:(lia)), Rminus_diag_eq in bias by reflexivity.
  rewrite (E_ext n _ _ (fun b => if Nat.eqb b 0 then x * Derive f x else y * Derive f y)) in bias.
  2: { intros b lt. rewrite ratio by assumption. now destruct (Nat.eqb b 0). }
  unfold E in bias.
  rewrite (sum_ext n _ (fun b => if Nat.eqb b 0 then first_mass x y * (x * Derive f x)
             else (1 - first_mass x y) / INR (n - 1) * (y * Derive f y))) in bias.
  2: { intros b lt. rewrite row by assumption. unfold p, two_ratios_p. now destruct (Nat.eqb b 0). }
  rewrite sum_first_rest, ratio, row in bias by lia. unfold p, two_ratios_p in bias. simpl in bias.
  set (k := x * Derive f x) in *. set (l := y * Derive f y) in *. set (m := first_mass x y) in *.
  assert (product : m * (1 - m) * (k - l) = 0).
  { rewrite bias. field. lra. }
  apply Rmult_integral in product. destruct product as [zero | zero]; [| lra].
  apply Rmult_integral in zero. lra.
Qed.

(** A function that is constant on the way from x to one, and continuous at one, has that value at one. *)
Lemma value_at_one (F : R -> R) (x : R) :
  x <> 1 -> continuous F 1 -> (forall r, 0 < r <= 1 -> F (1 + (x - 1) * r) = F x) -> F 1 = F x.
Proof.
  intros away continuous_F same.
  destruct (Req_dec (F 1) (F x)) as [| different]; [assumption | exfalso].
  assert (gap : 0 < Rabs (F x - F 1)) by (apply Rabs_pos_lt; lra).
  assert (distance : 0 < Rabs (x - 1)) by (apply Rabs_pos_lt; lra).
  destruct (proj1 (filterlim_locally F (F 1)) continuous_F (mkposreal _ gap)) as [δ near].
  set (r := Rmin 1 (δ / (2 * Rabs (x - 1)))).
  assert (small : 0 < δ / (2 * Rabs (x - 1))) by (apply Rdiv_lt_0_compat; [apply cond_pos | lra]).
  assert (inside : 0 < r <= 1) by (split; [apply Rmin_pos; lra | apply Rmin_l]).
  specialize (near (1 + (x - 1) * r)). rewrite same in near by assumption.
  unfold ball in near; simpl in near; unfold AbsRing_ball, abs, minus, plus, opp in near; simpl in near.
  apply (Rlt_irrefl (Rabs (F x - F 1))). apply near.
  replace (1 + (x - 1) * r + - (1)) with ((x - 1) * r) by ring.
  rewrite Rabs_mult, (Rabs_pos_eq r) by lra.
  apply Rle_lt_trans with (Rabs (x - 1) * (δ / (2 * Rabs (x - 1)))).
  - apply Rmult_le_compat_l; [lra | apply Rmin_r].
  - replace (Rabs (x - 1) * (δ / (2 * Rabs (x - 1)))) with (δ / 2) by (field; lra).
    assert (0 < δ) by apply cond_pos. lra.
Qed.

(** The step of integration: u f'(u) = c away from one, and f continuous there, make f(u) = c log u + f(1). *)
Lemma logarithm_from_slope (f : R -> R) (c x : R) :
  (forall t, 0 < t -> t <> 1 -> ex_derive f t) -> continuous f 1 ->
  (forall t, 0 < t -> t <> 1 -> t * Derive f t = c) ->
  0 < x -> f x = c * log x + f 1.
Proof.
  intros derive_f continuous_f constant hx.
  destruct (Req_dec x 1) as [-> | away]; [rewrite log_1; ring |].
  set (F := fun t => f t - c * log t).
  assert (flat : forall t, 0 < t -> t <> 1 -> is_derive F t 0).
  { intros t ht not_one. eapply derive_value.
    - apply derive_minus; [apply Derive_correct; auto | apply derive_scale, log_derive; assumption].
    - cbv beta. change (Derive (fun y : R => f y) t) with (Derive f t).
      rewrite <- (constant t ht not_one). field. lra. }
  assert (same : F 1 = F x).
  { apply value_at_one; [assumption | |].
    - apply (continuous_minus (V := R_NormedModule)); [assumption |].
      eapply derive_continuous, derive_scale, log_derive. lra.
    - intros r inside. apply constant_between. intros t between. apply flat.
      + apply (between_positive x (1 + (x - 1) * r)); [lra | nra | tauto].
      + intros ->. revert between. unfold Rmin, Rmax.
        destruct (Rle_dec x (1 + (x - 1) * r)); intros [low high]; apply away; nra. }
  unfold F in same. rewrite log_1 in same. lra.
Qed.

Theorem T2_only_the_reverse_KL_holds : T2_only_the_reverse_KL.
Proof.
  intros n f two derive_f continuous_f.
  assert (to_constant : unbiased n f -> exists c, forall x, 0 < x -> x <> 1 -> x * Derive f x = c).
  { intros no_bias. exists (/ 2 * Derive f (/ 2)). intros x hx away.
    assert (halves : / 2 * Derive f (/ 2) = 2 * Derive f 2) by (apply (same_at_two_ratios n); auto; lra).
    destruct (Rlt_dec x 1).
    - rewrite halves. apply (same_at_two_ratios n); auto; lra.
    - symmetry. apply (same_at_two_ratios n); auto; lra. }
  assert (to_log : (exists c, forall x, 0 < x -> x <> 1 -> x * Derive f x = c) ->
                   exists c d, forall x, 0 < x -> f x = - c * log x + d).
  { intros [c constant]. exists (- c), (f 1). intros x hx. rewrite Ropp_involutive.
    now apply logarithm_from_slope. }
  assert (to_unbiased : (exists c d, forall x, 0 < x -> f x = - c * log x + d) -> unbiased n f).
  { intros [c [d is_log]] q z a teacher _ lt. apply Rminus_diag_uniq.
    assert (positive_u : forall b, (b < n)%nat -> 0 < u q (softmax n z) b).
    { intros b lt_b. apply Rdiv_lt_0_compat; [now apply teacher | now apply softmax_positive]. }
    rewrite softmax_bias; [| | assumption | assumption].
    - cbv zeta.
      rewrite <- (softmax_direction n z a (fun b => u q (softmax n z) b * Derive f (u q (softmax n z) b)) lt).
      assert (zero := T2_reverse_KL_has_no_bias_holds n f c d q (softmax_of_logit n z a) (z a) is_log
                        (proj1 teacher) (softmax_student n z a lt)).
      now rewrite softmax_of_its_logit in zero.
    - intros b lt_b. eexists. now apply (logarithm_slope f c d), positive_u. }
  split; split; auto.
Qed.

(** * Proofs: the twins *)

(** χ² has u f'(u) = 2 u (u - 1), which is not constant. *)
Theorem T2_twin_never_biased_is_false : ~ T2_twin_never_biased.
Proof.
  intros twin.
  destruct (T2_only_the_reverse_KL_holds 2%nat chi2) as [constant _]; [lia | | |].
  - intros x hx _. now apply chi2_differentiable.
  - eapply derive_continuous, chi2_derive.
  - destruct (proj1 constant (twin 2%nat chi2 ltac:(lia) chi2_differentiable)) as [c same].
    assert (at_two := same 2 ltac:(lra) ltac:(lra)). assert (at_three := same 3 ltac:(lra) ltac:(lra)).
    rewrite chi2_slope in at_two, at_three. lra.
Qed.

Theorem T2_twin_sign_flipped_is_false : ~ T2_twin_sign_flipped.
Proof.
  intros twin.
  assert (false := twin 2%nat chi2 quarter even 0%nat chi2_differentiable quarter_distribution ltac:(lia)).
  assert (differentiable : forall b, (b < 2)%nat -> ex_derive chi2 (u quarter (softmax 2 even) b)).
  { intros b _. eexists. apply chi2_derive. }
  assert (bias := softmax_bias 2 chi2 quarter even 0 differentiable quarter_distribution ltac:(lia)).
  cbv zeta in bias. rewrite false in bias.
  rewrite (softmax_direction 2 even 0
    (fun b => u quarter (softmax 2 even) b * Derive chi2 (u quarter (softmax 2 even) b))) in bias by lia.
  revert bias. unfold E, u. simpl. rewrite !chi2_slope, !even_half.
  unfold quarter. simpl. lra.
Qed.

(** f(u) = |u - 1|^(3/2), with the slope 3/2 (√(u - 1)₊ - √(1 - u)₊), is differentiable once and no more. *)
Definition three_halves (x : R) : R := Rabs (x - 1) * sqrt (Rabs (x - 1)).

Definition three_halves_slope (x : R) : R :=
  3 / 2 * (sqrt ((Rabs (x - 1) + (x - 1)) / 2) - sqrt ((Rabs (x - 1) - (x - 1)) / 2)).

(** With a = |x - 1| and b = |y - 1|: a^(3/2) + 3/2 √a (b - a) ≤ b^(3/2). *)
Lemma three_halves_roots a b : 0 <= a -> 0 <= b -> a * sqrt a + 3 / 2 * sqrt a * (b - a) <= b * sqrt b.
Proof.
  intros ha hb. assert (sa := sqrt_sqrt a ha). assert (sb := sqrt_sqrt b hb).
  assert (pa := sqrt_pos a). assert (pb := sqrt_pos b).
  set (r := sqrt a) in *. set (s := sqrt b) in *. rewrite <- sa, <- sb.
  assert (0 <= (s - r) * (s - r) * (s + r / 2)) by (apply Rmult_le_pos; [apply Rle_0_sqr | lra]). lra.
Qed.

Lemma three_halves_tangent x y : three_halves x + three_halves_slope x * (y - x) <= three_halves y.
Proof.
  assert (roots := three_halves_roots (Rabs (x - 1)) (Rabs (y - 1)) (Rabs_pos _) (Rabs_pos _)).
  apply Rle_trans with (2 := roots). unfold three_halves, three_halves_slope. apply Rplus_le_compat_l.
  assert (root := sqrt_pos (Rabs (x - 1))).
  assert (right := Rle_abs (y - 1)). assert (left := Rle_abs (- (y - 1))). rewrite Rabs_Ropp in left.
  unfold Rabs at 1 2. destruct (Rcase_abs (x - 1)) as [below | above].
  - rewrite Rabs_left in * by assumption.
    replace ((- (x - 1) + (x - 1)) / 2) with 0 by field.
    replace ((- (x - 1) - (x - 1)) / 2) with (- (x - 1)) by field. rewrite sqrt_0. nra.
  - rewrite Rabs_right in * by assumption.
    replace ((x - 1 + (x - 1)) / 2) with (x - 1) by field.
    replace ((x - 1 - (x - 1)) / 2) with 0 by field. rewrite sqrt_0. nra.
Qed.

Lemma three_halves_slope_continuous x : continuous three_halves_slope x.
Proof.
  assert (line : continuous (fun y : R => y - 1) x).
  { eapply derive_continuous. apply derive_minus; [apply derive_id | apply derive_const]. }
  assert (size : continuous (fun y : R => Rabs (y - 1)) x) by exact (continuous_Rabs_comp (fun y => y - 1) x line).
  assert (half : forall g : R -> R, continuous g x -> continuous (fun y => g y / 2) x).
  { intros g here. exact (continuous_mult (K := R_AbsRing) g (fun _ => / 2) x here (continuous_const _ _)). }
  unfold three_halves_slope.
  apply (continuous_mult (K := R_AbsRing) (fun _ => 3 / 2)); [apply continuous_const |].
  apply (continuous_minus (V := R_NormedModule)); apply continuous_sqrt_comp, half.
  - exact (continuous_plus (V := R_NormedModule) _ _ x size line).
  - exact (continuous_minus (V := R_NormedModule) _ _ x size line).
Qed.

Lemma three_halves_derive x : 0 < x -> is_derive three_halves x (three_halves_slope x).
Proof.
  intros hx. apply (tangents_derive three_halves three_halves_slope x); [| assumption |].
  - intros y z _ _. apply three_halves_tangent.
  - apply three_halves_slope_continuous.
Qed.

(** Two tokens with the probabilities 1/2 + t and 1/2 - t, and the teacher at t = 0. *)
Definition tilted (t : R) (a : nat) : R := if Nat.eqb a 0 then 1 / 2 + t else 1 / 2 - t.

Definition half (_ : nat) : R := 1 / 2.

Definition tilt (a : nat) : R := if Nat.eqb a 0 then 1 else - (1).

Lemma tilted_derive t a : is_derive (fun r : R => tilted r a) t (tilt a).
Proof.
  unfold tilted, tilt. destruct (Nat.eqb a 0); eapply derive_value.
  - apply derive_plus; [apply derive_const | apply derive_id].
  - ring.
  - apply derive_minus; [apply derive_const | apply derive_id].
  - ring.
Qed.

Lemma tilted_student t : - (1 / 2) < t < 1 / 2 -> student 2 tilted t.
Proof.
  intros inside. repeat split.
  - intros a _. unfold tilted. destruct (Nat.eqb a 0); lra.
  - intros a _. eexists. apply tilted_derive.
  - apply filter_forall. intros r. unfold tilted. simpl. field.
Qed.

(** There the divergence is at least t^(3/2)/2, for t > 0. *)
Lemma tilted_divergence t : 0 < t < 1 / 2 -> 1 / 2 * (t * sqrt t) <= D 2 three_halves half (tilted t).
Proof.
  intros inside. unfold D, E, u, tilted, half. simpl.
  assert (nonneg : forall x, 0 <= three_halves x).
  { intros x. apply Rmult_le_pos; [apply Rabs_pos | apply sqrt_pos]. }
  assert (other : 0 <= (1 / 2 - t) * three_halves (1 / 2 / (1 / 2 - t))) by (apply Rmult_le_pos; [lra | apply nonneg]).
  assert (first : t * sqrt t <= three_halves (1 / 2 / (1 / 2 + t))).
  { unfold three_halves. replace (1 / 2 / (1 / 2 + t) - 1) with (- (t / (1 / 2 + t))) by (field; lra).
    assert (above : t <= t / (1 / 2 + t)).
    { apply (Rmult_le_reg_r (1 / 2 + t)); [lra |]. unfold Rdiv at 2. rewrite Rmult_assoc, Rinv_l; nra. }
    rewrite Rabs_Ropp, Rabs_pos_eq by lra.
    apply Rmult_le_compat; [lra | apply sqrt_pos | exact above | apply sqrt_le_1; lra]. }
  assert (0 <= t * sqrt t) by (apply Rmult_le_pos; [lra | apply sqrt_pos]). nra.
Qed.

Theorem T2_twin_remainder_is_false : ~ T2_twin_remainder.
Proof.
  intros twin.
  assert (near_zero := locally_between (- (1 / 2)) 0 (1 / 2) ltac:(lra)).
  assert (claim : second_order_remainder 2 three_halves); [apply twin |].
  - apply (tangents_convex _ three_halves_slope). intros x y _ _. apply three_halves_tangent.
  - intros x hx. eexists. now apply three_halves_derive.
  - unfold three_halves. rewrite Rminus_diag_eq, Rabs_R0 by reflexivity. ring.
  - destruct (claim half tilted 0) as [K bound].
    { intros a _. unfold half. lra. }
    { revert near_zero. apply filter_imp. apply tilted_student. }
    { apply filter_forall. intros t a _. exists 0.
      apply (derive_ext (fun _ => tilt a)); [| apply derive_const].
      intros r. symmetry. apply derivative, tilted_derive. }
    (* At the teacher the weight and the bias are zero, and so is the frozen value. *)
    assert (ratio : forall a, u half (tilted 0) a = 1).
    { intros a. unfold u, half, tilted. destruct (Nat.eqb a 0); field. }
    assert (root : three_halves 1 = 0).
    { unfold three_halves. rewrite Rminus_diag_eq, Rabs_R0 by reflexivity. ring. }
    assert (flat : Derive three_halves 1 = 0).
    { rewrite (derivative _ _ _ (three_halves_derive 1 ltac:(lra))). unfold three_halves_slope.
      replace (Rabs (1 - 1)) with 0 by (rewrite Rminus_diag_eq, Rabs_R0; reflexivity).
      replace ((0 + (1 - 1)) / 2) with 0 by field. replace ((0 - (1 - 1)) / 2) with 0 by field. ring. }
    assert (no_bias : E 2 (tilted 0) (fun a => u half (tilted 0) a * Derive three_halves (u half (tilted 0) a)
                                              * score tilted 0 a) = 0).
    { unfold E. apply sum_zero. intros a _. rewrite ratio, flat. ring. }
    assert (no_value : forall t, frozen 2 three_halves half (tilted 0) (tilted t) = 0).
    { intros t. unfold frozen, E. apply sum_zero. intros a _. rewrite ratio, root. ring. }
    cbv zeta in bound. rewrite no_bias in bound.
    destruct (filter_and _ _ bound near_zero) as [δ near].
    (* At t = x² the bound reads x³/2 ≤ K x⁴. *)
    set (x := Rmin (1 / 2) (Rmin (δ / 2) (/ (4 * (Rabs K + 1))))).
    assert (hδ : 0 < δ) by apply cond_pos. assert (hK := Rabs_pos K).
    assert (hx : 0 < x).
    { repeat apply Rmin_pos; [lra | lra | apply Rinv_0_lt_compat; lra]. }
    assert (x <= 1 / 2) by apply Rmin_l.
    assert (x <= δ / 2) by (eapply Rle_trans; [apply Rmin_r | apply Rmin_l]).
    assert (small : x <= / (4 * (Rabs K + 1))) by (eapply Rle_trans; [apply Rmin_r | apply Rmin_r]).
    destruct (near (x * x)) as [value inside].
    { unfold ball; simpl; unfold AbsRing_ball, abs, minus, plus, opp; simpl.
      rewrite Ropp_0, Rplus_0_r, Rabs_pos_eq by nra. nra. }
    rewrite no_value in value.
    assert (below := tilted_divergence (x * x) ltac:(nra)). rewrite sqrt_square in below by lra.
    apply (Rmult_le_compat_r (4 * (Rabs K + 1))) in small; [| lra]. rewrite Rinv_l in small by lra.
    assert (K <= Rabs K) by apply Rle_abs.
    rewrite Rmult_0_l, Rminus_0_r, Rminus_0_l, Rabs_Ropp in value.
    assert (D 2 three_halves half (tilted (x * x)) <= K * (x * x - 0) ^ 2).
    { eapply Rle_trans; [apply Rle_abs | exact value]. }
    assert (cube : 0 < x * x * x) by (repeat apply Rmult_lt_0_compat; assumption).
    assert (K * x <= 1 / 4) by nra. nra.
Qed.
