(** The calculus that the theorems need: rules of differentiation, and integrals over the positive numbers.

    Coquelicot's [auto_derive] and the mean value theorem of Coq's library would bring in the law of excluded middle
    ([Classical_Prop.classic]), so neither is used. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
Open Scope R_scope.

(** * Rules of differentiation *)

Lemma derive_id x : is_derive (fun t : R => t) x 1.
Proof. exact (is_derive_id x). Qed.

Lemma derive_const c x : is_derive (fun _ : R => c : R) x 0.
Proof. exact (is_derive_const (V := R_NormedModule) c x). Qed.

Lemma derive_plus (f g : R -> R) (x df dg : R) :
  is_derive f x df -> is_derive g x dg -> is_derive (fun t : R => f t + g t) x (df + dg).
Proof. exact (is_derive_plus (V := R_NormedModule) f g x df dg). Qed.

Lemma derive_minus (f g : R -> R) (x df dg : R) :
  is_derive f x df -> is_derive g x dg -> is_derive (fun t : R => f t - g t) x (df - dg).
Proof. exact (is_derive_minus (V := R_NormedModule) f g x df dg). Qed.

Lemma derive_opp (f : R -> R) (x df : R) : is_derive f x df -> is_derive (fun t : R => - f t) x (- df).
Proof. exact (is_derive_opp (V := R_NormedModule) f x df). Qed.

Lemma derive_scale (c : R) (f : R -> R) (x df : R) : is_derive f x df -> is_derive (fun t : R => c * f t) x (c * df).
Proof. exact (is_derive_scal f x c df). Qed.

Lemma derive_mult (f g : R -> R) (x df dg : R) :
  is_derive f x df -> is_derive g x dg -> is_derive (fun t : R => f t * g t) x (df * g x + f x * dg).
Proof. intros hf hg. exact (is_derive_mult f g x df dg hf hg Rmult_comm). Qed.

Lemma derive_inv (f : R -> R) (x df : R) :
  is_derive f x df -> f x <> 0 -> is_derive (fun t : R => / f t) x (- df / f x ^ 2).
Proof. exact (is_derive_inv f x df). Qed.

Lemma derive_div (f g : R -> R) (x df dg : R) :
  is_derive f x df -> is_derive g x dg -> g x <> 0 ->
  is_derive (fun t : R => f t / g t) x ((df * g x - f x * dg) / g x ^ 2).
Proof. exact (is_derive_div f g x df dg). Qed.

Lemma derive_comp (f g : R -> R) (x df dg : R) :
  is_derive f (g x) df -> is_derive g x dg -> is_derive (fun t : R => f (g t)) x (dg * df).
Proof. exact (is_derive_comp (V := R_NormedModule) f g x df dg). Qed.

(** The derivative may be rewritten, and so may the function near the point. *)
Lemma derive_value (f : R -> R) (x df l : R) : is_derive f x df -> df = l -> is_derive f x l.
Proof. now intros derive <-. Qed.

Lemma derive_local (f g : R -> R) (x l : R) :
  locally x (fun t => f t = g t) -> is_derive f x l -> is_derive g x l.
Proof. exact (is_derive_ext_loc f g x l). Qed.

Lemma derive_ext (f g : R -> R) (x l : R) : (forall t, f t = g t) -> is_derive f x l -> is_derive g x l.
Proof. exact (is_derive_ext f g x l). Qed.

Lemma derive_unique (f : R -> R) (x l l' : R) : is_derive f x l -> is_derive f x l' -> l = l'.
Proof. intros one two. apply is_derive_unique in one, two. congruence. Qed.


Lemma derivative (f : R -> R) (x l : R) : is_derive f x l -> Derive f x = l.
Proof. apply is_derive_unique. Qed.

Lemma derive_continuous (f : R -> R) (x l : R) : is_derive f x l -> continuous f x.
Proof. intros derive. apply (ex_derive_continuous (V := R_NormedModule)). now exists l. Qed.

(** * The positive numbers *)

Definition continuous_above_zero (g : R -> R) : Prop := forall x, 0 < x -> continuous g x.

Definition differentiable_above_zero (f : R -> R) : Prop := forall x, 0 < x -> ex_derive f x.

Lemma between_positive a b x : 0 < a -> 0 < b -> Rmin a b <= x -> 0 < x.
Proof. unfold Rmin. destruct (Rle_dec a b); lra. Qed.

(** What holds on an open interval holds near each of its points. *)
Lemma locally_between l x h : l < x < h -> locally x (fun y => l < y < h).
Proof.
  intros inside.
  assert (positive : 0 < Rmin (x - l) (h - x)) by (apply Rmin_pos; lra).
  exists (mkposreal _ positive). intros y near.
  unfold ball in near; simpl in near; unfold AbsRing_ball, abs, minus, plus, opp in near; simpl in near.
  apply Rabs_def2 in near.
  assert (left := Rmin_l (x - l) (h - x)). assert (right := Rmin_r (x - l) (h - x)). lra.
Qed.

Lemma locally_positive x : 0 < x -> locally x (fun y => 0 < y).
Proof.
  intros positive. apply (filter_imp (fun y => 0 < y < x + 1)); [tauto | apply locally_between; lra].
Qed.

Lemma integrable_above_zero g a b : continuous_above_zero g -> 0 < a -> 0 < b -> ex_RInt g a b.
Proof.
  intros continuous_g ha hb. apply (ex_RInt_continuous (V := R_CompleteNormedModule)). intros x [low _].
  apply continuous_g. now apply (between_positive a b).
Qed.

(** The fundamental theorem of calculus: the derivative of an integral, and the integral of a derivative. *)
Lemma integral_derive g a x :
  continuous_above_zero g -> 0 < a -> 0 < x -> is_derive (RInt g a) x (g x).
Proof.
  intros continuous_g ha hx. apply (is_derive_RInt (V := R_NormedModule) g (RInt g a) a x).
  - apply (filter_imp (fun y => 0 < y)); [| now apply locally_positive].
    intros y hy. apply (RInt_correct (V := R_CompleteNormedModule)). now apply integrable_above_zero.
  - now apply continuous_g.
Qed.

Lemma integral_of_derivative (F g : R -> R) a b :
  continuous_above_zero g -> (forall x, 0 < x -> is_derive F x (g x)) -> 0 < a -> 0 < b ->
  RInt g a b = F b - F a.
Proof.
  intros continuous_g derive ha hb.
  apply is_RInt_unique. apply (is_RInt_derive (V := R_CompleteNormedModule) F g a b).
  - intros x [low _]. apply derive. now apply (between_positive a b).
  - intros x [low _]. apply continuous_g. now apply (between_positive a b).
Qed.

(** A function whose derivative is zero between two points has the same value at both. *)
Lemma constant_between (F : R -> R) a b :
  (forall x, Rmin a b <= x <= Rmax a b -> is_derive F x 0) -> F b = F a.
Proof.
  intros derive.
  assert (zero : RInt (fun _ => 0) a b = F b - F a).
  { apply is_RInt_unique. apply (is_RInt_derive (V := R_CompleteNormedModule) F (fun _ => 0)); [exact derive |].
    intros x _. apply continuous_const. }
  rewrite RInt_const in zero. unfold scal in zero; simpl in zero; unfold mult in zero; simpl in zero. lra.
Qed.

Lemma inverse_continuous : continuous_above_zero (fun t => / t).
Proof. intros x hx. eapply derive_continuous. apply (derive_inv (fun t => t)); [apply derive_id | lra]. Qed.

(** A function that is zero with its derivative at θ, and differentiable twice there, is O((t - θ)²). *)
Lemma second_order (F dF : R -> R) (θ l : R) :
  locally θ (fun t => is_derive F t (dF t)) -> locally θ (fun t => continuous dF t) ->
  F θ = 0 -> dF θ = 0 -> is_derive dF θ l ->
  exists K, locally θ (fun t => Rabs (F t) <= K * (t - θ) ^ 2).
Proof.
  intros derive continuous_dF zero flat curve. exists (Rabs l + 1).
  destruct curve as [_ curve]. specialize (curve θ (fun P near => near) (mkposreal 1 Rlt_0_1)).
  assert (all := filter_and _ _ (filter_and _ _ derive continuous_dF) curve).
  destruct all as [δ near]. exists δ. intros t close.
  assert (inside : forall x, Rmin θ t <= x <= Rmax θ t ->
            (is_derive F x (dF x) /\ continuous dF x) /\ Rabs (dF x) <= (Rabs l + 1) * Rabs (t - θ)).
  { intros x between.
    assert (nearer : Rabs (x - θ) <= Rabs (t - θ)).
    { revert between. unfold Rmin, Rmax.
      destruct (Rle_dec θ t); intros; [rewrite !Rabs_pos_eq | rewrite !Rabs_left1]; lra. }
    unfold ball in close; simpl in close; unfold AbsRing_ball, abs, minus, plus, opp in close; simpl in close.
    destruct (near x) as [good slope].
    { unfold ball; simpl; unfold AbsRing_ball, abs, minus, plus, opp; simpl. unfold Rminus in nearer. lra. }
    split; [exact good |].
    unfold norm, minus, plus, opp, scal, abs in slope; simpl in slope; unfold mult, abs in slope; simpl in slope.
    rewrite flat in slope.
    replace (dF x) with ((dF x + - 0 + - ((x + - θ) * l)) + (x - θ) * l) by ring.
    eapply Rle_trans; [apply Rabs_triang |]. rewrite Rabs_mult.
    assert (0 <= Rabs l) by apply Rabs_pos. unfold Rminus in *. nra. }
  assert (integral : is_RInt dF θ t (minus (F t) (F θ))).
  { apply (is_RInt_derive (V := R_CompleteNormedModule) F dF); intros x between; now apply inside. }
  rewrite zero in integral. unfold minus, plus, opp in integral; simpl in integral.
  rewrite Ropp_0, Rplus_0_r in integral.
  rewrite <- (pow2_abs (t - θ)).
  destruct (Rle_dec θ t) as [right | left].
  - assert (bound := norm_RInt_le_const dF θ t (F t) ((Rabs l + 1) * Rabs (t - θ)) right
      (fun x between => proj2 (inside x ltac:(rewrite Rmin_left, Rmax_right by lra; exact between))) integral).
    unfold norm, abs in bound; simpl in bound. unfold abs in bound; simpl in bound.
    rewrite (Rabs_pos_eq (t - θ)) in * by lra. lra.
  - apply is_RInt_swap in integral.
    assert (bound := norm_RInt_le_const dF t θ (opp (F t)) ((Rabs l + 1) * Rabs (t - θ)) ltac:(lra)
      (fun x between => proj2 (inside x ltac:(rewrite Rmin_right, Rmax_left by lra; exact between))) integral).
    unfold norm, abs, opp in bound; simpl in bound. unfold abs in bound; simpl in bound.
    rewrite Rabs_Ropp in bound. rewrite (Rabs_left1 (t - θ)) in * by lra. lra.
Qed.
