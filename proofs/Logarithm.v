(** The natural logarithm as an integral.

    Coq's own [ln] is defined through a theorem that uses the law of excluded middle ([Classical_Prop.classic]). The
    integral needs nothing beyond the axioms of the real numbers. That the two agree follows from [log_exp]: both are
    the inverse of the exponential. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Calculus.
Open Scope R_scope.

(** log x = ∫_1^x dt/t, for x > 0. *)
Definition log (x : R) : R := RInt (fun t => / t) 1 x.

Lemma log_derive x : 0 < x -> is_derive log x (/ x).
Proof. intros hx. apply (integral_derive (fun t => / t) 1 x inverse_continuous); lra. Qed.

Lemma log_1 : log 1 = 0.
Proof. unfold log. now rewrite RInt_point. Qed.

Lemma log_exp x : log (exp x) = x.
Proof.
  (* As functions of x, both sides have the derivative one. *)
  assert (same : log (exp x) - x = log (exp 0) - 0).
  { apply (constant_between (fun t => log (exp t) - t)). intros t _.
    eapply derive_value.
    - apply derive_minus; [| apply derive_id].
      apply (derive_comp log exp); [apply log_derive, exp_pos | apply is_derive_exp].
    - assert (positive := exp_pos t). field. lra. }
  rewrite exp_0, log_1 in same. lra.
Qed.

Lemma exp_log x : 0 < x -> exp (log x) = x.
Proof.
  intros hx.
  assert (same : exp (log x) / x = exp (log 1) / 1).
  { apply (constant_between (fun t => exp (log t) / t)). intros t [low _].
    assert (ht : 0 < t) by (apply (between_positive 1 x); lra).
    eapply derive_value.
    - apply (derive_div (fun s => exp (log s)) (fun s => s)); [| apply derive_id | lra].
      apply (derive_comp exp log); [apply is_derive_exp | now apply log_derive].
    - simpl. field. lra. }
  rewrite log_1, exp_0 in same. apply (f_equal (fun y => y * x)) in same.
  replace (exp (log x) / x * x) with (exp (log x)) in same by (field; lra). lra.
Qed.

Lemma log_inverse x : 0 < x -> log (/ x) = - log x.
Proof.
  intros hx. rewrite <- (exp_log x hx) at 1. rewrite <- exp_Ropp. apply log_exp.
Qed.

Lemma log_mult x y : 0 < x -> 0 < y -> log (x * y) = log x + log y.
Proof.
  intros hx hy. rewrite <- (exp_log x hx) at 1. rewrite <- (exp_log y hy) at 1. rewrite <- exp_plus. apply log_exp.
Qed.

(** log x ≤ x - 1, and only at one are they equal. *)
Lemma log_le x : 0 < x -> log x <= x - 1.
Proof.
  intros hx.
  assert (slope : continuous_above_zero (fun t => 1 - / t)).
  { intros t ht. apply (continuous_minus (V := R_NormedModule) (fun _ => 1) (fun s => / s)).
    - apply continuous_const.
    - now apply inverse_continuous. }
  assert (can : forall a b, 0 < a -> 0 < b -> ex_RInt (fun t => 1 - / t) a b).
  { intros a b ha hb. now apply integrable_above_zero. }
  assert (integral : RInt (fun t => 1 - / t) 1 x = (x - log x) - (1 - log 1)).
  { apply (integral_of_derivative (fun t => t - log t)); [exact slope | | lra | exact hx].
    intros t ht. apply derive_minus; [apply derive_id | now apply log_derive]. }
  rewrite log_1 in integral.
  destruct (Rle_dec 1 x) as [above | below].
  - assert (0 <= RInt (fun t => 1 - / t) 1 x).
    { apply RInt_ge_0; [exact above | apply can; lra |].
      intros t [ht _]. assert (/ t <= / 1) by (apply Rinv_le_contravar; lra). lra. }
    lra.
  - rewrite <- opp_RInt_swap in integral by (apply can; lra).
    unfold opp in integral; simpl in integral.
    assert (0 <= RInt (fun t => - (1 - / t)) x 1).
    { apply RInt_ge_0; [lra | |].
      - apply (ex_RInt_opp (V := R_NormedModule) (fun t => 1 - / t)). apply can; lra.
      - intros t [low high]. assert (/ 1 <= / t) by (apply Rinv_le_contravar; lra). lra. }
    rewrite (RInt_opp (V := R_CompleteNormedModule) (fun t => 1 - / t)) in H by (apply can; lra).
    unfold opp in H; simpl in H. lra.
Qed.

Lemma log_lt x : 0 < x -> x <> 1 -> log x < x - 1.
Proof.
  (* log x = 2 log √x ≤ 2 (√x - 1) < x - 1. *)
  intros hx different.
  assert (root := sqrt_lt_R0 x hx). assert (square := sqrt_sqrt x (Rlt_le _ _ hx)).
  rewrite <- square at 1. rewrite log_mult by assumption.
  assert (bound := log_le (sqrt x) root).
  assert (sqrt x <> 1) by (intros one; apply different; rewrite <- square, one; lra).
  assert (0 < (sqrt x - 1) * (sqrt x - 1)) by (apply Rsqr_pos_lt; lra).
  lra.
Qed.

Lemma log_positive x : 1 < x -> 0 < log x.
Proof.
  intros hx. assert (below : 0 < / x) by (apply Rinv_0_lt_compat; lra).
  assert (bound := log_le (/ x) below). rewrite log_inverse in bound by lra.
  assert (/ x < / 1) by (apply Rinv_lt_contravar; lra). lra.
Qed.

