(** T4, the implied divergence (docs/theory/t4.md).

      V[w](u) = u ∫_1^u w(t)/t² dt;   w_{V[w]} = w;   V[w_f] = f up to gauge;   V[w]'' = w'/u;
      V[w] is convex, a genuine f-divergence, exactly if w is non-decreasing. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence Convex Monotone T1.
Open Scope R_scope.

(** * Statements *)

(** The generator that a weight W(u) implies. *)
Definition V (W : R -> R) (x : R) : R := x * RInt (fun t => W t / t ^ 2) 1 x.

(** A weight is admitted if its integral exists. *)
Definition integrable (W : R -> R) : Prop :=
  forall a b, 0 < a -> 0 < b -> ex_RInt (fun t => W t / t ^ 2) a b.

(** A weight is admitted if ∫ W(t)/t² dt exists between any two positive numbers. Every continuous weight is, and
    every non-decreasing one, whether it jumps or not. *)
Definition T4_what_is_integrable : Prop :=
  forall W : R -> R, continuous_above_zero W \/ non_decreasing W -> integrable W.

(** The implied generator is zero at one, and where W is continuous it has the weight W: u V'(u) - V(u) = W(u). *)
Definition T4_weight : Prop :=
  forall (W : R -> R) (x : R),
  integrable W -> 0 < x -> continuous W x ->
  V W 1 = 0 /\ ex_derive (V W) x /\ w (V W) x = W x.

(** So an estimator with the weight W on the score of each sampled token follows the exact gradient of the
    divergence with the generator V[W]: ∇ D_{V[W]} = - E_p[W(u) s], for any student at whose ratios W is continuous. *)
Definition T4_follows : Prop :=
  forall (n : nat) (W : R -> R) (q : nat -> R) (p : R -> nat -> R) (θ : R),
  integrable W -> positive n q -> student n p θ ->
  (forall a, (a < n)%nat -> continuous W (u q (p θ) a)) ->
  is_derive (fun t : R => D n (V W) q (p t)) θ
    (- E n (p θ) (fun a => W (u q (p θ) a) * score p θ a)).

(** The round trip: V[w_f](u) = f(u) - f(1) u, which is f itself if f(1) = 0, and for every f a change of gauge and a
    constant. *)
Definition T4_round_trip : Prop :=
  forall (f : R -> R) (x : R),
  differentiable_above_zero f -> continuous_above_zero (Derive f) -> 0 < x ->
  V (w f) x = f x - f 1 * x.

(** The second derivative: V[W]'' = W'/u. *)
Definition T4_second_derivative : Prop :=
  forall (W : R -> R) (x : R),
  differentiable_above_zero W -> 0 < x ->
  is_derive (Derive (V W)) x (Derive W x / x).

(** For a continuous W, V[W] is convex exactly if W is non-decreasing. *)
Definition T4_convex : Prop :=
  forall W : R -> R, continuous_above_zero W -> (convex (V W) <-> non_decreasing W).

(** For any W whose integral exists, jumps included: if W is non-decreasing, V[W] is convex; and if V[W] is convex, W
    does not fall from one point of continuity to a later one. At a jump V[W] does not see which value W takes. *)
Definition T4_convex_with_jumps : Prop :=
  forall W : R -> R,
  (non_decreasing W -> convex (V W)) /\
  (integrable W -> convex (V W) ->
   forall a b, 0 < a -> a <= b -> continuous W a -> continuous W b -> W a <= W b).

(** For a W with a continuous derivative, V[W] is convex exactly if W' ≥ 0. *)
Definition T4_convex_by_slope : Prop :=
  forall W : R -> R, differentiable_above_zero W -> continuous_above_zero (Derive W) ->
  (convex (V W) <-> forall x, 0 < x -> 0 <= Derive W x).

(** A false twin: every continuous weight implies a convex generator. *)
Definition T4_twin_always_convex : Prop :=
  forall W : R -> R, continuous_above_zero W -> convex (V W).

(** A false twin: the implied generator has the weight -W. *)
Definition T4_twin_sign_flipped : Prop :=
  forall (W : R -> R) (x : R), continuous_above_zero W -> 0 < x -> w (V W) x = - W x.

(** * Proofs: the weight *)

Lemma square_continuous : continuous_above_zero (fun t => / t ^ 2).
Proof.
  intros x hx. eapply derive_continuous. apply (derive_inv (fun t => t ^ 2)).
  - apply (derive_mult (fun t => t) (fun t => t * 1)); [apply derive_id |].
    apply derive_mult; [apply derive_id | apply derive_const].
  - apply pow_nonzero. lra.
Qed.

Lemma integrand_continuous W : continuous_above_zero W -> continuous_above_zero (fun t => W t / t ^ 2).
Proof. intros continuous_W x hx. apply (continuous_mult W); [auto | now apply square_continuous]. Qed.

Theorem T4_what_is_integrable_holds : T4_what_is_integrable.
Proof.
  intros W [continuous_W | monotone]; intros a b ha hb.
  - apply integrable_above_zero; auto. now apply integrand_continuous.
  - now apply non_decreasing_integrable.
Qed.

(** The derivative V'(x) = ∫_1^x W/t² + W(x)/x. *)
Lemma V_derive W x :
  integrable W -> 0 < x -> continuous W x ->
  is_derive (V W) x (RInt (fun t => W t / t ^ 2) 1 x + W x / x).
Proof.
  intros can hx continuous_x. set (g := fun t => W t / t ^ 2).
  assert (integral : is_derive (RInt g 1) x (g x)).
  { apply (is_derive_RInt (V := R_NormedModule) g (RInt g 1) 1 x).
    - apply (filter_imp (fun y => 0 < y)); [| now apply locally_positive].
      intros y hy. apply (RInt_correct (V := R_CompleteNormedModule)). apply can; lra.
    - apply (continuous_mult W); [assumption | now apply square_continuous]. }
  eapply derive_value.
  - apply (derive_mult (fun t => t) (RInt g 1)); [apply derive_id | exact integral].
  - unfold g. field. lra.
Qed.

Theorem T4_weight_holds : T4_weight.
Proof.
  intros W x can hx continuous_x. assert (derive := V_derive W x can hx continuous_x).
  split; [unfold V; rewrite RInt_point; apply Rmult_0_r |]. split; [eexists; exact derive |].
  unfold w. rewrite (derivative _ _ _ derive). unfold V. field. lra.
Qed.

Theorem T4_follows_holds : T4_follows.
Proof.
  intros n W q p θ can teacher is_student continuous_W.
  assert (positive_u : forall a, (a < n)%nat -> 0 < u q (p θ) a).
  { intros a lt. apply Rdiv_lt_0_compat; [now apply teacher | now apply is_student]. }
  eapply derive_value.
  - apply opd_plus; [| | exact is_student].
    + intros a lt _. apply T4_weight_holds; auto.
    + intros a lt. apply Rlt_le. auto.
  - f_equal. apply E_ext. intros a lt. f_equal. apply T4_weight_holds; auto.
Qed.

(** w_f(t)/t² is the derivative of f(t)/t. *)
Theorem T4_round_trip_holds : T4_round_trip.
Proof.
  intros f x derive_f continuous_slope hx. unfold V.
  rewrite (integral_of_derivative (fun t => f t / t) (fun t => w f t / t ^ 2) 1 x); [field; lra | | | lra | exact hx].
  - apply integrand_continuous. intros t ht. unfold w.
    apply (continuous_minus (V := R_NormedModule) (fun y => y * Derive f y) f).
    + apply (continuous_mult (K := R_AbsRing) (fun y : R => y) (Derive f)); [apply continuous_id | auto].
    + now apply (ex_derive_continuous (V := R_NormedModule)), derive_f.
  - intros t ht. eapply derive_value.
    + apply (derive_div f (fun y => y)); [apply Derive_correct; auto | apply derive_id | lra].
    + unfold w. simpl. change (Derive (fun y : R => f y) t) with (Derive f t). field. lra.
Qed.

Lemma differentiable_continuous W : differentiable_above_zero W -> continuous_above_zero W.
Proof. intros derive x hx. now apply (ex_derive_continuous (V := R_NormedModule)), derive. Qed.

Theorem T4_second_derivative_holds : T4_second_derivative.
Proof.
  intros W x derive_W hx. assert (continuous_W := differentiable_continuous W derive_W).
  assert (can : integrable W) by (apply T4_what_is_integrable_holds; now left).
  apply (derive_local (fun y => RInt (fun t => W t / t ^ 2) 1 y + W y / y)).
  - apply (filter_imp (fun y => 0 < y)); [| now apply locally_positive].
    intros y hy. symmetry. apply derivative. now apply V_derive; auto.
  - eapply derive_value.
    + apply derive_plus.
      * apply integral_derive; [now apply integrand_continuous | lra | exact hx].
      * apply derive_div; [apply Derive_correct; auto | apply derive_id | lra].
    + simpl. change (Derive (fun y : R => W y) x) with (Derive W x). field. lra.
Qed.

(** * Proofs: convex exactly if the weight is non-decreasing *)

Lemma constant_integrable c a b : 0 < a -> 0 < b -> ex_RInt (fun t => c / t ^ 2) a b.
Proof.
  intros ha hb. apply integrable_above_zero; auto.
  apply (integrand_continuous (fun _ => c)). intros t _. apply continuous_const.
Qed.

(** ∫_x^y c/t² dt = c/x - c/y. *)
Lemma constant_integral c x y : 0 < x -> 0 < y -> c / x - c / y = RInt (fun t => c / t ^ 2) x y.
Proof.
  intros hx hy.
  rewrite (integral_of_derivative (fun t => - c / t) (fun t => c / t ^ 2) x y); [field; lra | | | exact hx | exact hy].
  - apply (integrand_continuous (fun _ => c)). intros t _. apply continuous_const.
  - intros t ht. eapply derive_value.
    + apply (derive_div (fun _ => - c) (fun t => t)); [apply derive_const | apply derive_id | lra].
    + simpl. field. lra.
Qed.

(** A line below V: with the slope ∫_1^x W/t² + W(x)/x at x, the gap at y is y ∫_x^y (W(t) - W(x))/t² dt. *)
Lemma V_gap W x y :
  integrable W -> 0 < x -> 0 < y ->
  V W y - (V W x + (RInt (fun t => W t / t ^ 2) 1 x + W x / x) * (y - x))
  = y * RInt (fun t => W t / t ^ 2 - W x / t ^ 2) x y.
Proof.
  intros can hx hy. set (g := fun t => W t / t ^ 2).
  assert (chasles : RInt g 1 y = RInt g 1 x + RInt g x y).
  { symmetry. apply (RInt_Chasles (V := R_CompleteNormedModule) g 1 x y); apply can; lra. }
  assert (split : RInt (fun t => g t - W x / t ^ 2) x y = RInt g x y - (W x / x - W x / y)).
  { rewrite (constant_integral (W x) x y) by assumption.
    apply (RInt_minus (V := R_CompleteNormedModule) g (fun t => W x / t ^ 2)).
    - now apply can.
    - now apply constant_integrable. }
  unfold V. fold g. change (fun t => W t / t ^ 2 - W x / t ^ 2) with (fun t => g t - W x / t ^ 2).
  rewrite split, chasles. field. lra.
Qed.

Lemma gap_integrable W x a b :
  integrable W -> 0 < a -> 0 < b -> ex_RInt (fun t => W t / t ^ 2 - W x / t ^ 2) a b.
Proof.
  intros can ha hb. apply (ex_RInt_minus (V := R_NormedModule) (fun t => W t / t ^ 2) (fun t => W x / t ^ 2)).
  - now apply can.
  - now apply constant_integrable.
Qed.

(** If W is non-decreasing the gap is nowhere negative, on either side of x. *)
Lemma gap_nonneg W x y : non_decreasing W -> 0 < x -> 0 < y -> 0 <= RInt (fun t => W t / t ^ 2 - W x / t ^ 2) x y.
Proof.
  intros monotone hx hy.
  assert (can : integrable W) by (apply T4_what_is_integrable_holds; now right).
  set (g := fun t => W t / t ^ 2 - W x / t ^ 2).
  assert (term : forall t, 0 < t -> g t = (W t - W x) * / t ^ 2) by (intros; unfold g, Rdiv; ring).
  assert (inverse : forall t, 0 < t -> 0 < / t ^ 2) by (intros; apply Rinv_0_lt_compat, pow_lt; assumption).
  destruct (Rle_dec x y) as [le | gt].
  - apply RInt_ge_0; [exact le | now apply gap_integrable |]. intros t [low _].
    fold (g t). rewrite term by lra. assert (W x <= W t) by (apply monotone; lra).
    apply Rmult_le_pos; [lra | apply Rlt_le, inverse; lra].
  - rewrite <- opp_RInt_swap by now apply gap_integrable.
    assert (below : RInt g y x <= 0); [| unfold opp; simpl; lra].
    replace 0 with (RInt (fun _ => 0) y x).
    + apply RInt_le; [lra | now apply gap_integrable | apply ex_RInt_const |]. intros t [low high].
      rewrite term by lra. assert (W t <= W x) by (apply monotone; lra).
      assert (0 < / t ^ 2) by (apply inverse; lra). nra.
    + rewrite RInt_const. apply Rmult_0_r.
Qed.

Lemma non_decreasing_convex W : non_decreasing W -> convex (V W).
Proof.
  intros monotone. assert (can : integrable W) by (apply T4_what_is_integrable_holds; now right).
  apply (tangents_convex _ (fun x => RInt (fun t => W t / t ^ 2) 1 x + W x / x)). intros x y hx hy.
  assert (gap := V_gap W x y can hx hy). assert (nonneg := gap_nonneg W x y monotone hx hy).
  assert (0 <= y * RInt (fun t => W t / t ^ 2 - W x / t ^ 2) x y) by (apply Rmult_le_pos; lra). lra.
Qed.

(** W = u V' - V does not fall where V is convex: V' does not, and the tangent at b lies below V at a. *)
Lemma convex_non_decreasing W a b :
  integrable W -> convex (V W) -> 0 < a -> a <= b -> continuous W a -> continuous W b -> W a <= W b.
Proof.
  intros can convex_V ha le continuous_a continuous_b. assert (hb : 0 < b) by lra.
  destruct (T4_weight_holds W a can ha continuous_a) as [_ [derive_a weight_a]].
  destruct (T4_weight_holds W b can hb continuous_b) as [_ [derive_b weight_b]].
  rewrite <- weight_a, <- weight_b. unfold w.
  apply Derive_correct in derive_a, derive_b.
  assert (tangent := convex_tangent (V W) b _ a convex_V hb ha derive_b).
  assert (slopes := convex_slopes (V W) a b _ _ convex_V ha le derive_a derive_b). nra.
Qed.

Theorem T4_convex_with_jumps_holds : T4_convex_with_jumps.
Proof. intros W. split; [apply non_decreasing_convex | intros; now apply convex_non_decreasing]. Qed.

Theorem T4_convex_holds : T4_convex.
Proof.
  intros W continuous_W. assert (can : integrable W) by (apply T4_what_is_integrable_holds; now left).
  split; [| apply non_decreasing_convex].
  intros convex_V x y hx le. apply convex_non_decreasing; auto. apply continuous_W. lra.
Qed.

Theorem T4_convex_by_slope_holds : T4_convex_by_slope.
Proof.
  intros W derive_W continuous_slope.
  rewrite (T4_convex_holds W (differentiable_continuous W derive_W)). split.
  - intros monotone x hx.
    assert (bound : Derive W x * - (x / 2) <= 0).
    { apply (derive_bound W x); [now apply Derive_correct, derive_W |]. intros t inside.
      assert (W (x + t * - (x / 2)) <= W x) by (apply monotone; nra). lra. }
    nra.
  - intros nonneg x y hx le.
    assert (integral : RInt (Derive W) x y = W y - W x).
    { apply integral_of_derivative; [assumption | | exact hx | lra].
      intros t ht. now apply Derive_correct, derive_W. }
    assert (0 <= RInt (Derive W) x y); [| lra].
    apply RInt_ge_0; [exact le | apply integrable_above_zero; auto; lra |]. intros t [low _]. apply nonneg. lra.
Qed.

(** * Proofs: the twins *)

Lemma line_continuous c : continuous_above_zero (fun x => c * x).
Proof. intros x _. eapply derive_continuous, derive_scale, derive_id. Qed.

(** The weight -u falls. *)
Theorem T4_twin_always_convex_is_false : ~ T4_twin_always_convex.
Proof.
  intros twin. assert (falls := line_continuous (-1)).
  assert (monotone := proj1 (T4_convex_holds _ falls) (twin _ falls)).
  assert (wrong := monotone 1 2 ltac:(lra) ltac:(lra)). lra.
Qed.

Theorem T4_twin_sign_flipped_is_false : ~ T4_twin_sign_flipped.
Proof.
  intros twin. assert (line := line_continuous 1).
  assert (can : integrable (fun x => 1 * x)) by (apply T4_what_is_integrable_holds; now left).
  destruct (T4_weight_holds _ 1 can ltac:(lra) (line 1 ltac:(lra))) as [_ [_ weight]].
  rewrite twin in weight by (assumption || lra). lra.
Qed.
