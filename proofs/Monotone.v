(** A monotone function is Riemann integrable, and so is its product with a continuous function.

    Coq's library and Coquelicot integrate continuous functions; a weight that is only monotone may jump. The proof
    approximates it by a function of finitely many steps, and uses that a uniform limit of integrable functions is
    integrable. *)

From Coq Require Import Reals Lra Lia.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Calculus.
Open Scope R_scope.

(** All is said of the inside of an interval: what a function is at the two ends does not matter to its integral. *)
Definition non_decreasing_inside (g : R -> R) (a b : R) : Prop :=
  forall x y, a < x -> x <= y -> y < b -> g x <= g y.

Lemma integrable_ext (f g : R -> R) a b :
  a <= b -> (forall t, a < t < b -> f t = g t) -> ex_RInt f a b -> ex_RInt g a b.
Proof.
  intros le same. apply (ex_RInt_ext (V := R_NormedModule)). intros t.
  rewrite Rmin_left, Rmax_right by exact le. apply same.
Qed.

(** There is a point c up to which a monotone function is at most y, and from which on it is at least y. *)
Lemma crossing (g : R -> R) (a b y : R) :
  a <= b -> non_decreasing_inside g a b ->
  {c | a <= c <= b /\ (forall t, a < t < c -> g t <= y) /\ (forall t, c < t < b -> y <= g t)}.
Proof.
  intros le monotone.
  (* It is the supremum of the points where g is not above y. *)
  destruct (completeness (fun t => t = a \/ a < t < b /\ g t <= y)) as [c [above least]].
  - exists b. intros t [-> | [inside _]]; lra.
  - exists a. now left.
  - exists c. assert (c <= b) by (apply least; intros t [-> | [inside _]]; lra).
    split; [split; [apply above; now left | assumption] |]. split; intros t ht; apply Rnot_lt_le; intros wrong.
    + assert (c <= t); [| lra]. apply least. intros s [-> | [inside low]]; [lra |].
      apply Rnot_lt_le. intros far. assert (g t <= g s) by (apply monotone; lra). lra.
    + assert (a <= c) by (apply above; now left).
      assert (t <= c); [| lra]. apply above. right. lra.
Qed.

(** A monotone function that rises by at most n d is within d of a function s of at most n + 1 steps; the product of s
    with an integrable function is integrable. *)
Lemma steps (g h : R -> R) (d : R) : 0 < d -> forall (n : nat) (a b l : R),
  a <= b -> ex_RInt h a b -> non_decreasing_inside g a b ->
  (forall t, a < t < b -> l <= g t <= l + INR n * d) ->
  {s : R -> R | ex_RInt (fun t => s t * h t) a b /\ forall t, a < t < b -> Rabs (s t - g t) <= d}.
Proof.
  intros hd. induction n as [| n IH]; intros a b l le integrable monotone range.
  - exists (fun _ => l). split; [now apply (ex_RInt_scal (V := R_NormedModule)) |].
    intros t ht. specialize (range t ht). simpl in range. apply Rabs_le. lra.
  - (* One step l up to the point c where g crosses l + d, then the steps of g above l + d. *)
    destruct (crossing g a b (l + d) le monotone) as [c [between [below above]]].
    destruct (IH c b (l + d)) as [s [integrable_s close]].
    + lra.
    + now apply (ex_RInt_Chasles_2 (V := R_CompleteNormedModule) h a).
    + intros x y hx hxy hy. apply monotone; lra.
    + intros t ht. split; [now apply above |].
      assert (top : g t <= l + INR (S n) * d) by (apply range; lra). rewrite S_INR in top. lra.
    + (* At c itself g may lie far from both, so there s takes the value of g. *)
      exists (fun t => if Rlt_dec t c then l else if Rlt_dec c t then s t else g t). split.
      * apply (ex_RInt_Chasles (V := R_NormedModule) _ a c b).
        -- apply (integrable_ext (fun t => l * h t)); [lra | |].
           ++ intros t ht. destruct (Rlt_dec t c); [reflexivity | lra].
           ++ apply (ex_RInt_scal (V := R_NormedModule)).
              now apply (ex_RInt_Chasles_1 (V := R_CompleteNormedModule) h a c b).
        -- apply (integrable_ext (fun t => s t * h t)); [lra | | exact integrable_s].
           intros t ht. destruct (Rlt_dec t c); [lra |]. destruct (Rlt_dec c t); [reflexivity | lra].
      * intros t ht. destruct (Rlt_dec t c) as [left | _]; [| destruct (Rlt_dec c t) as [right | _]].
        -- assert (g t <= l + d) by (apply below; lra). assert (l <= g t) by (apply range; lra).
           apply Rabs_le. lra.
        -- apply close. lra.
        -- apply Rabs_le. lra.
Qed.

(** A uniform limit of integrable functions is integrable. *)
Lemma uniform_limit_integrable (F : nat -> R -> R) (f : R -> R) (a b K : R) :
  a <= b -> (forall n, ex_RInt (F n) a b) ->
  (forall n t, a < t < b -> Rabs (F n t - f t) <= K / INR (S n)) -> ex_RInt f a b.
Proof.
  intros le integrable close.
  (* Off the interval the functions are replaced by their limit, so that they converge everywhere. *)
  pose (G n t := if Rlt_dec a t then if Rlt_dec t b then F n t else f t else f t).
  destruct (filterlim_RInt (V := R_CompleteNormedModule) G a b eventually _ f (fun n => RInt (G n) a b))
    as [integral [_ is_integral]]; [| | now exists integral].
  - intros n. apply (RInt_correct (V := R_CompleteNormedModule)).
    apply (integrable_ext (F n)); [exact le | | apply integrable].
    intros t ht. unfold G. destruct (Rlt_dec a t); [| lra]. destruct (Rlt_dec t b); [reflexivity | lra].
  - apply filterlim_locally. intros [ε hε].
    destruct (is_lim_seq_INR (fun x => K / ε < x)) as [N large]; [now exists (K / ε) |].
    exists N. intros n hn t.
    change (Rabs (G n t - f t) < ε).
    assert (same : Rabs (f t - f t) < ε) by (rewrite Rminus_eq_0, Rabs_R0; exact hε).
    unfold G. destruct (Rlt_dec a t); [| exact same]. destruct (Rlt_dec t b); [| exact same].
    apply Rle_lt_trans with (K / INR (S n)); [apply close; lra |].
    assert (enough : K / ε < INR (S n)) by (apply large; lia).
    apply Rlt_div_l; [apply lt_0_INR; lia |]. apply Rlt_div_l in enough; [| exact hε]. lra.
Qed.

(** The product of a monotone function and a continuous one is integrable. *)
Lemma monotone_integrable (g h : R -> R) (a b : R) :
  a <= b ->
  (forall x y, a <= x -> x <= y -> y <= b -> g x <= g y) ->
  (forall x, a <= x <= b -> continuous h x) ->
  ex_RInt (fun t => g t * h t) a b.
Proof.
  intros le monotone continuous_h.
  assert (integrable : ex_RInt h a b).
  { apply (ex_RInt_continuous (V := R_CompleteNormedModule)). intros x.
    rewrite Rmin_left, Rmax_right by exact le. apply continuous_h. }
  destruct (ex_RInt_ub (V := R_NormedModule) h a b integrable) as [K bound].
  rewrite Rmin_left, Rmax_right in bound by exact le. change (forall t, a <= t <= b -> Rabs (h t) <= K) in bound.
  (* With d n = (g b - g a + 1) / (n + 1), g rises by at most (n + 1) d n. *)
  assert (rise : g a <= g b) by (apply monotone; lra).
  assert (many : forall n, 0 < INR (S n)) by (intros; apply lt_0_INR; lia).
  pose (d n := (g b - g a + 1) / INR (S n)).
  assert (height : forall n, 0 < d n) by (intros; apply Rdiv_lt_0_compat; [lra | apply many]).
  assert (s : forall n, {s | ex_RInt (fun t => s t * h t) a b /\ forall t, a < t < b -> Rabs (s t - g t) <= d n}).
  { intros n. apply (steps g h (d n) (height n) (S n) a b (g a) le integrable).
    - intros x y hx hxy hy. apply monotone; lra.
    - intros t ht. replace (INR (S n) * d n) with (g b - g a + 1) by (unfold d; field; apply Rgt_not_eq, many).
      assert (g a <= g t) by (apply monotone; lra). assert (g t <= g b) by (apply monotone; lra). lra. }
  apply (uniform_limit_integrable (fun n t => proj1_sig (s n) t * h t) _ a b ((g b - g a + 1) * K) le);
    intros n; destruct (s n) as [s_n [integrable_s close]]; simpl proj1_sig; [exact integrable_s |].
  intros t ht. rewrite <- Rmult_minus_distr_r, Rabs_mult.
  replace ((g b - g a + 1) * K / INR (S n)) with (d n * K) by (unfold d; field; apply Rgt_not_eq, many).
  apply Rmult_le_compat; [apply Rabs_pos | apply Rabs_pos | now apply close | apply bound; lra].
Qed.

(** The weight of OPD+ enters integrals as w(t) / t^2. *)
Lemma non_decreasing_integrable (w : R -> R) :
  (forall x y, 0 < x -> x <= y -> w x <= w y) ->
  forall a b, 0 < a -> 0 < b -> ex_RInt (fun t => w t / t ^ 2) a b.
Proof.
  intros monotone.
  assert (ordered : forall a b, 0 < a -> a <= b -> ex_RInt (fun t => w t / t ^ 2) a b).
  { intros a b ha le. apply (monotone_integrable w (fun t => / t ^ 2)); [exact le | |].
    - intros x y hx hxy _. apply monotone; lra.
    - intros x [hx _]. eapply derive_continuous. apply (derive_inv (fun t => t ^ 2)).
      + apply derive_mult; [apply derive_id |]. apply derive_mult; [apply derive_id | apply derive_const].
      + apply pow_nonzero. lra. }
  intros a b ha hb. destruct (Rle_dec a b) as [le | not_le]; [now apply ordered |].
  apply (ex_RInt_swap (V := R_NormedModule)). apply ordered; lra.
Qed.
