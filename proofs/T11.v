(** T11, sum over tokens and mean over tokens (docs/theory/t11.md): under a mean over tokens a constant is no baseline.

      E[c S/L] = c ∇ E[1/L], which need not be zero; E[c S] = 0. *)

From Coq Require Import Reals QArith Qreals Lra Lia List.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence T1.
Import ListNotations.
Open Scope R_scope.

(** * Statements *)

(** What the student may sample, one rollout or a batch of them, is numbered 0, ..., m - 1. Its probability under the
    student p_θ is p_θ(i), the sum S_i of its tokens' scores is the score of that probability, and L_i is its number of
    tokens. Under a sum over tokens a constant weight c is a baseline: E[c S] = 0. *)
Definition T11_sum_over_tokens : Prop :=
  forall (m : nat) (p : R -> nat -> R) (θ c : R),
  student m p θ ->
  E m (p θ) (fun i => c * score p θ i) = 0.

(** Under a mean over tokens its mean is c times the gradient of E[1/L]. (That lengths are positive is not needed.) *)
Definition T11_mean_over_tokens : Prop :=
  forall (m : nat) (p : R -> nat -> R) (L : nat -> R) (θ c : R),
  student m p θ ->
  exists g : R,
    is_derive (fun t : R => E m (p t) (fun i => / L i)) θ g /\
    E m (p θ) (fun i => c * score p θ i / L i) = c * g.

(** If all have the same number of tokens, that is zero. *)
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

(** * Proofs *)

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
