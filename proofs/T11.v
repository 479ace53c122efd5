(** T11, sum over tokens and mean over tokens (docs/theory/t11.md).

      E[(1/B) Σ_b N_b] = N̄;   E[Σ_b N_b/Σ_b L_b] = N̄/L̄ - Cov(Σ_b N_b/Σ_b L_b, Σ_b L_b/B)/L̄;
      under a mean over tokens a constant is no baseline: E[c S/L] = c ∇ E[1/L], where E[c S] = 0.

    Not here: the expansion of the bias in powers of 1/B. *)

From Coq Require Import Reals QArith Qreals Lra Lia List.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence T1.
Import ListNotations.
Open Scope R_scope.

(** * Statements *)

(** The mean over all batches of B independent rollouts. What a rollout may be is numbered 0, ..., m - 1, with the
    probabilities p; a batch is a list of such numbers. *)
Fixpoint E_batch (B m : nat) (p : nat -> R) (g : list nat -> R) : R :=
  match B with
  | O => g []
  | S fewer => E m p (fun i => E_batch fewer m p (fun others => g (i :: others)))
  end.

(** The sum Σ_b x_b over the rollouts of a batch. *)
Definition total (x : nat -> R) (batch : list nat) : R := fold_right (fun i rest => x i + rest) 0 batch.

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

(** A false twin: under a mean over tokens a constant is a baseline. *)
Definition T11_twin_constants_are_baselines : Prop :=
  forall (m : nat) (p : R -> nat -> R) (L : nat -> R) (θ c : R),
  student m p θ ->
  (forall i, (i < m)%nat -> 0 < L i) ->
  E m (p θ) (fun i => c * score p θ i / L i) = 0.

(** * Proofs: batches *)

Lemma E_batch_ext B m p g h :
  (forall batch, length batch = B -> List.Forall (fun i => (i < m)%nat) batch -> g batch = h batch) ->
  E_batch B m p g = E_batch B m p h.
Proof.
  revert g h. induction B as [| B IH]; intros g h same; simpl; [now apply same |].
  apply E_ext. intros i lt. apply IH. intros batch size all. apply same; [now simpl; f_equal | now constructor].
Qed.

Lemma E_batch_scale B m p c g : E_batch B m p (fun batch => c * g batch) = c * E_batch B m p g.
Proof.
  revert g. induction B as [| B IH]; intros g; simpl; [reflexivity |].
  rewrite <- E_scale. apply E_ext. intros i _. apply (IH (fun batch => g (i :: batch))).
Qed.

(** Each rollout adds its own mean. *)
Lemma E_batch_total B m p x : distribution m p -> E_batch B m p (total x) = INR B * E m p x.
Proof.
  intros [_ one].
  assert (shifted : forall c, E_batch B m p (fun batch => c + total x batch) = c + INR B * E m p x).
  { induction B as [| B IH]; intros c; [simpl; ring |]. rewrite S_INR. simpl E_batch.
    rewrite (E_ext m p _ (fun i => (c + INR B * E m p x) + x i)).
    - rewrite E_plus, E_const, one. change (E m p (fun i => x i)) with (E m p x). ring.
    - intros i _. rewrite (E_batch_ext B m p _ (fun batch => (c + x i) + total x batch)); [rewrite IH; ring |].
      intros batch _ _. simpl. ring. }
  rewrite <- (Rplus_0_l (INR B * E m p x)), <- shifted.
  apply E_batch_ext. intros. ring.
Qed.

Lemma E_batch_mean B m p x :
  (1 <= B)%nat -> distribution m p -> E_batch B m p (fun batch => total x batch / INR B) = E m p x.
Proof.
  intros some is_p. assert (0 < INR B) by (apply lt_0_INR; lia).
  rewrite (E_batch_ext B m p _ (fun batch => / INR B * total x batch)) by (intros; unfold Rdiv; ring).
  rewrite E_batch_scale. change (E_batch B m p (fun batch => total x batch)) with (E_batch B m p (total x)).
  rewrite E_batch_total by assumption. field. lra.
Qed.

Theorem T11_sum_over_rollouts_holds : T11_sum_over_rollouts.
Proof. intros B m p N some is_p. now apply E_batch_mean. Qed.

Lemma total_positive m L batch :
  (forall i, (i < m)%nat -> 0 < L i) -> List.Forall (fun i => (i < m)%nat) batch -> (1 <= length batch)%nat ->
  0 < total L batch.
Proof.
  intros positive_L all. induction all as [| i batch lt all IH]; simpl; [lia |]. intros _.
  assert (0 < L i) by auto. destruct batch as [| j batch]; [simpl; lra |].
  assert (0 < total L (j :: batch)) by (apply IH; simpl; lia). lra.
Qed.

Theorem T11_quotient_holds : T11_quotient.
Proof.
  intros B m p N L some is_p positive_L quotient length_B covariance.
  assert (0 < INR B) by (apply lt_0_INR; lia).
  assert (positive_mean : 0 < E m p L).
  { apply sum_positive; [| intros i lt; apply Rmult_lt_0_compat; [now apply is_p | auto]].
    destruct m; [| lia]. destruct is_p as [_ one]. simpl in one. lra. }
  assert (product : E_batch B m p (fun batch => quotient batch * length_B batch) = E m p N).
  { rewrite <- (E_batch_mean B m p N some is_p). apply E_batch_ext. intros batch size all.
    assert (0 < total L batch) by (apply (total_positive m); [assumption | assumption | lia]).
    unfold quotient, length_B. field. lra. }
  unfold covariance. rewrite product. unfold length_B. rewrite E_batch_mean by assumption.
  change (E_batch B m p (fun batch => quotient batch)) with (E_batch B m p quotient). field. lra.
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

(** * Proofs: the twin *)

Theorem T11_twin_constants_are_baselines_is_false : ~ T11_twin_constants_are_baselines.
Proof.
  intros twin.
  assert (false := twin 2%nat _ (fun i => INR (S i)) _ 1 (softmax_student 2 even 0 ltac:(lia))
                     ltac:(intros; apply lt_0_INR; lia)).
  revert false. rewrite softmax_of_its_logit. unfold E. simpl.
  rewrite !softmax_score, !even_half by lia. unfold indicator. simpl. lra.
Qed.
