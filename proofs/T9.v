(** T9, truncated terms (docs/theory/t9.md); its case of the reverse KL is also called T9 b.

      min_p Σ_{a ∈ S} p_a f(q_a/p_a) is attained at p = q/max(u₀, q(S)) on S, where w_f(u₀) = 0;
      for the reverse KL that is p = q/e, with the value - q(S)/e. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence Convex.
Open Scope R_scope.

(** * Statements *)

(** A sum over a set S of tokens, such as q(S), the mass of the teacher on it. *)
Definition sum_on (n : nat) (S : nat -> bool) (g : nat -> R) : R := Σ a < n, (if S a then g a else 0).

(** What a student p may put on S: some mass on each of its tokens, and not more than one in all. The rest of its mass,
    if any, lies outside S, where it does not enter. *)
Definition may_put (n : nat) (S : nat -> bool) (p : nat -> R) : Prop :=
  (forall a, (a < n)%nat -> S a = true -> 0 < p a) /\ sum_on n S p <= 1.

(** The truncated divergence Σ_{a ∈ S} p_a f(q_a/p_a). *)
Definition truncated (n : nat) (S : nat -> bool) (f : R -> R) (q p : nat -> R) : R :=
  sum_on n S (fun a => p a * f (u q p a)).

(** The root u₀ of the weight; it is zero where the weight is positive throughout. *)
Definition root_of_weight (f : R -> R) (u0 : R) : Prop :=
  (0 < u0 /\ w f u0 = 0) \/ (u0 = 0 /\ forall x, 0 < x -> 0 < w f x).

(** For every convex f that is differentiable, and a set S on which the teacher has some mass, p = q/max(u₀, q(S)) on S
    is a minimiser. *)
Definition T9_minimiser : Prop :=
  forall (n : nat) (S : nat -> bool) (f : R -> R) (q : nat -> R) (u0 : R),
  convex f -> differentiable_above_zero f -> root_of_weight f u0 ->
  (forall a, (a < n)%nat -> S a = true -> 0 < q a) ->
  0 < sum_on n S q ->
  let minimiser := fun a => q a / Rmax u0 (sum_on n S q) in
  may_put n S minimiser /\
  forall p, may_put n S p -> truncated n S f q minimiser <= truncated n S f q p.

(** If f is strictly convex, no other student attains the minimum. *)
Definition T9_only_minimiser : Prop :=
  forall (n : nat) (S : nat -> bool) (f : R -> R) (q : nat -> R) (u0 : R),
  strictly_convex f -> differentiable_above_zero f -> root_of_weight f u0 ->
  (forall a, (a < n)%nat -> S a = true -> 0 < q a) ->
  0 < sum_on n S q ->
  let minimiser := fun a => q a / Rmax u0 (sum_on n S q) in
  forall p, may_put n S p -> truncated n S f q p <= truncated n S f q minimiser ->
  forall a, (a < n)%nat -> S a = true -> p a = minimiser a.

(** The truncated reverse KL, Σ_{a ∈ S} p_a log(p_a/q_a). *)
Definition truncated_reverse_KL (n : nat) (S : nat -> bool) (q p : nat -> R) : R :=
  sum_on n S (fun a => p a * log (p a / q a)).

(** T9 b. The truncated reverse KL is at least - q(S)/e for all p_a ≥ 0, and equal to it exactly at p = q/e on S: the
    mass 1 - q(S)/e is pushed out of S. *)
Definition T9_reverse_KL : Prop :=
  forall (n : nat) (S : nat -> bool) (q p : nat -> R),
  (forall a, (a < n)%nat -> S a = true -> 0 < q a) ->
  (forall a, (a < n)%nat -> S a = true -> 0 <= p a) ->
  let e := exp 1 in
  - sum_on n S q / e <= truncated_reverse_KL n S q p /\
  (truncated_reverse_KL n S q p = - sum_on n S q / e <->
   forall a, (a < n)%nat -> S a = true -> p a = q a / e).

(** A false twin: the teacher minimises the truncated reverse KL. *)
Definition T9_twin_teacher_is_the_minimiser : Prop :=
  forall (n : nat) (S : nat -> bool) (q p : nat -> R),
  distribution n q -> may_put n S p ->
  truncated_reverse_KL n S q q <= truncated_reverse_KL n S q p.

(** A false twin: so does the teacher renormalised on S, which keeps all mass in it. *)
Definition T9_twin_renormalised_teacher : Prop :=
  forall (n : nat) (S : nat -> bool) (q p : nat -> R),
  distribution n q -> may_put n S p -> 0 < sum_on n S q ->
  truncated_reverse_KL n S q (fun a => q a / sum_on n S q) <= truncated_reverse_KL n S q p.

(** * Proofs: any f *)

Lemma sum_on_le n S g h :
  (forall a, (a < n)%nat -> S a = true -> g a <= h a) -> sum_on n S g <= sum_on n S h.
Proof. intros le. apply sum_le. intros a lt. destruct (S a) eqn:inside; [auto | lra]. Qed.

Lemma sum_on_ext n S g h :
  (forall a, (a < n)%nat -> S a = true -> g a = h a) -> sum_on n S g = sum_on n S h.
Proof. intros same. apply sum_ext. intros a lt. destruct (S a) eqn:inside; [auto | reflexivity]. Qed.

Lemma sum_on_scale n S c g : sum_on n S (fun a => c * g a) = c * sum_on n S g.
Proof. unfold sum_on. rewrite <- sum_scale. apply sum_ext. intros a _. destruct (S a); ring. Qed.

Lemma sum_on_plus n S g h : sum_on n S (fun a => g a + h a) = sum_on n S g + sum_on n S h.
Proof. unfold sum_on. rewrite <- sum_plus. apply sum_ext. intros a _. destruct (S a); ring. Qed.

(** Terms that are at least as large, and not larger in sum, are equal. *)
Lemma sum_on_equal n S g h :
  (forall a, (a < n)%nat -> S a = true -> g a <= h a) -> sum_on n S h <= sum_on n S g ->
  forall a, (a < n)%nat -> S a = true -> h a = g a.
Proof.
  intros le sum_le a lt inside.
  assert (zero : sum_on n S (fun b => h b - g b) = 0).
  { assert (sums := sum_on_le n S g h le).
    replace (sum_on n S (fun b => h b - g b)) with (sum_on n S h - sum_on n S g); [lra |].
    unfold sum_on. rewrite <- sum_minus. apply sum_ext. intros b _. destruct (S b); ring. }
  assert (nonneg : forall b, (b < n)%nat -> 0 <= (if S b then h b - g b else 0)).
  { intros b lt_b. destruct (S b) eqn:inside_b; [specialize (le b lt_b inside_b); lra | lra]. }
  assert (term := sum_zero_terms n _ nonneg zero a lt). cbv beta in term.
  rewrite inside in term. lra.
Qed.

(** The weight of a convex f does not decrease. *)
Lemma weight_non_decreasing f x y :
  convex f -> differentiable_above_zero f -> 0 < x -> x <= y -> w f x <= w f y.
Proof.
  intros convex_f derive_f hx le. assert (hy : 0 < y) by lra.
  assert (at_x := Derive_correct f x (derive_f x hx)). assert (at_y := Derive_correct f y (derive_f y hy)).
  assert (tangent := convex_tangent f y _ x convex_f hy hx at_y).
  assert (slopes := convex_slopes f x y _ _ convex_f hx le at_x at_y).
  unfold w. nra.
Qed.

(** One token: p f(q/p), less than its Lagrange term, lies above its value at p = q/v. *)
Lemma one_term f q p v :
  convex f -> differentiable_above_zero f -> 0 < q -> 0 < p -> 0 < v ->
  q / v * f v - w f v * (p - q / v) <= p * f (q / p).
Proof.
  intros convex_f derive_f hq hp hv. assert (hu : 0 < q / p) by now apply Rdiv_lt_0_compat.
  assert (tangent := convex_tangent f v _ (q / p) convex_f hv hu (Derive_correct f v (derive_f v hv))).
  apply (Rmult_le_compat_l p) in tangent; [| lra].
  replace (p * (f v + Derive f v * (q / p - v))) with (q / v * f v - w f v * (p - q / v)) in tangent; [exact tangent |].
  unfold w. field. lra.
Qed.

Lemma one_term_strict f q p v :
  strictly_convex f -> differentiable_above_zero f -> 0 < q -> 0 < p -> 0 < v -> p <> q / v ->
  q / v * f v - w f v * (p - q / v) < p * f (q / p).
Proof.
  intros strict derive_f hq hp hv different. assert (hu : 0 < q / p) by now apply Rdiv_lt_0_compat.
  assert (v <> q / p) by (intros same; apply different; rewrite same; field; lra).
  assert (tangent := strictly_convex_tangent f v _ (q / p) strict hv hu H (Derive_correct f v (derive_f v hv))).
  apply (Rmult_lt_compat_l p) in tangent; [| lra].
  replace (p * (f v + Derive f v * (q / p - v))) with (q / v * f v - w f v * (p - q / v)) in tangent; [exact tangent |].
  unfold w. field. lra.
Qed.

(** With v = max(u₀, q(S)) the multiplier w_f(v) is not negative, and zero unless S gets all mass. *)
Lemma multiplier f u0 m :
  convex f -> differentiable_above_zero f -> root_of_weight f u0 -> 0 < m ->
  let v := Rmax u0 m in 0 < v /\ m <= v /\ 0 <= w f v /\ (w f v = 0 \/ v = m).
Proof.
  intros convex_f derive_f root hm v.
  assert (hv : 0 < v) by (apply Rlt_le_trans with m; [assumption | apply Rmax_r]).
  split; [exact hv | split; [apply Rmax_r |]].
  destruct root as [[positive zero] | [-> above]].
  - split.
    + rewrite <- zero. apply weight_non_decreasing; auto. apply Rmax_l.
    + unfold v, Rmax. destruct (Rle_dec u0 m); [now right | now left].
  - split; [now apply Rlt_le, above | right]. apply Rmax_right. lra.
Qed.

Lemma minimiser_allowed n S q v :
  (forall a, (a < n)%nat -> S a = true -> 0 < q a) -> 0 < v -> sum_on n S q <= v ->
  may_put n S (fun a => q a / v).
Proof.
  intros teacher hv le. split; [intros a lt inside; apply Rdiv_lt_0_compat; auto |].
  rewrite (sum_on_ext n S _ (fun a => / v * q a)) by (intros; unfold Rdiv; ring).
  rewrite sum_on_scale. apply (Rmult_le_reg_l v); [assumption |].
  rewrite <- Rmult_assoc, Rinv_r by lra. lra.
Qed.

(** The Lagrange terms of all tokens of S together do not help. *)
Lemma lagrange n S f q p v :
  (forall a, (a < n)%nat -> S a = true -> 0 < q a) -> may_put n S p -> 0 < v -> 0 <= w f v ->
  w f v = 0 \/ v = sum_on n S q -> sum_on n S q <= v ->
  truncated n S f q (fun a => q a / v) <= sum_on n S (fun a => q a / v * f v - w f v * (p a - q a / v)).
Proof.
  intros teacher [_ mass] hv multiplier_pos cases le.
  rewrite (sum_on_ext n S _ (fun a => q a / v * f v + w f v * (/ v * q a + - 1 * p a))).
  2: { intros. unfold Rdiv. ring. }
  rewrite sum_on_plus, sum_on_scale, sum_on_plus, !sum_on_scale.
  replace (truncated n S f q (fun a => q a / v)) with (sum_on n S (fun a => q a / v * f v)).
  - destruct cases as [-> | same]; [lra |].
    replace (/ v * sum_on n S q) with 1 by (rewrite <- same; field; lra).
    assert (0 <= w f v * (1 + - 1 * sum_on n S p)) by (apply Rmult_le_pos; lra). lra.
  - apply sum_on_ext. intros a lt inside. unfold u.
    assert (0 < q a) by auto. replace (q a / (q a / v)) with v by (field; lra). reflexivity.
Qed.

Theorem T9_minimiser_holds : T9_minimiser.
Proof.
  intros n S f q u0 convex_f derive_f root teacher some minimiser.
  destruct (multiplier f u0 _ convex_f derive_f root some) as [hv [le [positive cases]]].
  split; [now apply minimiser_allowed |]. intros p allowed.
  eapply Rle_trans; [apply (lagrange n S f q p); eassumption |].
  apply sum_on_le. intros a lt inside. apply one_term; auto. now apply allowed.
Qed.

Theorem T9_only_minimiser_holds : T9_only_minimiser.
Proof.
  intros n S f q u0 strict derive_f root teacher some minimiser p allowed lowest a lt inside.
  assert (convex_f := strictly_convex_convex f strict).
  destruct (multiplier f u0 _ convex_f derive_f root some) as [hv [le [positive cases]]].
  fold (minimiser a). set (v := Rmax u0 (sum_on n S q)) in *.
  destruct (Req_dec (p a) (q a / v)) as [| different]; [assumption | exfalso].
  assert (strictly := one_term_strict f (q a) (p a) v strict derive_f (teacher a lt inside)
                        (proj1 allowed a lt inside) hv different).
  assert (bound := lagrange n S f q p v teacher allowed hv positive cases le).
  assert (same : p a * f (u q p a) = q a / v * f v - w f v * (p a - q a / v)).
  { apply (sum_on_equal n S (fun b => q b / v * f v - w f v * (p b - q b / v)) (fun b => p b * f (u q p b)));
      [| unfold truncated, minimiser in *; lra | assumption | assumption].
    intros b lt_b inside_b. apply one_term; auto. now apply allowed. }
  unfold u in same. lra.
Qed.

(** * Proofs: the reverse KL *)

(** p log(p/q) + q/e = (q/e) (x log x - x + 1) with x = e p/q, and log x ≥ 1 - 1/x. *)
Lemma one_log_term p q : 0 < q -> 0 <= p -> - (q / exp 1) <= p * log (p / q).
Proof.
  intros hq [hp | <-]; assert (he := exp_pos 1).
  - assert (hx : 0 < q / (exp 1 * p)) by (apply Rdiv_lt_0_compat; [assumption | now apply Rmult_lt_0_compat]).
    assert (bound := log_le _ hx).
    replace (p / q) with (/ (exp 1 * (q / (exp 1 * p)))) by (field; lra).
    rewrite log_inverse, log_mult, log_exp by (assumption || now apply Rmult_lt_0_compat).
    apply (Rmult_le_compat_l p) in bound; [| lra].
    replace (p * (q / (exp 1 * p) - 1)) with (q / exp 1 - p) in bound by (field; lra). lra.
  - rewrite Rmult_0_l. assert (0 < q / exp 1) by now apply Rdiv_lt_0_compat. lra.
Qed.

Lemma one_log_term_strict p q : 0 < q -> 0 <= p -> p <> q / exp 1 -> - (q / exp 1) < p * log (p / q).
Proof.
  intros hq [hp | <-] different; assert (he := exp_pos 1).
  - assert (hx : 0 < q / (exp 1 * p)) by (apply Rdiv_lt_0_compat; [assumption | now apply Rmult_lt_0_compat]).
    assert (away : q / (exp 1 * p) <> 1).
    { intros one. apply different. apply (f_equal (fun x => x * p)) in one.
      replace (q / (exp 1 * p) * p) with (q / exp 1) in one by (field; lra). lra. }
    assert (bound := log_lt _ hx away).
    replace (p / q) with (/ (exp 1 * (q / (exp 1 * p)))) by (field; lra).
    rewrite log_inverse, log_mult, log_exp by (assumption || now apply Rmult_lt_0_compat).
    apply (Rmult_lt_compat_l p) in bound; [| lra].
    replace (p * (q / (exp 1 * p) - 1)) with (q / exp 1 - p) in bound by (field; lra). lra.
  - rewrite Rmult_0_l. assert (0 < q / exp 1) by now apply Rdiv_lt_0_compat. lra.
Qed.

Lemma lowest_value n S q : sum_on n S (fun a => - (q a / exp 1)) = - sum_on n S q / exp 1.
Proof.
  rewrite (sum_on_ext n S _ (fun a => - / exp 1 * q a)) by (intros; unfold Rdiv; ring).
  rewrite sum_on_scale. unfold Rdiv. ring.
Qed.

Theorem T9_reverse_KL_holds : T9_reverse_KL.
Proof.
  intros n S q p teacher student_p e. unfold e. rewrite <- lowest_value.
  assert (each : forall a, (a < n)%nat -> S a = true -> - (q a / exp 1) <= p a * log (p a / q a)).
  { intros a lt inside. apply one_log_term; auto. }
  split; [now apply sum_on_le |]. split.
  - intros same a lt inside.
    destruct (Req_dec (p a) (q a / exp 1)) as [| different]; [assumption | exfalso].
    assert (strictly := one_log_term_strict (p a) (q a) (teacher a lt inside) (student_p a lt inside) different).
    assert (equal := sum_on_equal n S _ _ each (Req_le _ _ same) a lt inside). cbv beta in equal. lra.
  - intros same. apply sum_on_ext. intros a lt inside.
    assert (hq := teacher a lt inside). assert (he := exp_pos 1).
    rewrite same by assumption. replace (q a / exp 1 / q a) with (/ exp 1) by (field; lra).
    rewrite log_inverse, log_exp by assumption. ring.
Qed.

(** * Proofs: the twins *)

(** Of two tokens the first is in S, and the teacher gives it a quarter. *)
Definition first (a : nat) : bool := Nat.eqb a 0.

Definition one_in_four (a : nat) : R := if Nat.eqb a 0 then 1 / 4 else 3 / 4.

Lemma one_in_four_distribution : distribution 2 one_in_four.
Proof.
  split; [| unfold one_in_four; simpl; lra].
  intros a _. unfold one_in_four. destruct (Nat.eqb a 0); lra.
Qed.

(** There q/e has the value - 1/(4 e), the teacher the value zero, and the renormalised teacher log 4. *)
Lemma e_above_two : 2 <= exp 1.
Proof. assert (bound := log_le (exp 1) (exp_pos 1)). rewrite log_exp in bound. lra. Qed.

Lemma lowest_allowed : may_put 2 first (fun a => one_in_four a / exp 1).
Proof.
  assert (bound := e_above_two). apply minimiser_allowed; [| lra |].
  - intros a lt _. now apply one_in_four_distribution.
  - unfold sum_on, first, one_in_four. simpl. lra.
Qed.

Lemma lowest_negative : truncated_reverse_KL 2 first one_in_four (fun a => one_in_four a / exp 1) < 0.
Proof.
  assert (bound := e_above_two). unfold truncated_reverse_KL, sum_on, first, one_in_four. simpl.
  replace (1 / 4 / exp 1 / (1 / 4)) with (/ exp 1) by (field; lra).
  rewrite log_inverse, log_exp by lra.
  assert (0 < 1 / 4 / exp 1) by (apply Rdiv_lt_0_compat; lra). lra.
Qed.

Theorem T9_twin_teacher_is_the_minimiser_is_false : ~ T9_twin_teacher_is_the_minimiser.
Proof.
  intros twin. assert (false := twin 2%nat first _ _ one_in_four_distribution lowest_allowed).
  assert (lowest := lowest_negative).
  assert (zero : truncated_reverse_KL 2 first one_in_four one_in_four = 0).
  { unfold truncated_reverse_KL, sum_on, first, one_in_four. simpl.
    replace (1 / 4 / (1 / 4)) with 1 by field. rewrite log_1. ring. }
  lra.
Qed.

Theorem T9_twin_renormalised_teacher_is_false : ~ T9_twin_renormalised_teacher.
Proof.
  intros twin.
  assert (mass : sum_on 2 first one_in_four = 1 / 4) by (unfold sum_on, first, one_in_four; simpl; ring).
  assert (false := twin 2%nat first _ _ one_in_four_distribution lowest_allowed ltac:(lra)).
  assert (lowest := lowest_negative).
  assert (above : 0 < truncated_reverse_KL 2 first one_in_four (fun a => one_in_four a / sum_on 2 first one_in_four)).
  { rewrite mass. unfold truncated_reverse_KL, sum_on, first, one_in_four. simpl.
    replace (1 / 4 / (1 / 4) / (1 / 4)) with 4 by field.
    assert (positive := log_positive 4 ltac:(lra)). lra. }
  lra.
Qed.
