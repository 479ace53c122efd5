"""Well-known published estimators, written from their descriptions, as functions `loss(rollouts) -> scalar`.

The code is our own. Each docstring or comment links the source and says what is uncertain or left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import Loss, from_advantage, from_logits, from_logprobs, from_top_k


def _log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_q - log_p


# Thinking Machines Lab, "On-Policy Distillation" (2025), https://thinkingmachines.ai/blog/on-policy-distillation: the
# advantage of a token is minus its own log p - log q (discount 0), in an importance-sampled policy gradient.
thinking_machines_opd = from_advantage(_log_ratio, detach=True, importance_ratio=True)


def minillm(r: opd.Rollouts) -> Tensor:
    """MiniLLM's gradient without length normalisation, as described in https://arxiv.org/abs/2306.08543 (section 2.2).

    The single-step part is the whole-vocabulary reverse KL. The rest is a policy gradient with the log-ratios of all
    later tokens. Rollouts are the student's own; the paper also mixes in the teacher's, and clips. The paper's language
    modelling loss is left out.
    """
    return _minillm(r, _later(r, gamma=1.0))


def minillm_normalised(r: opd.Rollouts) -> Tensor:
    """The same with the paper's length normalisation: the mean, not the sum, over the later tokens.

    The paper divides by T - t - 1, which is zero if one token remains; this divides by the number of later tokens.
    """
    remaining = r.mask.flip(-1).cumsum(-1).flip(-1) - r.mask
    return _minillm(r, _later(r, gamma=1.0) / remaining.clamp_min(1.0))


def minillm_discounted(r: opd.Rollouts) -> Tensor:
    """The same with a discount of 0.9 on later tokens, which is not in the paper but in implementations of it."""
    return _minillm(r, _later(r, gamma=0.9))


def _minillm(r: opd.Rollouts, later: Tensor) -> Tensor:
    return r.token_sum(_reverse_kl(r.student_logits, r.teacher_logits) - later * r.student_logprobs)


def _later(r: opd.Rollouts, gamma: float) -> Tensor:
    """For each token, the discounted sum of the log-ratios of the tokens after it, detached."""
    log_u = (r.mask * r.log_u).detach()
    total = torch.zeros_like(log_u)
    for n in range(log_u.shape[1] - 2, -1, -1):
        total[:, n] = gamma * (log_u[:, n + 1] + total[:, n + 1])
    return total


def _reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _to_mixture(one: Tensor, other: Tensor, share: float) -> Tensor:
    """KL from one distribution to its mixture with the other, of which it makes up `share`, from log-probabilities."""
    mixture = share * one.exp() + (1.0 - share) * other.exp()
    return (one.exp() * (one - mixture.log())).sum(-1)


def _gkd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return 0.3 * _to_mixture(log_q, log_p, 0.3) + 0.7 * _to_mixture(log_p, log_q, 0.7)


# GKD, as described in https://arxiv.org/abs/2306.13649: the generalised JSD, here at beta = 0.3, on the student's own
# rollouts, without a gradient through the sampling.
gkd = from_logits(_gkd, names=("student_logits", "teacher_logits", None))


def _skew_forward(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return _to_mixture(teacher_logits.log_softmax(-1), student_logits.log_softmax(-1), 0.1)


def _skew_reverse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return _to_mixture(student_logits.log_softmax(-1), teacher_logits.log_softmax(-1), 0.1)


# DistiLLM, as described in https://arxiv.org/abs/2402.03898: the skew KL(q || a q + (1 - a) p) and the skew reverse
# KL(p || a p + (1 - a) q) at a = 0.1. Its adaptive use of old student rollouts is not part of the loss.
distillm_skew_kl = from_logits(_skew_forward, names=("student_logits", "teacher_logits", None))
distillm_skew_reverse_kl = from_logits(_skew_reverse, names=("student_logits", "teacher_logits", None))


def _power(alpha: float) -> Loss:
    return from_advantage(lambda log_p, log_q: (alpha * log_q).exp() - (alpha * log_p).exp(), detach=True)


# PowerOPD, as described in https://arxiv.org/abs/2606.17199 and https://github.com/EIT-NLP/PowerOPD: the reward
# q^alpha - p^alpha of the sampled token, bounded by 1; 5 is the default of the authors' script.
power_opd_1 = _power(1.0)
power_opd_5 = _power(5.0)


# Sign-TV, the local signal of TV-OPD, as described in https://arxiv.org/abs/2609.08341: the sign of the log-ratio. The
# common factor of TV-OPD is fixed before the step's rollouts, so it scales a step and does not change its direction.
tv_opd = from_advantage(torch.sign, of="log_u", detach=True)


def vopd(r: opd.Rollouts) -> Tensor:
    """VOPD, as described in https://arxiv.org/abs/2605.07865: the log-ratio minus its mean given the history."""
    baseline = -_reverse_kl(r.student_logits, r.teacher_logits).detach()
    return r.token_sum(-(r.log_u.detach() - baseline) * r.student_logprobs)


def vopd_top_2(r: opd.Rollouts) -> Tensor:
    """The same with the baseline summed over only the student's two likeliest tokens; this choice of tokens is ours."""
    log_p, log_q = r.student_logits.detach().log_softmax(-1), r.teacher_logits.log_softmax(-1)
    top, ids = log_p.topk(2, -1)
    baseline = (top.exp() * (log_q.gather(-1, ids) - top)).sum(-1)
    return r.token_sum(-(r.log_u.detach() - baseline) * r.student_logprobs)


def _k3(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    log_u = teacher_logprobs - student_logprobs
    return log_u.expm1() - log_u


# GRPO's penalty, as described in https://arxiv.org/abs/2402.03300 (eq. 4): k3, backpropagated.
grpo_k3 = from_logprobs(_k3)


def grpo_k3_corrected(r: opd.Rollouts) -> Tensor:
    """The same times the differentiable ratio p/mu, as described for DeepSeek-V3.2, https://arxiv.org/abs/2512.02556."""
    ratio = (r.student_logprobs - r.behavior_logprobs).exp()
    return r.token_sum(ratio * _k3(r.student_logprobs, r.teacher_logprobs))


def _top_k_distributions(student_logits: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    return student_logits.log_softmax(-1).gather(-1, ids), logprobs


def _forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _top_forward(student_logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return _forward(*_top_k_distributions(student_logits, ids, logprobs))


def _top_forward_renormalised(student_logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    return _forward(*(kept.log_softmax(-1) for kept in _top_k_distributions(student_logits, ids, logprobs)))


def _top_forward_tail(student_logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    # The rest of each distribution as one more token.
    log_p, log_q = (
        torch.cat([kept, (-kept.exp().sum(-1, keepdim=True)).log1p()], -1)
        for kept in _top_k_distributions(student_logits, ids, logprobs)
    )
    return _forward(log_p, log_q)


def _top_reverse(student_logits: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    log_p, log_q = _top_k_distributions(student_logits, ids, logprobs)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


_TOP = ("student_logits", "ids", "logprobs", None)

# A teacher that reports its k likeliest tokens: the divergence on these tokens alone, with both distributions
# renormalised, or with the rest of each distribution as one more token. No single source; all three are in use.
top_2_forward_kl = from_top_k(_top_forward, 2, names=_TOP)
top_2_forward_kl_renormalised = from_top_k(_top_forward_renormalised, 2, names=_TOP)
top_2_forward_kl_tail = from_top_k(_top_forward_tail, 2, names=_TOP)
top_2_reverse_kl = from_top_k(_top_reverse, 2, names=_TOP)
