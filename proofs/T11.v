(** T11, sum over tokens and mean over tokens (docs/theory/t11.md).

      E[(1/B) Σ_b N_b] = N̄;   E[Σ_b N_b/Σ_b L_b] = N̄/L̄ + (1/B) (- Cov(N, L)/L̄² + N̄ Var(L)/L̄³) + O(B⁻²);
      under a mean over tokens a constant is no baseline: E[c S/L] = c ∇ E[1/L], where E[c S] = 0. *)

From Coq Require Import Reals QArith Qreals Lra Lia List.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence Batches T1.
Import ListNotations.
Open Scope R_scope.

(** * Statements *)

(** Let N_b be an entry of the gradient from rollout b, with the mean N̄. Divided by the number of rollouts, the sum
    over a batch has the mean E[(1/B) Σ_b N_b] = N̄. *)
Definition T11_sum_over_rollouts : Prop :=
  forall (B m : nat) (p N : nat -> R),
  (1 <= B)%nat -> distribution m p ->
  E_batch B m p (fun batch => total N batch / INR B) = E m p N.

(** Divided by the number of tokens, Σ_b L_b, it is biased: E[Σ_b N_b/Σ_b L_b] - N̄/L̄ is minus the covariance of the
    quotient and the batch's mean length, divided by the mean length L̄. *)
Definition T11_quotient : Prop :=
  forall (B m : nat) (p N L : nat -> R),
  (1 <= B)%nat -> distribution m p ->
  (forall i, (i < m)%nat -> 0 < L i) ->
  let quotient := fun batch => total N batch / total L batch in
  let length := fun batch => total L batch / INR B in
  let covariance := E_batch B m p (fun batch => quotient batch * length batch)
                    - E_batch B m p quotient * E_batch B m p length in
  E_batch B m p quotient - E m p N / E m p L = - covariance / E m p L.

(** In powers of 1/B that is E[Σ_b N_b/Σ_b L_b] = N̄/L̄ + (1/B) (- Cov(N, L)/L̄² + N̄ Var(L)/L̄³) + O(B⁻²). *)
Definition T11_expansion : Prop :=
  forall (m : nat) (p N L : nat -> R),
  distribution m p ->
  (forall i, (i < m)%nat -> 0 < L i) ->
  let mean_N := E m p N in
  let mean_L := E m p L in
  let covariance := E m p (fun i => (N i - mean_N) * (L i - mean_L)) in
  let variance := E m p (fun i => (L i - mean_L) ^ 2) in
  exists K, forall B, (1 <= B)%nat ->
  Rabs (E_batch B m p (fun batch => total N batch / total L batch)
        - (mean_N / mean_L + / INR B * (- covariance / mean_L ^ 2 + mean_N * variance / mean_L ^ 3)))
  <= K / INR B ^ 2.

(** Let p_θ(i) be the probability of what the student may sample, one rollout or a batch of them. The sum S_i of its
    tokens' scores is the score of that probability, and L_i is its number of tokens. Under a sum over tokens a constant
    weight c is a baseline: E[c S] = 0. *)
Definition T11_sum_over_tokens : Prop :=
  forall (m : nat) (p : R -> nat -> R) (θ c : R),
  student m p θ ->
  E m (p θ) (fun i => c * score p θ i) = 0.

(** Under a mean over tokens it is none: E[c S/L] is c times the gradient of E[1/L]. *)
Definition T11_mean_over_tokens : Prop :=
  forall (m : nat) (p : R -> nat -> R) (L : nat -> R) (θ c : R),
  student m p θ ->
  exists g : R,
    is_derive (fun t : R => E m (p t) (fun i => / L i)) θ g /\
    E m (p θ) (fun i => c * score p θ i / L i) = c * g.

(** If all have the same number l of tokens, it is one: E[c S/l] = 0. *)
Definition T11_equal_lengths : Prop :=
  forall (m : nat) (p : R -> nat -> R) (l θ c : R),
  student m p θ ->
  E m (p θ) (fun i => c * score p θ i / l) = 0.

(** The counterexample, by computation in fractions. A student ends a rollout after its first token with the probability
    1/2, and else after its second. In the logit of "end" at the first token the score of the first kind of rollout is
    1/2 and that of the second - 1/2. *)
Record rollouts : Set := { probability : Q; tokens : Q; scores : Q }.

Definition one_rollout : list rollouts :=
  [ {| probability := 1 # 2; tokens := 1; scores := 1 # 2 |};
    {| probability := 1 # 2; tokens := 2; scores := - (1 # 2) |} ].

(** All batches of B independent rollouts: probabilities are multiplied, tokens and scores are added. *)
Definition joined (x y : rollouts) : rollouts :=
  {| probability := probability x * probability y; tokens := tokens x + tokens y; scores := scores x + scores y |}.

Fixpoint batches (B : nat) : list rollouts :=
  match B with
  | O => [ {| probability := 1; tokens := 0; scores := 0 |} ]
  | S fewer => flat_map (fun one => map (joined one) (batches fewer)) one_rollout
  end.

Definition mean (g : rollouts -> Q) (all : list rollouts) : Q :=
  fold_right (fun x total => probability x * g x + total)%Q 0%Q all.

(** In batches of one, two, three and four rollouts the mean of S/L is 1/8, 1/16, 13/320 and 67/2240, where the mean of
    S is zero and the probabilities add up to one. *)
Definition T11_counterexample : Prop :=
  map (fun B => Qred (mean (fun x => scores x / tokens x)%Q (batches B))) [1; 2; 3; 4]%nat
  = [1 # 8; 1 # 16; 13 # 320; 67 # 2240]%Q /\
  map (fun B => Qred (mean scores (batches B))) [1; 2; 3; 4]%nat = [0; 0; 0; 0]%Q /\
  map (fun B => Qred (mean (fun _ => 1%Q) (batches B))) [1; 2; 3; 4]%nat = [1; 1; 1; 1]%Q.

(** These numbers are those of a softmax student of two rollouts at equal logits. *)
Definition T11_the_student_of_the_counterexample : Prop :=
  forall i, (i < 2)%nat ->
  let x := nth i one_rollout (Build_rollouts 0 0 0) in
  softmax 2 (fun _ => 0) i = Q2R (probability x) /\
  score (softmax_of_logit 2 (fun _ => 0) 0) 0 i = Q2R (scores x).

(** A false twin: the expansion without the covariance of gradient and length. *)
Definition T11_twin_covariance_dropped : Prop :=
  forall (m : nat) (p N L : nat -> R),
  distribution m p ->
  (forall i, (i < m)%nat -> 0 < L i) ->
  let mean_N := E m p N in
  let mean_L := E m p L in
  let variance := E m p (fun i => (L i - mean_L) ^ 2) in
  exists K, forall B, (1 <= B)%nat ->
  Rabs (E_batch B m p (fun batch => total N batch / total L batch)
        - (mean_N / mean_L + / INR B * (mean_N * variance / mean_L ^ 3)))
  <= K / INR B ^ 2.

(** A false twin: under a mean over tokens a constant is a baseline. *)
Definition T11_twin_constants_are_baselines : Prop :=
  forall (m : nat) (p : R -> nat -> R) (L : nat -> R) (θ c : R),
  student m p θ ->
  (forall i, (i < m)%nat -> 0 < L i) ->
  E m (p θ) (fun i => c * score p θ i / L i) = 0.

(** * Proofs: batches *)

Theorem T11_sum_over_rollouts_holds : T11_sum_over_rollouts.
Proof. intros B m p N some is_p. now apply E_batch_mean. Qed.

Theorem T11_quotient_holds : T11_quotient.
Proof.
  intros B m p N L some is_p positive_L quotient length_B covariance.
  assert (0 < INR B) by (apply lt_0_INR; lia).
  assert (positive_mean : 0 < E m p L).
  { apply sum_positive; [| intros i lt; apply Rmult_lt_0_compat; [now apply is_p | auto]].
    destruct m; [| lia]. destruct is_p as [_ one]. simpl in one. lra. }
  assert (product : E_batch B m p (fun batch => quotient batch * length_B batch) = E m p N).
  { rewrite <- (E_batch_mean B m p N some is_p). apply E_batch_ext. intros batch all.
    assert (0 < total L batch) by now apply (total_positive B m).
    unfold quotient, length_B. field. lra. }
  unfold covariance. rewrite product. unfold length_B. rewrite E_batch_mean by assumption.
  change (E_batch B m p (fun batch => quotient batch)) with (E_batch B m p quotient). field. lra.
Qed.

(** * Proofs: the expansion *)

(** The quotient of two sums with the deviations X and Y from B a and B c, expanded to the third order in v = Y/(B c);
    what is left is the quotient itself times v⁴. *)
Lemma quotient_expanded B a c X Y :
  0 < B -> 0 < c -> 0 < B * c + Y ->
  (B * a + X) / (B * c + Y)
  = a / c + (- a / (B * c ^ 2) * Y + (/ (B * c) * X
    + (- / (B ^ 2 * c ^ 2) * (X * Y) + (a / (B ^ 2 * c ^ 3) * (Y * Y)
    + (/ (B ^ 3 * c ^ 3) * (X * Y * Y) + (- a / (B ^ 3 * c ^ 4) * (Y * Y * Y)
    + / (B ^ 4 * c ^ 4) * (- X * Y ^ 3 + (B * a + X) / (B * c + Y) * Y ^ 4))))))).
Proof. intros hB hc positive. field. repeat split; lra. Qed.

(** |x y³| ≤ x⁴ + y⁴. *)
Lemma product_bound x y : Rabs (x * y ^ 3) <= x ^ 4 + y ^ 4.
Proof.
  assert (0 <= (x ^ 2 - y ^ 2) ^ 2) by apply pow2_ge_0. assert (0 <= (x * y - y ^ 2) ^ 2) by apply pow2_ge_0.
  assert (0 <= (x * y + y ^ 2) ^ 2) by apply pow2_ge_0. assert (0 <= (x ^ 2 + y ^ 2) ^ 2) by apply pow2_ge_0.
  apply Rabs_le. split; nra.
Qed.

(** A bound M of the quotients |N_i|/L_i. *)
Lemma quotients_bounded m N L :
  (forall i, (i < m)%nat -> 0 < L i) ->
  exists M, 0 <= M /\ forall i, (i < m)%nat -> Rabs (N i) <= M * L i.
Proof.
  intros positive_L.
  assert (nonneg : forall i, (i < m)%nat -> 0 <= Rabs (N i) / L i).
  { intros i lt. apply Rmult_le_pos; [apply Rabs_pos | apply Rlt_le, Rinv_0_lt_compat; auto]. }
  exists (Σ i < m, Rabs (N i) / L i). split; [now apply sum_nonneg |]. intros i lt.
  assert (below : Rabs (N i) / L i <= Σ i < m, Rabs (N i) / L i).
  { rewrite (sum_split m _ i lt).
    assert (0 <= Σ b < m, (if Nat.eqb b i then 0 else Rabs (N b) / L b)); [| lra].
    apply sum_nonneg. intros b lt_b. destruct (Nat.eqb b i); [lra | auto]. }
  apply (Rmult_le_compat_r (L i)) in below; [| now apply Rlt_le, positive_L].
  assert (0 < L i) by auto. replace (Rabs (N i) / L i * L i) with (Rabs (N i)) in below by (field; lra). exact below.
Qed.

Theorem T11_expansion_holds : T11_expansion.
Proof.
  intros m p N L is_p positive_L a c covariance variance.
  assert (hc : 0 < c).
  { apply sum_positive; [| intros i lt; apply Rmult_lt_0_compat; [now apply is_p | auto]].
    destruct m; [| lia]. destruct is_p as [_ one]. simpl in one. lra. }
  set (x := fun i => N i - a). set (y := fun i => L i - c).
  assert (zero_x : E m p x = 0) by now apply centred_mean.
  assert (zero_y : E m p y = 0) by now apply centred_mean.
  destruct (quotients_bounded m N L positive_L) as [M [hM bound_M]].
  set (third_x := E m p (fun i => x i * y i * y i)). set (third_y := E m p (fun i => y i * y i * y i)).
  set (fourth_x := E m p (fun i => x i ^ 4) + 3 * E m p (fun i => x i * x i) ^ 2).
  set (fourth_y := E m p (fun i => y i ^ 4) + 3 * E m p (fun i => y i * y i) ^ 2).
  exists (Rabs (/ c ^ 3 * third_x - a / c ^ 4 * third_y) + / c ^ 4 * (fourth_x + (1 + M) * fourth_y)).
  intros B some. assert (hB : 0 < INR B) by (apply lt_0_INR; lia). set (b := INR B) in *.
  set (Q := fun batch => total N batch / total L batch).
  set (X := fun batch => total x batch). set (Y := fun batch => total y batch).
  set (left_over := fun batch => - X batch * Y batch ^ 3 + Q batch * Y batch ^ 4).
  (* The mean of the expansion, term by term. *)
  assert (expanded : E_batch B m p Q = a / c + (- / (b * c ^ 2) * covariance + (a / (b * c ^ 3) * variance
    + / b ^ 2 * (/ c ^ 3 * third_x - a / c ^ 4 * third_y)
    + / (b ^ 4 * c ^ 4) * E_batch B m p left_over))).
  { rewrite (E_batch_ext B m p Q (fun batch => a / c + (- a / (b * c ^ 2) * total y batch
      + (/ (b * c) * total x batch + (- / (b ^ 2 * c ^ 2) * (total x batch * total y batch)
      + (a / (b ^ 2 * c ^ 3) * (total y batch * total y batch)
      + (/ (b ^ 3 * c ^ 3) * (total x batch * total y batch * total y batch)
      + (- a / (b ^ 3 * c ^ 4) * (total y batch * total y batch * total y batch)
      + / (b ^ 4 * c ^ 4) * left_over batch)))))))).
    - rewrite !E_batch_plus, !E_batch_scale, E_batch_const, !centred_total, !second_moment, !third_moment by assumption.
      fold b. change (E m p (fun i => x i * y i)) with covariance.
      replace (E m p (fun i => y i * y i)) with variance by (apply E_ext; intros; unfold y; ring).
      fold third_x third_y. field. lra.
    - intros batch all. assert (positive_total := total_positive B m L batch positive_L all some).
      assert (as_x : total N batch = b * a + total x batch).
      { unfold x. rewrite (total_centred B m) by assumption. fold b. ring. }
      assert (as_y : total L batch = b * c + total y batch).
      { unfold y. rewrite (total_centred B m) by assumption. fold b. ring. }
      unfold left_over, Q, X, Y. rewrite as_x, as_y. apply quotient_expanded; [assumption | assumption | lra]. }
  (* What is left over is of the order of B². *)
  assert (small : Rabs (E_batch B m p left_over) <= b ^ 2 * (fourth_x + (1 + M) * fourth_y)).
  { eapply Rle_trans; [apply (E_batch_abs B m p _ (fun batch => total x batch ^ 4 + (1 + M) * total y batch ^ 4)) |].
    - apply is_p.
    - intros batch all. assert (positive_total := total_positive B m L batch positive_L all some).
      assert (quotient : Rabs (Q batch) <= M).
      { unfold Q, Rdiv. rewrite Rabs_mult, Rabs_inv, (Rabs_pos_eq (total L batch)) by lra.
        apply (Rmult_le_reg_r (total L batch)); [assumption |]. rewrite Rmult_assoc, Rinv_l, Rmult_1_r by lra.
        now apply (total_bound B m). }
      assert (product := product_bound (X batch) (Y batch)).
      assert (fourth : 0 <= Y batch ^ 4) by (replace (Y batch ^ 4) with ((Y batch ^ 2) ^ 2) by ring; apply pow2_ge_0).
      unfold left_over. eapply Rle_trans; [apply Rabs_triang |].
      replace (- X batch * Y batch ^ 3) with (- (X batch * Y batch ^ 3)) by ring.
      rewrite Rabs_Ropp, (Rabs_mult (Q batch)), (Rabs_pos_eq (Y batch ^ 4)) by assumption.
      fold (X batch) (Y batch). nra.
    - rewrite E_batch_plus, E_batch_scale.
      assert (of_x := fourth_moment_bound B m p x some is_p zero_x).
      assert (of_y := fourth_moment_bound B m p y some is_p zero_y).
      fold b fourth_x in of_x. fold b fourth_y in of_y. nra. }
  rewrite expanded.
  replace (a / c + (- / (b * c ^ 2) * covariance + (a / (b * c ^ 3) * variance
    + / b ^ 2 * (/ c ^ 3 * third_x - a / c ^ 4 * third_y) + / (b ^ 4 * c ^ 4) * E_batch B m p left_over))
    - (a / c + / b * (- covariance / c ^ 2 + a * variance / c ^ 3)))
    with (/ b ^ 2 * (/ c ^ 3 * third_x - a / c ^ 4 * third_y) + / (b ^ 4 * c ^ 4) * E_batch B m p left_over)
    by (field; lra).
  assert (inverse_b : 0 < / b ^ 2) by (apply Rinv_0_lt_compat, pow_lt; assumption).
  assert (inverse_c : 0 < / c ^ 4) by (apply Rinv_0_lt_compat, pow_lt; assumption).
  eapply Rle_trans; [apply Rabs_triang |]. rewrite !Rabs_mult.
  replace (/ (b ^ 4 * c ^ 4)) with (/ b ^ 2 * / b ^ 2 * / c ^ 4) by (field; lra).
  rewrite (Rabs_pos_eq (/ b ^ 2)), (Rabs_pos_eq (/ b ^ 2 * / b ^ 2 * / c ^ 4)).
  - apply (Rmult_le_compat_l (/ b ^ 2 * / b ^ 2 * / c ^ 4)) in small.
    + replace (/ b ^ 2 * / b ^ 2 * / c ^ 4 * (b ^ 2 * (fourth_x + (1 + M) * fourth_y)))
        with (/ b ^ 2 * (/ c ^ 4 * (fourth_x + (1 + M) * fourth_y))) in small by (field; lra).
      unfold Rdiv at 1. lra.
    + repeat apply Rmult_le_pos; lra.
  - repeat apply Rmult_le_pos; lra.
  - lra.
Qed.

(** * Proofs: constants *)

Theorem T11_sum_over_tokens_holds : T11_sum_over_tokens.
Proof. intros m p θ c is_student. rewrite E_scale, (score_mean m) by assumption. ring. Qed.

Theorem T11_mean_over_tokens_holds : T11_mean_over_tokens.
Proof.
  intros m p L θ c is_student.
  exists (Σ i < m, p θ i * score p θ i * / L i). split.
  - apply (sum_derive m (fun t i => p t i * / L i)). intros i lt.
    eapply derive_value.
    + apply derive_mult; [now apply (probability_derive m) | apply derive_const].
    + simpl. ring.
  - unfold E. rewrite <- sum_scale. apply sum_ext. intros. unfold Rdiv. ring.
Qed.

Theorem T11_equal_lengths_holds : T11_equal_lengths.
Proof.
  intros m p l θ c is_student.
  rewrite (E_ext m _ _ (fun i => c / l * score p θ i)) by (intros; unfold Rdiv; ring).
  now apply T11_sum_over_tokens_holds.
Qed.

Theorem T11_counterexample_holds : T11_counterexample.
Proof. repeat split; vm_compute; reflexivity. Qed.

Theorem T11_the_student_of_the_counterexample_holds : T11_the_student_of_the_counterexample.
Proof.
  intros i lt. assert (score_i := softmax_score 2 (fun _ => 0) 0 i ltac:(lia) lt).
  destruct i as [| [| i]]; [| | lia]; cbv zeta; simpl nth; simpl probability; simpl scores;
    rewrite score_i; fold even; rewrite !even_half; unfold indicator, Q2R; simpl; split; lra.
Qed.

(** * Proofs: the twins *)

(** Where N is the length itself the quotient is one, with no bias. With lengths one and two the twin says 1/(9 B). *)
Theorem T11_twin_covariance_dropped_is_false : ~ T11_twin_covariance_dropped.
Proof.
  intros twin. set (p := fun _ : nat => 1 / 2). set (L := fun i => if Nat.eqb i 0 then 1 else 2).
  assert (is_p : distribution 2 p) by (split; [intros i _; unfold p; lra | unfold p; simpl; field]).
  assert (positive_L : forall i, (i < 2)%nat -> 0 < L i).
  { intros i _. unfold L. destruct (Nat.eqb i 0); lra. }
  destruct (twin 2%nat p L L is_p positive_L) as [K bound].
  destruct (nfloor_ex (9 * Rabs K)) as [n [_ large]].
  { assert (0 <= Rabs K) by apply Rabs_pos. lra. }
  rewrite <- S_INR in large. specialize (bound (S n) ltac:(lia)).
  assert (one : E_batch (S n) 2 p (fun batch => total L batch / total L batch) = 1).
  { rewrite (E_batch_ext (S n) 2 p _ (fun _ => 1)); [now apply E_batch_const |].
    intros batch all. assert (0 < total L batch) by (apply (total_positive (S n) 2); auto; lia). field. lra. }
  rewrite one in bound. assert (hB : 0 < INR (S n)) by (apply lt_0_INR; lia).
  set (b := INR (S n)) in *.
  assert (mean_L : E 2 p L = 3 / 2) by (unfold E, p, L; simpl; field).
  replace (E 2 p (fun i => (L i - E 2 p L) ^ 2)) with (1 / 4) in bound.
  2: { rewrite mean_L. unfold E, p, L. simpl. field. }
  rewrite mean_L in bound.
  replace (1 - (3 / 2 / (3 / 2) + / b * (3 / 2 * (1 / 4) / (3 / 2) ^ 3))) with (- (/ (9 * b))) in bound by (field; lra).
  rewrite Rabs_Ropp, Rabs_pos_eq in bound by (apply Rlt_le, Rinv_0_lt_compat; lra).
  apply (Rmult_le_compat_r (9 * b ^ 2)) in bound; [| assert (0 < b ^ 2) by (apply pow_lt; lra); lra].
  replace (/ (9 * b) * (9 * b ^ 2)) with b in bound by (field; lra).
  replace (K / b ^ 2 * (9 * b ^ 2)) with (9 * K) in bound by (field; lra).
  assert (K <= Rabs K) by apply Rle_abs. lra.
Qed.

Theorem T11_twin_constants_are_baselines_is_false : ~ T11_twin_constants_are_baselines.
Proof.
  intros twin.
  assert (false := twin 2%nat _ (fun i => INR (S i)) _ 1 (softmax_student 2 even 0 ltac:(lia))
                     ltac:(intros; apply lt_0_INR; lia)).
  revert false. rewrite softmax_of_its_logit. unfold E. simpl.
  rewrite !softmax_score, !even_half by lia. unfold indicator. simpl. lra.
Qed.
