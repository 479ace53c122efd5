"""Token-level losses, most of 2025 and 2026, written from their descriptions, as functions `loss(rollouts) -> scalar`.

The code is our own. Each docstring or comment links the source, says what of it could be read (the code, a quotation,
or other people's notes on the paper), and what is uncertain or left out. Unless it says otherwise a loss is summed over
tokens, whatever mean its source takes. Top k means top 2, which suits the small vocabularies of an audit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_advantage, from_logits, from_logprobs

_K = 2
_LOGITS = ("student_logits", "teacher_logits", None)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """The sum of `one (log one - log other)` over the last axis; its arguments need not be normalised."""
    return (one.exp() * (one - other)).sum(-1)


def _laws(r: opd.Rollouts) -> tuple[Tensor, Tensor]:
    return r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)


def _on_top(of: Tensor, *log_laws: Tensor, k: int = _K) -> tuple[Tensor, ...]:
    """The log-probabilities of the k tokens that are likeliest under `of`, not renormalised."""
    ids = of.topk(k, -1).indices
    return tuple(log_law.gather(-1, ids) for log_law in log_laws)


def _forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_q, log_p)


def _top_forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _forward(*_on_top(log_q, log_p, log_q))


def _entropy(log_law: Tensor) -> Tensor:
    return -(log_law.exp() * log_law).sum(-1)


def _whole(f: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss from a function of the two whole distributions, as log-probabilities."""

    def loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return f(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1))

    return from_logits(loss, names=_LOGITS)


# OPSD, https://arxiv.org/abs/2601.18734: the forward KL on the student's rollouts, over the whole vocabulary. What the
# teacher sees beyond the prompt is no part of the loss.
opsd_forward_kl = _whole(_forward)


def _opsd_clipped(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).clamp(max=0.05).sum(-1)


# The same with each entry of the vocabulary clipped from above before the sum. Read from copies of
# https://github.com/siyan-zhao/OPSD that have the option `jsd_token_clip`, whose scripts set 0.05; the snapshot of that
# repository that we could read has no clip. Some other copies clip the sum over the vocabulary instead.
opsd_forward_kl_clipped = _whole(_opsd_clipped)


def _eopd(forward: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(r: opd.Rollouts) -> Tensor:
        log_p, log_q = _laws(r)
        uncertain = (_entropy(log_q) > 0.8).to(log_q)
        return r.token_sum(-r.log_u.detach() * r.student_logprobs + uncertain * forward(log_p, log_q))

    return loss


# EOPD, https://arxiv.org/abs/2603.07079: the log-ratio of the sampled token as a reward, plus the forward KL on the
# teacher's top k where the teacher's entropy exceeds a threshold. From the abstract and from two notes on the paper
# that agree on this; a third describes a gradual gate between the two KLs. The threshold 0.8 (and k = 16) are in one
# note only; the coefficient of the forward KL, which the other leaves open, is 1. PPO's clip, idle on fresh rollouts,
# is left out. `eopd` has the forward KL over the whole vocabulary, which is not in the notes.
eopd = _eopd(_forward)
eopd_top_2 = _eopd(_top_forward)


def _trust(r: opd.Rollouts) -> Tensor:
    return r.log_u.detach().clamp(max=0.0).exp()


def tropd_mask(r: opd.Rollouts) -> Tensor:
    """TrOPD with masked outliers, https://arxiv.org/abs/2606.01249: the log-ratio as a reward, on trusted tokens only.

    From the abstract and from one set of notes on the paper, which says that a token is trusted with probability
    min(u, 1); this is the mean over that draw. The prefixes written by the teacher are left out.
    """
    return r.token_sum(-(_trust(r) * r.log_u.detach()) * r.student_logprobs)


def tropd_forward_top_2(r: opd.Rollouts) -> Tensor:
    """The same with the forward KL on the teacher's top k (k = 64 in the notes) on the other tokens."""
    return tropd_mask(r) + r.token_sum((1.0 - _trust(r)) * _top_forward(*_laws(r)))


# REOPOLD, https://arxiv.org/abs/2603.11137: the log-ratio as a reward, clipped from below at log(a / (1 - a)). From the
# abstract, from a note on the paper and from an unofficial implementation, whose default is a = 0.2. The choice of
# tokens by entropy and the schedule are left out.
reopold_clip = from_advantage(lambda log_u: log_u.clamp(min=math.log(0.25)), of="log_u", detach=True)


def _aopd(forward: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    def loss(r: opd.Rollouts) -> Tensor:
        reinforced = -r.log_u.detach() * r.student_logprobs
        return r.token_sum(torch.where(r.log_u.detach() > 0, reinforced, forward(*_laws(r))))

    return loss


# AOPD, https://arxiv.org/abs/2605.06387: the log-ratio as a reward where it is positive, and otherwise the forward KL
# on the teacher's top k at that position. From the abstract and from three notes on the paper that agree on this; a
# fourth takes the advantage over a reference model. k was not given. `aopd` has the forward KL over the whole
# vocabulary, which is not in the notes.
aopd = _aopd(_forward)
aopd_top_2 = _aopd(_top_forward)


def fire_opd(r: opd.Rollouts) -> Tensor:
    """FiRe-OPD, https://arxiv.org/abs/2606.02684: the log-ratio as a reward, weighted by both entropies of a position.

    From the authors' code, https://github.com/YuYingLi0/FiRe-OPD, with its defaults: (1 + teacher's confidence) times
    (1 + student's confusion), both scaled by the largest entropy of the batch, and the product by its mean. Dropping a
    batch's worst rollouts and PPO's clip are left out; a batch of one fresh rollout has neither.
    """
    log_p, log_q = _laws(r)
    student, teacher = (_entropy(log_law).detach() for log_law in (log_p, log_q))
    largest_student, largest_teacher = ((r.mask * entropy).amax().clamp_min(1e-6) for entropy in (student, teacher))
    confidence, confusion = 1.0 - teacher / largest_teacher, student / largest_student
    weight = (1.0 + confidence.clamp(0.0, 1.0)) * (1.0 + confusion.clamp(0.0, 1.0))
    weight = weight * r.mask.sum() / (weight * r.mask).sum()
    return r.token_sum(-(weight * r.log_u.detach()) * r.student_logprobs)


def _bridge(log_p: Tensor, log_q: Tensor, of_student: float, of_teacher: float) -> Tensor:
    """The log of the normalised product of powers of both distributions, detached: a target."""
    return (of_student * log_p + of_teacher * log_q).detach().log_softmax(-1)


def _veto_forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(_bridge(log_p, log_q, 0.8, 1.0), log_p)


def _veto_reverse(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_p, _bridge(log_p, log_q, 0.8, 1.0))


# Veto, https://arxiv.org/abs/2601.07155: the forward or the reverse KL to a target proportional to q p^b. From the
# abstract and from four notes on the paper that agree on this; a fifth writes an arithmetic mixture. That the target is
# detached is our reading of the gradient that one note states, and b = 0.8 its value for reasoning. The decay of b to 0
# during training is left out.
veto_forward = _whole(_veto_forward)
veto_reverse = _whole(_veto_reverse)


def _taid(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(_bridge(log_p, log_q, 0.6, 0.4), log_p)


# TAID, https://arxiv.org/abs/2501.16937, from the authors' code, https://github.com/SakanaAI/TAID: the forward KL to a
# detached target proportional to p^(1-t) q^t, at its default start t = 0.4; t grows to 1 during training.
taid = _whole(_taid)


def _todi(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_u = log_q - log_p
    forward, reverse = log_u.detach().sigmoid(), (-log_u.detach()).sigmoid()
    return (forward * log_q.exp() * log_u - reverse * log_p.exp() * log_u).sum(-1)


# ToDi, https://arxiv.org/abs/2505.16297, from the authors' code, https://github.com/jungseongryong/ToDi: the entries of
# the forward and of the reverse KL, weighted by the detached sigmoids of log u and of -log u. The cross-entropy of the
# labels is left out. The paper trains on data; here the histories are the student's.
todi = _whole(_todi)


def _akl(log_p: Tensor, log_q: Tensor, detach: bool) -> Tensor:
    sorted_q, ids = log_q.exp().sort(-1)
    head = (sorted_q.cumsum(-1) >= 0.5).to(sorted_q)
    gap = (sorted_q - log_p.exp().gather(-1, ids)).abs()
    share = (head * gap).sum(-1) / gap.sum(-1)
    share = share.detach() if detach else share
    return share * _kl(log_q, log_p) + (1.0 - share) * _kl(log_p, log_q)


# AKL, https://arxiv.org/abs/2404.02657: the forward and the reverse KL, shared out by the distance of the distributions
# on the teacher's head and tail. From two implementations: that in https://github.com/jungseongryong/ToDi detaches the
# shares, that in https://github.com/SakanaAI/TAID does not. Both divide 0 by 0 where student and teacher agree.
akl = _whole(lambda log_p, log_q: _akl(log_p, log_q, detach=True))
akl_not_detached = _whole(lambda log_p, log_q: _akl(log_p, log_q, detach=False))


def _distillm2(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl(log_p, torch.logaddexp(log_q + math.log(0.9), log_p.detach() + math.log(0.1)))


# DistiLLM-2, https://arxiv.org/abs/2503.07067, from the authors' code, https://github.com/jongwooko/distillm-2: its
# term on the student's responses, the skew reverse KL at a = 0.1 with the student's part of the mixture detached. The
# adaptive a and the term on the teacher's responses are left out.
distillm2_skew_reverse_kl = _whole(_distillm2)


# The example of on-policy distillation in https://github.com/meta-pytorch/torchforge/pull/525, from the pull request's
# description. It was closed and marked as not for review. Its mean over tokens is a sum here.
torchforge_forward_kl = from_logprobs(lambda log_p, log_q: log_q.exp() * (log_q - log_p))


def _hybrid(constant: float) -> Loss:
    def loss(r: opd.Rollouts) -> Tensor:
        log_p, log_q = _laws(r)
        outside = (log_q.topk(_K, -1).indices != r.tokens.unsqueeze(-1)).all(-1).to(log_q)
        sampled = -(r.log_u.detach() - constant) * r.student_logprobs
        return r.token_sum(_kl(*_on_top(log_q, log_p, log_q)) + outside * sampled)

    return loss


# The top-k estimator of https://github.com/NVIDIA-NeMo/RL/pull/3608: the reverse KL's terms on the teacher's top k,
# backpropagated, and the log-ratio as a reward if the sampled token is not among them. From the docstring and the one
# line that the review quotes; the rest of the function could not be read. The second is the form that T13 asks for,
# with the same constant in both parts.
nemo_top_2_tail = _hybrid(0.0)
nemo_top_2_tail_centred = _hybrid(1.0)


def _nemo_mixed(log_p: Tensor, log_q: Tensor) -> Tensor:
    kept_p, kept_q = (kept.log_softmax(-1) for kept in _on_top(log_q, log_p, log_q))
    return 0.5 * _kl(kept_q, kept_p) + 0.5 * _kl(kept_p, kept_q)


def _nemo_zero_outside(log_p: Tensor, log_q: Tensor) -> Tensor:
    kept, ids = log_q.topk(_K, -1)
    return _kl(log_p, torch.full_like(log_q, -100.0).scatter(-1, ids, kept.log_softmax(-1)))


# NeMo-RL's `DistillationLossFn`, from the code of August 2026, https://github.com/NVIDIA-NeMo/RL: at its defaults, half
# the forward and half the reverse KL on the teacher's top k (64), both renormalised; and `kl_type="reverse"` with
# `zero_outside_topk`, where the teacher has log-probability -100 outside. The mean over tokens is a sum here.
nemo_mixed_top_2 = _whole(_nemo_mixed)
nemo_reverse_zero_outside = _whole(_nemo_zero_outside)


def _student_top(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    return _kl(*(kept.log_softmax(-1) for kept in _on_top(log_p, log_p, log_q, k=k)))


# "Rethinking On-Policy Distillation", https://arxiv.org/abs/2604.13016, equation 5, as
# https://github.com/Thinking-Space/Rethinking-OPD/issues/15 quotes it: the reverse KL on the student's top k, both
# distributions renormalised. That issue asks about k = 1; the authors' answer, of which we could read the beginning,
# agrees that the equation is then zero.
rethinking_opd_top_2 = _whole(lambda log_p, log_q: _student_top(log_p, log_q, 2))
rethinking_opd_top_1 = _whole(lambda log_p, log_q: _student_top(log_p, log_q, 1))


def miles_top_2_reward(r: opd.Rollouts) -> Tensor:
    """The top-k distillation of miles as https://github.com/radixark/miles/issues/2362 describes it.

    The reverse KL on a position's top k tokens, here the student's, is subtracted as a number from the sampled token's
    advantage. The advantage of the task is left out.
    """
    log_p, log_q = _laws(r)
    return r.token_sum(_kl(*_on_top(log_p, log_p, log_q)).detach() * r.student_logprobs)


# Marin's KL penalty in mode `k1_loss`, from https://github.com/marin-community/marin (lib/marin/src/marin/rl/
# kl_regularization.py): the log-ratio, backpropagated, as a mean over each rollout's tokens.
marin_k1_loss = from_logprobs(lambda log_p, log_q: log_p - log_q, reduction="sequence_mean")


def marin_opd(r: opd.Rollouts) -> Tensor:
    """Marin's distillation loss, from opd_losses.py beside it, without its optional clip.

    The advantage is the log-ratio of the teacher to the policy that sampled, not to the student as it is now.
    """
    advantage = r.teacher_logprobs - r.behavior_logprobs
    return r.sequence_mean(-advantage * (r.student_logprobs - r.behavior_logprobs).exp())
