"""Losses of 2025 and 2026 about rollouts, samplers, teachers and rewards, written from their descriptions.

As in `papers.py` the code is our own, and each docstring links the source and says what was read of it and what is
left out. Advantages and importance weights are detached unless a docstring says otherwise. "Rollouts of another
policy" covers a stale student and an inference engine whose probabilities differ: the algebra is the same (T14).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_logits, from_top_k

# The temperature of the rollouts in the settings of the two score-centred losses.
SAMPLING_TEMPERATURE = 0.7


def _policy_gradient(r: opd.Rollouts, advantage: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The loss of each token that ascends `weight * advantage`, both held fixed."""
    return -(weight * advantage).detach() * r.student_logprobs


def _log_ratio(r: opd.Rollouts) -> Tensor:
    """log p - log mu of each token, detached, and zero where masked."""
    return torch.where(r.mask > 0, r.student_logprobs.detach() - r.behavior_logprobs, 0.0)


def _kept(values: Tensor, judged: Tensor, low: float, high: float) -> Tensor:
    """The values where the ratio that is judged lies within the range, else zero."""
    return torch.where((judged >= low) & (judged <= high), values, 0.0)


# Teachers and base policies.


def _extended_kl(student_logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    log_p = student_logits.log_softmax(-1).gather(-1, ids)
    p, q = log_p.exp(), logprobs.exp()
    return (p * (log_p - logprobs) - p + q).sum(-1)


# MOPD's top-k loss, eq. 5 of https://arxiv.org/abs/2606.30406: each of the teacher's top k tokens adds -p + q to its
# term p log(p/q) of the reverse KL. We read the abstract, and the equation only as several secondary sources state it.
# The teacher is the one that the prompt's domain is routed to; here there is one.
mopd_top_2 = from_top_k(_extended_kl, 2, names=("student_logits", "ids", "logprobs", None))


def deepseek_v4_opd(r: opd.Rollouts) -> Tensor:
    """Several teachers at once: the weighted sum of whole-vocabulary reverse KLs, the OPD loss of DeepSeek-V4.

    https://arxiv.org/abs/2606.19348, section 5.1.2, read in a secondary source, which reports that the weights are not
    published: two teachers with 0.7 and 0.3 are our choice.
    """
    log_p = r.student_logits.log_softmax(-1)
    first, second = (t.logits.log_softmax(-1) for t in r.teachers)
    return r.token_sum((log_p.exp() * (log_p - 0.7 * first - 0.3 * second)).sum(-1))


def exopd(r: opd.Rollouts) -> Tensor:
    """ExOPD: the advantage 1.25 log(q/b) - log(p/b), with a reference model b.

    https://arxiv.org/abs/2602.12125: the objective of G-OPD as in the abstract and in summaries, token by token and
    with 1.25 for the scaling as descriptions of the authors' code have it.
    """
    advantage = 1.25 * (r.teacher_logprobs - r.base_logprobs) - (r.student_logprobs - r.base_logprobs)
    return r.token_sum(_policy_gradient(r, advantage))


def _delta(r: opd.Rollouts) -> tuple[Tensor, Tensor]:
    """OPD2's two advantages: the log-ratio of teacher to base and that of teacher to student, less their means."""
    log_p, log_q = r.student_logits.detach().log_softmax(-1), r.teacher_logits.log_softmax(-1)
    log_b = r.base_logits.log_softmax(-1)

    def centred(values: Tensor) -> Tensor:
        sampled = values.gather(-1, r.tokens.unsqueeze(-1)).squeeze(-1)
        return sampled - (log_p.exp() * values).sum(-1)

    return centred(log_q - log_b), centred(log_q - log_p)


def opd2(r: opd.Rollouts) -> Tensor:
    """OPD2: the centred delta log(q/b) where it has the sign of the centred log(q/p), else nothing.

    https://arxiv.org/abs/2607.15161, read in a secondary source that writes out the equations. The paper's means are
    over the student's top 1024 tokens, here over all; PPO's clipping is left out.
    """
    delta, imitation = _delta(r)
    return r.token_sum(_policy_gradient(r, torch.where(delta * imitation > 0, delta, 0.0)))


def opd2_ungated(r: opd.Rollouts) -> Tensor:
    """The same without the condition on signs, an ablation of the paper."""
    return r.token_sum(_policy_gradient(r, _delta(r)[0]))


def sdpo_trust_region(r: opd.Rollouts) -> Tensor:
    """SDPO with its trust-region teacher and the reverse KL over the whole vocabulary.

    https://arxiv.org/abs/2601.20802, read in descriptions of the authors' code: the logits of the self-teacher are
    0.95 times those of the frozen initial policy plus 0.05 times those of today's, both with the privileged prompt.
    Here the former is the base and the latter the teacher, held fixed. At least one other summary mixes probabilities.
    """
    log_p = r.student_logits.log_softmax(-1)
    log_m = (0.95 * r.base_logits + 0.05 * r.teacher_logits).log_softmax(-1)
    return r.token_sum((log_p.exp() * (log_p - log_m)).sum(-1))


def _clamped_jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    jsd = ((log_p.exp() * (log_p - log_m)) + (log_q.exp() * (log_q - log_m))).sum(-1) / 2
    return jsd.clamp(max=0.05)


# slime's OPSD (--opd-type self, after https://arxiv.org/abs/2601.18734): the JSD of each token, clamped at its default
# of 0.05, as https://github.com/THUDM/slime/blob/main/docs/en/advanced/on-policy-distillation.md documents it. The
# teacher is the initial policy with privileged information; an audit takes any teacher. Summed over tokens.
slime_opsd = from_logits(_clamped_jsd, names=("student_logits", "teacher_logits", None))


# Rewards.


def kdrl(r: opd.Rollouts) -> Tensor:
    """KDRL: the task's reward and the log-ratio to the teacher in one importance-sampled policy gradient.

    https://arxiv.org/abs/2506.02208, eqs. 5 and 8 as AReaL's documentation and summaries state them. GRPO's group
    normalisation of the reward, its clipping, length normalisation and the paper's other KL estimators are left out;
    the coefficient 0.5 is ours.
    """
    ratio = (r.student_logprobs - r.behavior_logprobs).exp()
    return r.token_sum(-(r.rewards.unsqueeze(-1) + 0.5 * r.log_u).detach() * ratio)


def areal_distillation(r: opd.Rollouts) -> Tensor:
    """AReaL with rl_loss_weight = 0: the ratio times the detached log-ratio, averaged over tokens.

    https://github.com/areal-project/AReaL, areal/trainer/ppo/actor.py, `grpo_loss_fn`: the source and the example's
    documentation, read as of inclusionAI/AReaL at 00ed924 and 061138f; later versions may differ.
    """
    return r.token_mean(-(r.student_logprobs - r.behavior_logprobs).exp() * r.log_u.detach())


def areal_joint(r: opd.Rollouts) -> Tensor:
    """AReaL's joint mode, rl_loss_weight > 0: log p - log q of the sampled tokens, backpropagated, beside the reward.

    The same function, with its default weights 1 and 0.005. PPO's clipping, which does nothing on the student's own
    rollouts, and the normalisation of the reward are left out.
    """
    ratio = (r.student_logprobs - r.behavior_logprobs).exp()
    return r.token_mean(-ratio * r.rewards.unsqueeze(-1)) + 0.005 * areal_joint_penalty(r)


def areal_joint_penalty(r: opd.Rollouts) -> Tensor:
    """The second term of `areal_joint` alone, without its weight."""
    return r.token_mean(r.student_logprobs - r.teacher_logprobs)


def mimo_mopd(r: opd.Rollouts) -> Tensor:
    """MiMo-V2-Flash: the masked ratio times the sum of log u and 0.5 times an outcome advantage.

    https://arxiv.org/abs/2601.02780, read in secondary sources that write out the loss. The bounds of the mask are not
    stated there: 0.5 and 2 are those of Nemotron-Cascade 2. The weight 0.5 is ours, and the advantage is the plain
    reward. The paper divides by the length of each rollout; this sums.
    """
    ratio = _log_ratio(r).exp()
    return r.token_sum(_policy_gradient(r, r.log_u + 0.5 * r.rewards.unsqueeze(-1), _kept(ratio, ratio, 0.5, 2.0)))


# Rollouts of another policy. The advantage is the log-ratio, log u, unless another is named.


def nemotron_mopd(r: opd.Rollouts) -> Tensor:
    """Nemotron-Cascade 2's MOPD: the ratio of a token where it lies in [0.5, 2], else nothing (IcePop's mask).

    https://arxiv.org/abs/2603.19220, eqs. 2 to 4, read in a secondary source. NeMo-RL documents the same gate for its
    MOPD, https://github.com/NVIDIA-NeMo/RL/blob/main/docs/about/algorithms/mopd.md. The paper divides by the number of
    valid tokens; this sums.
    """
    ratio = _log_ratio(r).exp()
    return r.token_sum(_policy_gradient(r, r.log_u, _kept(ratio, ratio, 0.5, 2.0)))


def verl_token_is(r: opd.Rollouts) -> Tensor:
    """Truncated importance sampling (TIS): the ratio of a token, cut at 2.

    verl's `rollout_is: token` at its default threshold, without PPO's clipping and with one policy in training:
    https://github.com/volcengine/verl/blob/main/docs/algo/rollout_corr.md, the first part, as of October 2025.
    """
    return r.token_sum(_policy_gradient(r, r.log_u, _log_ratio(r).exp().clamp(max=2.0)))


def verl_sequence_is(r: opd.Rollouts) -> Tensor:
    """verl's `rollout_is: sequence`: the ratio of the whole rollout, cut at 2; the same documentation."""
    whole = _log_ratio(r).sum(-1, keepdim=True).exp()
    return r.token_sum(_policy_gradient(r, r.log_u, whole.clamp(max=2.0)))


def verl_sequence_mis(r: opd.Rollouts) -> Tensor:
    """verl's `seq_mis`: the ratio of the whole rollout where it is at most 2, else nothing; the same documentation.

    verl takes what is dropped out of the denominator of its mean too; this sums over tokens and averages over all
    rollouts.
    """
    whole = _log_ratio(r).sum(-1, keepdim=True).exp()
    return r.token_sum(_policy_gradient(r, r.log_u, _kept(whole, whole, 0.0, 2.0)))


def gspo_ratio(r: opd.Rollouts) -> Tensor:
    """GSPO's ratio, the geometric mean of the tokens' ratios, times each token's own log-ratio.

    https://arxiv.org/abs/2507.18071 (we know its ratio from implementations), where the advantage is the task's, one
    number per rollout unless it is GSPO-token, and the ratio is clipped. slime documents the ratio as its `geometric`
    level: https://github.com/THUDM/slime/blob/main/docs/en/advanced/rollout-correction.md.
    """
    mean = _log_ratio(r).sum(-1, keepdim=True) / r.mask.sum(-1, keepdim=True)
    return r.token_sum(_policy_gradient(r, r.log_u, mean.exp()))


def lightning_opd(r: opd.Rollouts) -> Tensor:
    """Lightning OPD: the log-ratio on fixed rollouts of an earlier policy, without an importance ratio.

    https://arxiv.org/abs/2604.13010, read in a secondary source that writes out the advantage and says that the
    trajectory's ratio is taken to be 1.
    """
    return r.token_sum(_policy_gradient(r, r.log_u))


def prime_rl_reference_kl(r: opd.Rollouts) -> Tensor:
    """prime-rl's `ref_kl`: the ratio times the log-ratio, except on tokens with p - mu below -0.2.

    https://github.com/PrimeIntellect-ai/prime-rl, `ref_kl_loss_fn`: the source, in a copy that names no
    version. Its cap of the ratio at 10^4 is left out, and its division by the number of tokens.
    """
    lost = r.student_logprobs.detach().exp() - r.behavior_logprobs.exp()
    return r.token_sum(_policy_gradient(r, r.log_u, _kept(_log_ratio(r).exp(), lost, -0.2, math.inf)))


def deepseek_v32_k3_stale(r: opd.Rollouts) -> Tensor:
    """The penalty of DeepSeek-V3.2, k3 times the differentiable ratio, on rollouts of another policy.

    https://arxiv.org/abs/2512.02556, as `papers.grpo_k3_corrected`.
    """
    ratio = (r.student_logprobs - r.behavior_logprobs).exp()
    return r.token_sum(ratio * (r.log_u.expm1() - r.log_u))


def truncated(centred: bool) -> Loss:
    """TIS at 2 with the exact weight of the forward KL as in https://arxiv.org/abs/2606.01039, u, or with u - 1.

    The paper's advantage and the truncation are both published; their combination has no single source.
    """

    def loss(r: opd.Rollouts) -> Tensor:
        weight = r.log_u.expm1() if centred else r.log_u.exp()
        return r.token_sum(_policy_gradient(r, weight, _log_ratio(r).exp().clamp(max=2.0)))

    return loss


opd_plus_truncated = truncated(centred=False)
opd_plus_truncated_centred = truncated(centred=True)


def _centred_score(r: opd.Rollouts, cap: float | None) -> Tensor:
    log_p = r.student_logits.log_softmax(-1)
    log_mu = (r.student_logits / SAMPLING_TEMPERATURE).log_softmax(-1)
    ratio = (log_p - log_mu).detach().exp()
    weight = torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)
    mass = log_mu.detach().exp() * weight
    sampled = weight.gather(-1, r.tokens.unsqueeze(-1)).squeeze(-1)
    return sampled * r.student_logprobs - (mass * log_p).sum(-1)


def score_centred(r: opd.Rollouts) -> Tensor:
    """Score centering without importance sampling: the score of a token less its mean under the sampler.

    https://arxiv.org/abs/2609.20807 (abstract) as NeMo-RL documents it,
    https://docs.nvidia.com/nemo/rl/nightly/guides/score-centering.html: that part of the guide and of its API page
    which a search returned. NeMo-RL knows the sampler's top k and models its tail; here the sampler is the student at
    temperature 0.7, whose law the loss knows, so the mean is over all tokens. The advantage is the log-ratio.
    """
    return r.token_sum(-r.log_u.detach() * _centred_score(r, None))


def score_centred_truncated(r: opd.Rollouts) -> Tensor:
    """The same composed with token-level TIS, here cut at 1.2, so that truncation happens at that temperature."""
    return r.token_sum(-r.log_u.detach() * _centred_score(r, 1.2))
