(** T14, truncated and masked ratios (docs/theory/t14.md).

      E_μ[min(ρ, C) w s] = E_p[min(1, C/ρ) w s],   E_μ[1[α ≤ ρ ≤ β] ρ w s] = E_p[1[α ≤ ρ ≤ β] w s],   ρ = p/μ;
      with the factor F that is left on the weight, there is no bias exactly if (1 - F) w is constant;
      a truncated ratio keeps the teacher fixed, whatever the sampler μ, exactly if w_f(1) = 0. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence T1.
Open Scope R_scope.

(** * Statements *)

(** The importance ratio of student over sampler. *)
Definition ρ (p μ : nat -> R) (a : nat) : R := p a / μ a.

(** 1[α ≤ x ≤ β]. *)
Definition kept (α β x : R) : R :=
  if Rle_dec α x then if Rle_dec x β then 1 else 0 else 0.

(** The score of each token in the logit a of a softmax row. *)
Definition s (n : nat) (z : nat -> R) (a : nat) : nat -> R := score (softmax_of_logit n z a) (z a).

(** For any weights A and any scores s: E_μ[min(ρ, C) A s] = E_p[min(1, C/ρ) A s]. *)
Definition T14_truncation : Prop :=
  forall (n : nat) (p μ A s : nat -> R) (C : R),
  positive n p -> positive n μ ->
  E n μ (fun a => Rmin (ρ p μ a) C * A a * s a) = E n p (fun a => Rmin 1 (C / ρ p μ a) * A a * s a).

(** Its distance from the mean without truncation is E_μ[min(ρ, C) A s] - E_p[A s] = - E_p[(1 - C/ρ)₊ A s]. *)
Definition T14_truncation_bias : Prop :=
  forall (n : nat) (p μ A s : nat -> R) (C : R),
  positive n p -> positive n μ ->
  E n μ (fun a => Rmin (ρ p μ a) C * A a * s a) - E n p (fun a => A a * s a)
  = - E n p (fun a => Rmax 0 (1 - C / ρ p μ a) * A a * s a).

(** For a mask on the ratio: E_μ[1[α ≤ ρ ≤ β] ρ A s] = E_p[1[α ≤ ρ ≤ β] A s]. *)
Definition T14_mask : Prop :=
  forall (n : nat) (p μ A s : nat -> R) (α β : R),
  positive n p -> positive n μ ->
  E n μ (fun a => kept α β (ρ p μ a) * ρ p μ a * A a * s a) = E n p (fun a => kept α β (ρ p μ a) * A a * s a).

(** In the logits of a softmax row a factor F on the weight does no harm, E_p[F A s] = E_p[A s], exactly if (1 - F)
    A is the same for every token. *)
Definition T14_no_bias : Prop :=
  forall (n : nat) (z F A : nat -> R),
  (forall a, (a < n)%nat ->
   E n (softmax n z) (fun b => F b * A b * s n z a b) = E n (softmax n z) (fun b => A b * s n z a b)) <->
  exists k, forall b, (b < n)%nat -> (1 - F b) * A b = k.

(** Truncation does no harm for every weight, on two tokens or more, exactly if no ratio is above C. *)
Definition T14_no_bias_for_every_weight : Prop :=
  forall (n : nat) (z μ : nat -> R) (C : R),
  (2 <= n)%nat -> positive n μ ->
  (forall (A : nat -> R) (a : nat), (a < n)%nat ->
   E n μ (fun b => Rmin (ρ (softmax n z) μ b) C * A b * s n z a b)
   = E n (softmax n z) (fun b => A b * s n z a b)) <->
  forall b, (b < n)%nat -> ρ (softmax n z) μ b <= C.

(** Where the student is the teacher, p = q, every token has the weight w_f(1): E_p[F w s] = w_f(1) E_p[F s]. *)
Definition T14_at_the_teacher : Prop :=
  forall (n : nat) (z F : nat -> R) (f : R -> R) (a : nat),
  let p := softmax n z in
  E n p (fun b => F b * w f (u p p b) * s n z a b) = w f 1 * E n p (fun b => F b * s n z a b).

(** So the truncated direction is zero there for every sampler exactly if w_f(1) = 0, on two tokens or more, whatever
    C > 0. *)
Definition T14_teacher_is_fixed : Prop :=
  forall (n : nat) (z : nat -> R) (f : R -> R) (C : R),
  (2 <= n)%nat -> 0 < C ->
  let p := softmax n z in
  (forall (μ : nat -> R) (a : nat), distribution n μ -> (a < n)%nat ->
   E n μ (fun b => Rmin (ρ p μ b) C * w f (u p p b) * s n z a b) = 0) <->
  w f 1 = 0.

(** On so many tokens or more, a mask α ≤ ρ ≤ β that keeps the ratio one leaves the direction zero for every sampler
    exactly if w_f(1) = 0. *)
Definition teacher_is_fixed_under_a_mask (fewest : nat) : Prop :=
  forall (n : nat) (z : nat -> R) (f : R -> R) (α β : R),
  (fewest <= n)%nat -> α <= 1 <= β ->
  let p := softmax n z in
  (forall (μ : nat -> R) (a : nat), distribution n μ -> (a < n)%nat ->
   E n μ (fun b => kept α β (ρ p μ b) * ρ p μ b * w f (u p p b) * s n z a b) = 0) <->
  w f 1 = 0.

(** The same holds for a mask that keeps the ratio one and drops large ones, on three tokens or more. *)
Definition T14_teacher_is_fixed_under_a_mask : Prop := teacher_is_fixed_under_a_mask 3.

(** A false twin: truncation does no harm. *)
Definition T14_twin_unbiased : Prop :=
  forall (n : nat) (z μ A : nat -> R) (C : R) (a : nat),
  distribution n μ -> 0 < C -> (a < n)%nat ->
  E n μ (fun b => Rmin (ρ (softmax n z) μ b) C * A b * s n z a b) = E n (softmax n z) (fun b => A b * s n z a b).

(** A false twin: two tokens are enough for the statement on masks. With p = (1/2, 1/2) and the mask 2/3 ≤ ρ ≤ 2, either
    both tokens are kept or none is, because 1/ρ₀ + 1/ρ₁ = 2; so the teacher stays fixed for every weight. *)
Definition T14_twin_mask_on_two_tokens : Prop := teacher_is_fixed_under_a_mask 2.

(** * Proofs: the means *)

Lemma ratio_positive n p μ a : positive n p -> positive n μ -> (a < n)%nat -> 0 < ρ p μ a.
Proof. intros positive_p positive_μ lt. apply Rdiv_lt_0_compat; auto. Qed.

(** μ min(ρ, C) = p min(1, C/ρ), token by token. *)
Lemma one_truncated n p μ C a :
  positive n p -> positive n μ -> (a < n)%nat -> μ a * Rmin (ρ p μ a) C = p a * Rmin 1 (C / ρ p μ a).
Proof.
  intros positive_p positive_μ lt.
  assert (hp := positive_p a lt). assert (hμ := positive_μ a lt).
  assert (hρ := ratio_positive n p μ a positive_p positive_μ lt).
  assert (split : C / ρ p μ a <= 1 <-> C <= ρ p μ a).
  { split; intros le.
    - apply (Rmult_le_compat_r (ρ p μ a)) in le; [| lra].
      unfold Rdiv in le. rewrite Rmult_assoc, Rinv_l in le; lra.
    - apply (Rmult_le_reg_r (ρ p μ a)); [assumption |].
      unfold Rdiv. rewrite Rmult_assoc, Rinv_l; lra. }
  destruct (Rle_dec C (ρ p μ a)) as [above | below].
  - rewrite Rmin_right, Rmin_right by tauto. unfold ρ. field. lra.
  - rewrite Rmin_left, Rmin_left by (apply Rlt_le, Rnot_le_lt; tauto). unfold ρ. field. lra.
Qed.

Theorem T14_truncation_holds : T14_truncation.
Proof.
  intros n p μ A s C positive_p positive_μ. apply sum_ext. intros a lt.
  rewrite <- !Rmult_assoc, (one_truncated n) by assumption. reflexivity.
Qed.

Theorem T14_truncation_bias_holds : T14_truncation_bias.
Proof.
  intros n p μ A s C positive_p positive_μ.
  rewrite T14_truncation_holds by assumption. rewrite <- E_minus, <- E_opp. apply E_ext. intros a lt.
  assert (positive_part : Rmax 0 (1 - C / ρ p μ a) = 1 - Rmin 1 (C / ρ p μ a)).
  { unfold Rmax, Rmin. destruct (Rle_dec 0 (1 - C / ρ p μ a)), (Rle_dec 1 (C / ρ p μ a)); lra. }
  rewrite positive_part. ring.
Qed.

Theorem T14_mask_holds : T14_mask.
Proof.
  intros n p μ A s α β positive_p positive_μ. apply sum_ext. intros a lt.
  assert (hμ := positive_μ a lt). set (k := kept α β (ρ p μ a)). unfold ρ. field. lra.
Qed.

(** * Proofs: no bias *)

(** A direction of a softmax row is zero exactly if its weight is constant. *)
Lemma direction_zero n z A :
  (forall a, (a < n)%nat -> E n (softmax n z) (fun b => A b * s n z a b) = 0) <->
  exists k, forall b, (b < n)%nat -> A b = k.
Proof.
  split.
  - intros zero. exists (E n (softmax n z) A). intros b lt.
    specialize (zero b lt). unfold s in zero. rewrite softmax_direction in zero by assumption.
    assert (0 < softmax n z b) by now apply softmax_positive.
    apply Rmult_integral in zero. lra.
  - intros [k constant] a lt.
    rewrite (E_ext n _ _ (fun b => k * s n z a b)) by (intros b lt_b; now rewrite constant).
    rewrite E_scale. unfold s. rewrite <- (softmax_of_its_logit n z a) at 1.
    rewrite score_mean by now apply softmax_student. ring.
Qed.

Theorem T14_no_bias_holds : T14_no_bias.
Proof.
  intros n z F A. rewrite <- (direction_zero n z (fun b => (1 - F b) * A b)).
  assert (gap : forall a, E n (softmax n z) (fun b => (1 - F b) * A b * s n z a b)
                          = E n (softmax n z) (fun b => A b * s n z a b)
                            - E n (softmax n z) (fun b => F b * A b * s n z a b)).
  { intros a. rewrite <- E_minus. apply E_ext. intros. ring. }
  split; intros same a lt; specialize (same a lt); rewrite gap in *; lra.
Qed.

Theorem T14_no_bias_for_every_weight_holds : T14_no_bias_for_every_weight.
Proof.
  intros n z μ C two positive_μ.
  assert (positive_p := softmax_positive n z).
  set (F := fun b => Rmin 1 (C / ρ (softmax n z) μ b)).
  assert (factor : forall A a, E n μ (fun b => Rmin (ρ (softmax n z) μ b) C * A b * s n z a b)
                               = E n (softmax n z) (fun b => F b * A b * s n z a b)).
  { intros A a. now apply T14_truncation_holds. }
  assert (inside : forall b, (b < n)%nat -> F b = 1 <-> ρ (softmax n z) μ b <= C).
  { intros b lt. assert (hρ := ratio_positive n _ μ b positive_p positive_μ lt).
    assert (scaled : C / ρ (softmax n z) μ b * ρ (softmax n z) μ b = C) by (field; lra).
    unfold F, Rmin. destruct (Rle_dec 1 (C / ρ (softmax n z) μ b)); split; intros; nra. }
  split.
  - intros no_bias b lt. apply inside; [assumption |].
    destruct (proj1 (T14_no_bias_holds n z F (fun c => indicator (Nat.eqb c b)))) as [k constant].
    { intros a lt_a. rewrite <- factor. now apply no_bias. }
    (* The weight is one at b alone, so (1 - F) A is zero at any other token. *)
    set (other := if Nat.eqb b 0 then 1%nat else 0%nat).
    assert (different : Nat.eqb other b = false).
    { unfold other. destruct (Nat.eqb_spec b 0); apply Nat.eqb_neq; lia. }
    assert (at_other := constant other ltac:(unfold other; destruct (Nat.eqb b 0); lia)).
    assert (at_b := constant b lt). cbv beta in at_other, at_b.
    rewrite different in at_other. rewrite Nat.eqb_refl in at_b. unfold indicator in at_other, at_b. lra.
  - intros all A a lt. rewrite factor. apply T14_no_bias_holds; [| assumption].
    exists 0. intros b lt_b. rewrite (proj2 (inside b lt_b)) by auto. ring.
Qed.

(** * Proofs: the teacher *)

Lemma weight_at_the_teacher n z f b : (b < n)%nat -> w f (u (softmax n z) (softmax n z) b) = w f 1.
Proof.
  intros lt. assert (0 < softmax n z b) by now apply softmax_positive.
  f_equal. unfold u. field. lra.
Qed.

Theorem T14_at_the_teacher_holds : T14_at_the_teacher.
Proof.
  intros n z F f a p. rewrite <- E_scale. apply E_ext. intros b lt.
  unfold p. rewrite weight_at_the_teacher by assumption. ring.
Qed.

(** Mass of the student's first token is moved to the token j, until ε is left. *)
Definition moved_mass (p : nat -> R) (j : nat) (ε : R) (b : nat) : R :=
  p b + (if Nat.eqb b 0 then ε - p 0%nat else 0) + (if Nat.eqb b j then p 0%nat - ε else 0).

Lemma moved_mass_distribution n p j ε :
  distribution n p -> (0 < j < n)%nat -> 0 < ε < p 0%nat -> distribution n (moved_mass p j ε).
Proof.
  intros [positive_p one] hj hε. split.
  - intros b lt. assert (hb := positive_p b lt). unfold moved_mass.
    destruct (Nat.eqb_spec b 0) as [first |], (Nat.eqb_spec b j) as [last |]; try lia; try rewrite first; lra.
  - unfold moved_mass. rewrite !sum_plus. rewrite (sum_ext n p (fun a => p a)), one by reflexivity.
    rewrite (sum_single n (fun _ => ε - p 0%nat)), (sum_single n (fun _ => p 0%nat - ε)) by lia. ring.
Qed.

(** Where two tokens keep different factors, the direction is zero only for the weight zero. *)
Lemma weight_zero n z k F i j :
  (forall a, (a < n)%nat -> E n (softmax n z) (fun b => F b * k * s n z a b) = 0) ->
  (i < n)%nat -> (j < n)%nat -> F i <> F j -> k = 0.
Proof.
  intros zero hi hj different.
  destruct (proj1 (direction_zero n z (fun b => F b * k)) zero) as [c constant].
  assert (product : (F i - F j) * k = 0) by (assert (one := constant i hi); assert (two := constant j hj); lra).
  apply Rmult_integral in product. destruct product; [exfalso; lra | assumption].
Qed.

Theorem T14_teacher_is_fixed_holds : T14_teacher_is_fixed.
Proof.
  intros n z f C two hC p.
  assert (is_p : distribution n p) by (apply softmax_distribution; lia).
  assert (h0 := proj1 is_p 0%nat ltac:(lia)). assert (h1 := proj1 is_p 1%nat ltac:(lia)).
  split.
  - intros zero.
    set (ε := p 0%nat * (Rmin 1 (/ C) / 2)).
    assert (hm : 0 < Rmin 1 (/ C) <= 1).
    { split; [apply Rmin_pos; [lra | now apply Rinv_0_lt_compat] | apply Rmin_l]. }
    assert (hε : 0 < ε < p 0%nat) by (unfold ε; nra).
    set (μ := moved_mass p 1 ε).
    assert (is_μ : distribution n μ) by (apply moved_mass_distribution; [assumption | lia | assumption]).
    apply (weight_zero n z (w f 1) (fun b => Rmin 1 (C / ρ p μ b)) 0 1); [| lia | lia |].
    + intros a lt. rewrite <- (zero μ a is_μ lt).
      symmetry. unfold p. rewrite T14_truncation_holds by (apply is_p || apply is_μ).
      apply E_ext. intros b lt_b. now rewrite weight_at_the_teacher.
    + (* The first token keeps less than any token with a ratio below one. *)
      set (x := C * Rmin 1 (/ C)).
      assert (hx : 0 < x <= C /\ x <= 1).
      { assert (low := Rmin_r 1 (/ C)). unfold x. repeat split; [apply Rmult_lt_0_compat; lra | nra |].
        apply (Rmult_le_compat_l C) in low; [| lra]. rewrite Rinv_r in low; lra. }
      assert (at_0 : C / ρ p μ 0 = x / 2).
      { unfold ρ, μ, moved_mass. simpl.
        replace (p 0%nat + (ε - p 0%nat) + 0) with (p 0%nat * (Rmin 1 (/ C) / 2)) by (unfold ε; ring).
        unfold x. field. lra. }
      assert (at_1 : C <= C / ρ p μ 1).
      { unfold ρ, μ, moved_mass. simpl.
        replace (C / (p 1%nat / (p 1%nat + 0 + (p 0%nat - ε)))) with (C * ((p 1%nat + (p 0%nat - ε)) / p 1%nat))
          by (field; lra).
        rewrite <- (Rmult_1_r C) at 1. apply Rmult_le_compat_l; [lra |].
        apply (Rmult_le_reg_r (p 1%nat)); [assumption |]. unfold Rdiv. rewrite Rmult_assoc, Rinv_l; lra. }
      rewrite at_0. rewrite Rmin_right by lra. unfold Rmin at 1. destruct (Rle_dec 1 (C / ρ p μ 1)); lra.
  - intros zero μ a is_μ lt.
    rewrite (E_ext n μ _ (fun _ => 0)); [rewrite E_const; ring |].
    intros b lt_b. unfold p. rewrite weight_at_the_teacher, zero by assumption. ring.
Qed.

Lemma kept_inside α β x : α <= x <= β -> kept α β x = 1.
Proof. intros [low high]. unfold kept. destruct (Rle_dec α x), (Rle_dec x β); tauto || reflexivity. Qed.

Lemma kept_above α β x : β < x -> kept α β x = 0.
Proof. intros above. unfold kept. destruct (Rle_dec α x), (Rle_dec x β); lra. Qed.

(** Mass is moved from the first token to the third: the second one keeps the ratio one. *)
Theorem T14_teacher_is_fixed_under_a_mask_holds : T14_teacher_is_fixed_under_a_mask.
Proof.
  intros n z f α β three [hα hβ] p.
  assert (is_p : distribution n p) by (apply softmax_distribution; lia).
  assert (h0 := proj1 is_p 0%nat ltac:(lia)). assert (h1 := proj1 is_p 1%nat ltac:(lia)).
  split.
  - intros zero.
    set (ε := p 0%nat / (β + 1)).
    assert (hε : 0 < ε < p 0%nat).
    { split; [apply Rdiv_lt_0_compat; lra |]. unfold ε.
      apply (Rmult_lt_reg_r (β + 1)); [lra |]. unfold Rdiv. rewrite Rmult_assoc, Rinv_l; nra. }
    set (μ := moved_mass p 2 ε).
    assert (is_μ : distribution n μ) by (apply moved_mass_distribution; [assumption | lia | assumption]).
    apply (weight_zero n z (w f 1) (fun b => kept α β (ρ p μ b)) 0 1); [| lia | lia |].
    + intros a lt. rewrite <- (zero μ a is_μ lt).
      symmetry. unfold p. rewrite T14_mask_holds by (apply is_p || apply is_μ).
      apply E_ext. intros b lt_b. now rewrite weight_at_the_teacher.
    + assert (at_0 : ρ p μ 0 = β + 1).
      { unfold ρ, μ, moved_mass. simpl.
        replace (p 0%nat + (ε - p 0%nat) + 0) with (p 0%nat / (β + 1)) by (unfold ε; ring). field. lra. }
      assert (at_1 : ρ p μ 1 = 1) by (unfold ρ, μ, moved_mass; simpl; field; lra).
      rewrite at_0, at_1, kept_above, kept_inside; lra.
  - intros zero μ a is_μ lt.
    rewrite (E_ext n μ _ (fun _ => 0)); [rewrite E_const; ring |].
    intros b lt_b. unfold p. rewrite weight_at_the_teacher, zero by assumption. ring.
Qed.

(** * Proofs: the twins *)

(** Two equally likely tokens of which the sampler draws the first one in four times, C = 1, and a weight on the first
    token alone: half of it is lost. *)
Theorem T14_twin_unbiased_is_false : ~ T14_twin_unbiased.
Proof.
  intros twin.
  assert (false := twin 2%nat even quarter (fun b => indicator (Nat.eqb b 0)) 1 0%nat
                     quarter_distribution ltac:(lra) ltac:(lia)).
  revert false. unfold E, ρ, s, indicator. simpl. rewrite !softmax_score, !even_half by lia.
  unfold indicator, quarter. simpl. rewrite Rmin_right by lra. lra.
Qed.

(** Both tokens are kept, or none is. *)
Lemma kept_together m : 0 < m < 1 -> kept (2 / 3) 2 (1 / 2 / m) = kept (2 / 3) 2 (1 / 2 / (1 - m)).
Proof.
  assert (low : forall x, 0 < x -> 2 / 3 <= 1 / 2 / x <-> x <= 3 / 4).
  { intros x hx. assert (scaled : 1 / 2 / x * x = 1 / 2) by (field; lra). split; intros; nra. }
  assert (high : forall x, 0 < x -> 1 / 2 / x <= 2 <-> 1 / 4 <= x).
  { intros x hx. assert (scaled : 1 / 2 / x * x = 1 / 2) by (field; lra). split; intros; nra. }
  intros inside. unfold kept.
  assert (low_m := low m ltac:(lra)). assert (high_m := high m ltac:(lra)).
  assert (low_n := low (1 - m) ltac:(lra)). assert (high_n := high (1 - m) ltac:(lra)).
  destruct (Rle_dec (2 / 3) (1 / 2 / m)), (Rle_dec (1 / 2 / m) 2),
    (Rle_dec (2 / 3) (1 / 2 / (1 - m))), (Rle_dec (1 / 2 / (1 - m)) 2); lra.
Qed.

Theorem T14_twin_mask_on_two_tokens_is_false : ~ T14_twin_mask_on_two_tokens.
Proof.
  intros twin.
  assert (slope : is_derive (fun x : R => x - 1) 1 1).
  { eapply derive_value; [apply derive_minus; [apply derive_id | apply derive_const] | ring]. }
  assert (weight : w (fun x => x - 1) 1 = 1) by (unfold w; rewrite (derivative _ _ _ slope); ring).
  destruct (twin 2%nat even (fun x => x - 1) (2 / 3) 2 ltac:(lia) ltac:(lra)) as [fixed _].
  rewrite weight in fixed. apply R1_neq_R0, fixed. intros μ a is_μ lt.
  rewrite T14_mask_holds by (apply softmax_positive || apply is_μ).
  revert a lt. apply direction_zero.
  exists (kept (2 / 3) 2 (ρ (softmax 2 even) μ 0) * 1). intros b lt.
  rewrite weight_at_the_teacher, weight by assumption. f_equal.
  destruct is_μ as [positive_μ one]. simpl in one.
  assert (h0 := positive_μ 0%nat ltac:(lia)). assert (h1 := positive_μ 1%nat ltac:(lia)).
  destruct b as [| [| b]]; [reflexivity | | lia].
  unfold ρ. rewrite !even_half. symmetry.
  replace (μ 1%nat) with (1 - μ 0%nat) by lra. apply kept_together. lra.
Qed.
