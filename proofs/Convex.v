(** Convex functions on the positive numbers, and what a derivative says of them. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Calculus.
Open Scope R_scope.

(** A function is convex if no chord passes below it. *)
Definition convex (f : R -> R) : Prop :=
  forall x y t, 0 < x -> 0 < y -> 0 <= t <= 1 -> f (t * x + (1 - t) * y) <= t * f x + (1 - t) * f y.

(** It is strictly convex if no chord touches it between its ends. *)
Definition strictly_convex (f : R -> R) : Prop :=
  forall x y t, 0 < x -> 0 < y -> x <> y -> 0 < t < 1 -> f (t * x + (1 - t) * y) < t * f x + (1 - t) * f y.

Definition non_decreasing (w : R -> R) : Prop := forall x y, 0 < x -> x <= y -> w x <= w y.

Lemma strictly_convex_convex f : strictly_convex f -> convex f.
Proof.
  intros strict x y t hx hy [low high].
  destruct (Req_dec x y) as [-> | different]; [right; ring_simplify (t * y + (1 - t) * y); ring |].
  destruct low as [low | <-]; [| right; ring_simplify (0 * x + (1 - 0) * y); ring].
  destruct high as [high | ->]; [| right; ring_simplify (1 * x + (1 - 1) * y); ring].
  apply Rlt_le. now apply strict.
Qed.

(** A function with a tangent below it at every point is convex. *)
Lemma tangents_convex f slope :
  (forall x y, 0 < x -> 0 < y -> f x + slope x * (y - x) <= f y) -> convex f.
Proof.
  intros tangent x y t hx hy inside. set (m := t * x + (1 - t) * y).
  assert (hm : 0 < m) by (unfold m; destruct (Rle_dec t (1 / 2)); nra).
  assert (left := tangent m x hm hx). assert (right := tangent m y hm hy).
  assert (t * (f m + slope m * (x - m)) <= t * f x) by (apply Rmult_le_compat_l; lra).
  assert ((1 - t) * (f m + slope m * (y - m)) <= (1 - t) * f y) by (apply Rmult_le_compat_l; lra).
  assert (t * (f m + slope m * (x - m)) + (1 - t) * (f m + slope m * (y - m)) = f m) by (unfold m; ring).
  lra.
Qed.

(** A derivative is a limit of slopes: an upper bound of the slopes on one side is one of the derivative's move. *)
Lemma derive_bound (f : R -> R) (x l d c : R) :
  is_derive f x l -> (forall t, 0 < t <= 1 -> f (x + t * d) - f x <= t * c) -> l * d <= c.
Proof.
  intros derive bound.
  destruct (Rle_dec (l * d) c) as [| above]; [assumption | exfalso].
  assert (line : is_derive (fun t : R => f (x + t * d)) 0 (d * l)).
  { apply (derive_comp f (fun t => x + t * d)).
    - replace (x + 0 * d) with x by ring. exact derive.
    - eapply derive_value.
      + apply derive_plus; [apply derive_const |]. apply derive_mult; [apply derive_id | apply derive_const].
      + simpl. ring. }
  destruct line as [_ line]. specialize (line 0 (fun P near => near)).
  assert (half : 0 < (l * d - c) / 2) by lra.
  destruct (line (mkposreal _ half)) as [δ near].
  set (t := Rmin 1 (δ / 2)). assert (0 < δ) by apply cond_pos.
  assert (inside : 0 < t <= 1) by (split; [apply Rmin_pos; lra | apply Rmin_l]).
  assert (small : t < δ) by (apply Rle_lt_trans with (δ / 2); [apply Rmin_r | lra]).
  specialize (near t). unfold ball in near; simpl in near; unfold AbsRing_ball in near.
  unfold norm, minus, plus, opp, scal, abs in near; simpl in near; unfold mult, abs in near; simpl in near.
  replace (x + 0 * d) with x in near by ring.
  specialize (bound t inside).
  assert (close : Rabs (t + - 0) < δ) by (rewrite Rabs_pos_eq; lra).
  specialize (near close). rewrite (Rabs_pos_eq (t + - 0)) in near by lra.
  apply Rabs_le_between in near. nra.
Qed.

(** The tangent of a convex function lies below it. *)
Lemma convex_tangent f x l y :
  convex f -> 0 < x -> 0 < y -> is_derive f x l -> f x + l * (y - x) <= f y.
Proof.
  intros convex_f hx hy derive.
  assert (l * (y - x) <= f y - f x); [| lra].
  apply (derive_bound f x); [assumption |]. intros t inside.
  assert (chord := convex_f y x t hy hx ltac:(lra)).
  replace (t * y + (1 - t) * x) with (x + t * (y - x)) in chord by ring. lra.
Qed.

(** Of a strictly convex function it touches it at one point only. *)
Lemma strictly_convex_tangent f x l y :
  strictly_convex f -> 0 < x -> 0 < y -> x <> y -> is_derive f x l -> f x + l * (y - x) < f y.
Proof.
  intros strict hx hy different derive.
  assert (middle := strict x y (1 / 2) hx hy different ltac:(lra)).
  assert (below := convex_tangent f x l (1 / 2 * x + (1 - 1 / 2) * y) (strictly_convex_convex f strict)
                     hx ltac:(lra) derive).
  lra.
Qed.

(** The derivative of a convex function does not decrease. *)
Lemma convex_slopes f x y l m :
  convex f -> 0 < x -> x <= y -> is_derive f x l -> is_derive f y m -> l <= m.
Proof.
  intros convex_f hx [less | <-] at_x at_y.
  - assert (one := convex_tangent f x l y convex_f hx ltac:(lra) at_x).
    assert (two := convex_tangent f y m x convex_f ltac:(lra) hx at_y). nra.
  - right. now apply (derive_unique f x).
Qed.

(** Tangents that turn continuously are those of a derivative. *)
Lemma tangents_derive f slope x :
  (forall x y, 0 < x -> 0 < y -> f x + slope x * (y - x) <= f y) ->
  0 < x -> continuous slope x -> is_derive f x (slope x).
Proof.
  intros tangent hx continuous_slope. split; [apply is_linear_scal_l |].
  intros y at_x. apply (is_filter_lim_locally_unique x y) in at_x. subst y. intros ε.
  assert (close := proj1 (filterlim_locally slope (slope x)) continuous_slope ε).
  assert (near := filter_and _ _ close (locally_positive x hx)). revert near.
  apply filter_imp. intros y [small hy].
  unfold ball in small; simpl in small; unfold AbsRing_ball, abs, minus, plus, opp in small; simpl in small.
  unfold norm, minus, plus, opp, scal, abs; simpl; unfold mult, abs; simpl.
  assert (below := tangent x y hx hy). assert (above := tangent y x hy hx).
  rewrite Rabs_pos_eq by lra. apply Rabs_def2 in small.
  apply Rle_trans with ((slope y - slope x) * (y - x)); [lra |].
  unfold Rabs. destruct (Rcase_abs (y + - x)); nra.
Qed.
