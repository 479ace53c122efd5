(** Batches of independent rollouts: means over them, and the moments of their sums. *)

From Coq Require Import Reals Lra Lia List.
From Coquelicot Require Import Coquelicot.
From OPD Require Import Divergence.
Import ListNotations.
Open Scope R_scope.

(** The mean over all batches of B independent rollouts. What a rollout may be is numbered 0, ..., m - 1, with the
    probabilities p; a batch is a list of such numbers. *)
Fixpoint E_batch (B m : nat) (p : nat -> R) (g : list nat -> R) : R :=
  match B with
  | O => g []
  | S fewer => E m p (fun i => E_batch fewer m p (fun others => g (i :: others)))
  end.

(** The sum Σ_b x_b over the rollouts of a batch. *)
Definition total (x : nat -> R) (batch : list nat) : R := fold_right (fun i rest => x i + rest) 0 batch.

(** * A mean over batches is linear and keeps the order *)

(** A batch of B rollouts. *)
Definition is_batch (B m : nat) (batch : list nat) : Prop :=
  length batch = B /\ List.Forall (fun i => (i < m)%nat) batch.

Lemma is_batch_cons B m i batch : (i < m)%nat -> is_batch B m batch -> is_batch (S B) m (i :: batch).
Proof. intros lt [size all]. split; [now simpl; f_equal | now constructor]. Qed.

Lemma E_batch_ext B m p g h :
  (forall batch, is_batch B m batch -> g batch = h batch) -> E_batch B m p g = E_batch B m p h.
Proof.
  revert g h. induction B as [| B IH]; intros g h same; simpl; [apply same; now split |].
  apply E_ext. intros i lt. apply IH. intros batch all. now apply same, is_batch_cons.
Qed.

Lemma E_batch_scale B m p c g : E_batch B m p (fun batch => c * g batch) = c * E_batch B m p g.
Proof.
  revert g. induction B as [| B IH]; intros g; simpl; [reflexivity |].
  rewrite <- E_scale. apply E_ext. intros i _. apply (IH (fun batch => g (i :: batch))).
Qed.

Lemma E_batch_plus B m p g h :
  E_batch B m p (fun batch => g batch + h batch) = E_batch B m p g + E_batch B m p h.
Proof.
  revert g h. induction B as [| B IH]; intros g h; simpl; [reflexivity |].
  rewrite <- E_plus. apply E_ext. intros i _. apply (IH (fun batch => g (i :: batch)) (fun batch => h (i :: batch))).
Qed.

Lemma E_batch_const B m p c : distribution m p -> E_batch B m p (fun _ => c) = c.
Proof.
  intros is_p. induction B as [| B IH]; simpl; [reflexivity |].
  rewrite (E_ext m p _ (fun _ => c)) by (intros; apply IH). destruct is_p as [_ one]. rewrite E_const, one. ring.
Qed.

Lemma E_batch_le B m p g h :
  positive m p -> (forall batch, is_batch B m batch -> g batch <= h batch) -> E_batch B m p g <= E_batch B m p h.
Proof.
  intros positive_p. revert g h. induction B as [| B IH]; intros g h le; simpl; [apply le; now split |].
  apply sum_le. intros i lt. apply Rmult_le_compat_l; [now apply Rlt_le, positive_p |].
  apply IH. intros batch all. now apply le, is_batch_cons.
Qed.

Lemma E_batch_abs B m p g h :
  positive m p -> (forall batch, is_batch B m batch -> Rabs (g batch) <= h batch) ->
  Rabs (E_batch B m p g) <= E_batch B m p h.
Proof.
  intros positive_p bound. apply Rabs_le. split.
  - replace (- E_batch B m p h) with (E_batch B m p (fun batch => -1 * h batch)) by (rewrite E_batch_scale; ring).
    apply E_batch_le; [assumption |]. intros batch all. apply bound, Rabs_le_between in all. lra.
  - apply E_batch_le; [assumption |]. intros batch all. apply bound, Rabs_le_between in all. lra.
Qed.

(** * Sums *)

Lemma total_positive B m L batch :
  (forall i, (i < m)%nat -> 0 < L i) -> is_batch B m batch -> (1 <= B)%nat -> 0 < total L batch.
Proof.
  intros positive_L [<- all]. induction all as [| i batch lt all IH]; simpl; [lia |]. intros _.
  assert (0 < L i) by auto. destruct batch as [| j batch]; [simpl; lra |].
  assert (0 < total L (j :: batch)) by (apply IH; simpl; lia). lra.
Qed.

(** |Σ N| ≤ M Σ L where |N| ≤ M L. *)
Lemma total_bound B m N L M batch :
  (forall i, (i < m)%nat -> Rabs (N i) <= M * L i) -> is_batch B m batch ->
  Rabs (total N batch) <= M * total L batch.
Proof.
  intros bound [_ all]. induction all as [| i batch lt all IH]; simpl; [rewrite Rabs_R0; lra |].
  eapply Rle_trans; [apply Rabs_triang |]. specialize (bound i lt). lra.
Qed.

(** Σ (x - c) = Σ x - B c. *)
Lemma total_centred B m x c batch :
  is_batch B m batch -> total (fun i => x i - c) batch = total x batch - INR B * c.
Proof.
  intros [<- _]. induction batch as [| i batch IH]; [simpl; ring |].
  change (length (i :: batch)) with (S (length batch)). rewrite S_INR. simpl. rewrite IH. ring.
Qed.

Lemma centred_mean m p x : distribution m p -> E m p (fun i => x i - E m p x) = 0.
Proof. intros [_ one]. rewrite E_minus, E_const, one. change (E m p (fun i => x i)) with (E m p x). ring. Qed.

(** Each rollout adds its own mean. *)
Lemma E_batch_total B m p x : distribution m p -> E_batch B m p (total x) = INR B * E m p x.
Proof.
  intros is_p. induction B as [| B IH]; [simpl; ring |]. rewrite S_INR. simpl E_batch.
  rewrite (E_ext m p _ (fun i => x i + INR B * E m p x)).
  - destruct is_p as [_ one]. rewrite E_plus, E_const, one. change (E m p (fun i => x i)) with (E m p x). ring.
  - intros i _. change (fun others => total x (i :: others)) with (fun others => x i + total x others).
    rewrite (E_batch_plus B m p (fun _ => x i) (total x)), E_batch_const, IH by assumption. reflexivity.
Qed.

Lemma E_batch_mean B m p x :
  (1 <= B)%nat -> distribution m p -> E_batch B m p (fun batch => total x batch / INR B) = E m p x.
Proof.
  intros some is_p. assert (0 < INR B) by (apply lt_0_INR; lia).
  rewrite (E_batch_ext B m p _ (fun batch => / INR B * total x batch)) by (intros; unfold Rdiv; ring).
  rewrite E_batch_scale. change (E_batch B m p (fun batch => total x batch)) with (E_batch B m p (total x)).
  rewrite E_batch_total by assumption. field. lra.
Qed.

(** * Moments of sums of independent terms with mean zero *)

Lemma centred_total B m p x : distribution m p -> E m p x = 0 -> E_batch B m p (fun batch => total x batch) = 0.
Proof.
  intros is_p zero. change (E_batch B m p (fun batch => total x batch)) with (E_batch B m p (total x)).
  rewrite E_batch_total, zero by assumption. ring.
Qed.

(** E[X Y] = B E[x y]. *)
Lemma second_moment B m p x y :
  distribution m p -> E m p x = 0 -> E m p y = 0 ->
  E_batch B m p (fun batch => total x batch * total y batch) = INR B * E m p (fun i => x i * y i).
Proof.
  intros is_p zero_x zero_y. induction B as [| B IH]; [simpl; ring |]. rewrite S_INR. simpl E_batch.
  rewrite (E_ext m p _ (fun i => x i * y i + INR B * E m p (fun i => x i * y i))).
  - rewrite E_plus, E_const, (proj2 is_p). ring.
  - intros i _.
    rewrite (E_batch_ext B m p _ (fun batch => x i * y i + (x i * total y batch + (y i * total x batch
               + total x batch * total y batch)))) by (intros; simpl; ring).
    rewrite !E_batch_plus, !E_batch_scale, E_batch_const, !centred_total, IH by assumption. ring.
Qed.

(** E[X Y Z] = B E[x y z]. *)
Lemma third_moment B m p x y z :
  distribution m p -> E m p x = 0 -> E m p y = 0 -> E m p z = 0 ->
  E_batch B m p (fun batch => total x batch * total y batch * total z batch)
  = INR B * E m p (fun i => x i * y i * z i).
Proof.
  intros is_p zero_x zero_y zero_z. induction B as [| B IH]; [simpl; ring |]. rewrite S_INR. simpl E_batch.
  rewrite (E_ext m p _ (fun i => x i * y i * z i + (INR B * E m p (fun i => y i * z i) * x i
             + (INR B * E m p (fun i => x i * z i) * y i + (INR B * E m p (fun i => x i * y i) * z i
             + INR B * E m p (fun i => x i * y i * z i)))))).
  - rewrite !E_plus, !E_scale, E_const, (proj2 is_p).
    change (E m p (fun i => x i)) with (E m p x). change (E m p (fun i => y i)) with (E m p y).
    change (E m p (fun i => z i)) with (E m p z). rewrite zero_x, zero_y, zero_z. ring.
  - intros i _.
    rewrite (E_batch_ext B m p _ (fun batch => x i * y i * z i + (x i * y i * total z batch
      + (x i * z i * total y batch + (y i * z i * total x batch
      + (x i * (total y batch * total z batch) + (y i * (total x batch * total z batch)
      + (z i * (total x batch * total y batch) + total x batch * total y batch * total z batch)))))))).
    2: { intros. simpl. ring. }
    rewrite !E_batch_plus, !E_batch_scale, E_batch_const, !centred_total, !second_moment, IH by assumption. ring.
Qed.

(** E[Y⁴] = B E[y⁴] + 3 B (B - 1) E[y²]². *)
Lemma fourth_moment B m p y :
  distribution m p -> E m p y = 0 ->
  E_batch B m p (fun batch => total y batch ^ 4)
  = INR B * E m p (fun i => y i ^ 4) + 3 * INR B * (INR B - 1) * E m p (fun i => y i * y i) ^ 2.
Proof.
  intros is_p zero_y. induction B as [| B IH]; [simpl; ring |]. rewrite S_INR. simpl E_batch.
  set (v := E m p (fun i => y i * y i)) in *. set (t := E m p (fun i => y i * y i * y i)).
  set (f := E m p (fun i => y i ^ 4)) in *. set (before := INR B * f + 3 * INR B * (INR B - 1) * v ^ 2) in *.
  rewrite (E_ext m p _ (fun i => y i ^ 4 + (6 * INR B * v * (y i * y i) + (4 * INR B * t * y i + before)))).
  - rewrite !E_plus, !E_scale, E_const, (proj2 is_p). fold v f.
    change (E m p (fun i => y i)) with (E m p y). rewrite zero_y. unfold before. ring.
  - intros i _.
    rewrite (E_batch_ext B m p _ (fun batch => y i ^ 4 + (4 * y i ^ 3 * total y batch
      + (6 * y i ^ 2 * (total y batch * total y batch)
      + (4 * y i * (total y batch * total y batch * total y batch) + total y batch ^ 4))))).
    2: { intros. simpl. ring. }
    rewrite !E_batch_plus, !E_batch_scale, E_batch_const, centred_total, second_moment, third_moment, IH by assumption.
    unfold v, t. ring.
Qed.

(** So it is at most of the order of B². *)
Lemma fourth_moment_bound B m p y :
  (1 <= B)%nat -> distribution m p -> E m p y = 0 ->
  E_batch B m p (fun batch => total y batch ^ 4)
  <= INR B ^ 2 * (E m p (fun i => y i ^ 4) + 3 * E m p (fun i => y i * y i) ^ 2).
Proof.
  intros some is_p zero_y. rewrite fourth_moment by assumption.
  assert (one : 1 <= INR B) by (apply (le_INR 1); assumption).
  assert (0 <= E m p (fun i => y i ^ 4)).
  { apply sum_nonneg. intros i lt. apply Rmult_le_pos; [now apply Rlt_le, is_p |].
    replace (y i ^ 4) with ((y i ^ 2) ^ 2) by ring. apply pow2_ge_0. }
  assert (0 <= E m p (fun i => y i * y i) ^ 2) by apply pow2_ge_0.
  assert (INR B <= INR B ^ 2) by nra. nra.
Qed.
