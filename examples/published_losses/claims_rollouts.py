"""What the losses of 2025 and 2026 about rollouts, samplers, teachers and rewards say they minimise."""

from __future__ import annotations

import functools

from examples.published_losses.entry import Entry, described
from examples.published_losses.papers_rollouts import SAMPLING_TEMPERATURE

__all__ = ["ENTRIES"]

_ARXIV = "https://arxiv.org/abs/"
_SLIME = "https://github.com/THUDM/slime/blob/main/docs/en/advanced/"
_VERL = "https://github.com/volcengine/verl/blob/main/docs/algo/rollout_corr.md"
_AREAL = "https://github.com/areal-project/AReaL/blob/main/areal/trainer/ppo/actor.py"
_NEMO = "https://docs.nvidia.com/nemo/rl/nightly/guides/score-centering.html"

# Rollouts of a policy whose logits differ from the student's by noise of this standard deviation, and whose
# histories the claim is about: the student's are the audit's default.
_STALE = {"off_policy": 0.3}
_AT_SAMPLER = {**_STALE, "histories": "sampler"}

_STALE_NOTE = "Rollouts of another policy (noise of 0.3 on the student's logits), claimed at the student's histories. "
_SAMPLER_NOTE = "Rollouts of another policy (noise of 0.3 on the student's logits), claimed at its histories (T15). "
_SECONDARY = "Read in a secondary source. "


_loss = functools.partial(described, module="papers_rollouts")

ENTRIES: tuple[Entry, ...] = (
    _loss(
        "mopd_top_2",
        "MOPD, corrected reverse KL on the teacher's top 2 of 4",
        _ARXIV + "2606.30406",
        "reverse KL on the top k, minimised by the teacher",
        remark=_SECONDARY
        + "The comparison is with the reverse KL over the whole vocabulary. With −p + q in each term the loss is zero "
        "and stationary at the teacher, which the bare terms are not (T9 b); how the remaining mass is spread outside "
        "the top tokens is unconstrained.",
        follows="Σ [p log(p/q) − p + q] over the teacher's top 2",
    ),
    _loss(
        "deepseek_v4_opd",
        "DeepSeek-V4 OPD, two teachers",
        _ARXIV + "2606.19348",
        "weighted sum of reverse KLs",
        remark=_SECONDARY
        + "The claim is the sum of the divergences to both teachers, 0.7 and 0.3, which their normalised geometric "
        "mixture minimises (T16).",
        settings={"teachers": 2, "teacher_weights": (0.7, 0.3)},
    ),
    _loss(
        "exopd",
        "ExOPD, reward scaling 1.25",
        _ARXIV + "2602.12125",
        "dense reward log(q/b), KL to the reference b",
        remark="Read: the abstract and summaries. The claim is the reverse KL to m ∝ q^1.25 b^−0.25 (T16); the teacher "
        "q is not a stationary point.",
        settings={"base": True, "extrapolation": 1.25},
    ),
    _loss(
        "opd2",
        "OPD², delta gated by sign",
        _ARXIV + "2607.15161",
        "transfer of what tuning changed, aligned with the teacher",
        remark=_SECONDARY
        + "It names no divergence; the comparison with the reverse KL is ours. Every student at which no token passes "
        "the gate is at rest, such as q^λ b^(1−λ) for any λ > 1; for λ < 1 the gate is open for all tokens, so the "
        "gradient jumps at the teacher.",
        settings={"base": True},
    ),
    _loss(
        "opd2_ungated",
        "OPD² without the gate",
        _ARXIV + "2607.15161",
        "an ablation: the delta signal alone",
        remark=_SECONDARY
        + "The comparison with the reverse KL is ours. The objective is linear in p: its minimum puts all mass on the "
        "token with the largest q/b, and the teacher is not a stationary point.",
        follows="E_p log(b/q), a linear function of p",
        settings={"base": True},
    ),
    _loss(
        "sdpo_trust_region",
        "SDPO, trust-region teacher, reverse KL",
        _ARXIV + "2601.20802",
        "reverse KL to the regularised self-teacher",
        remark=_SECONDARY
        + "The claim is the reverse KL to m ∝ q^0.05 b^0.95, with b the frozen initial policy and q today's, both with "
        "privileged information (T16).",
        settings={"base": True, "extrapolation": 0.05},
    ),
    _loss(
        "slime_opsd",
        "slime OPSD, JSD of a token clamped at 0.05",
        _SLIME + "on-policy-distillation.md",
        "JSD(0.5), clipped per token",
        "jsd",
        remark="Where the JSD exceeds the clamp there is no gradient at all, so a student this far from the teacher is "
        "not corrected; elsewhere it is the JSD's.",
        follows="Σ min(JSD, 0.05)",
    ),
    _loss(
        "kdrl",
        "KDRL, joint objective",
        _ARXIV + "2506.02208",
        "reward minus β times the reverse KL",
        remark="Read in AReaL's documentation and summaries. The task's policy gradient is set apart; what is left is "
        "β = 0.5 times the claim.",
        settings={"reward": True},
    ),
    _loss(
        "areal_distillation",
        "AReaL, distillation alone, stale rollouts",
        _AREAL,
        "reverse KL",
        remark=_SAMPLER_NOTE + "At the student's histories it is biased, with a cosine down to 0.970.",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "areal_joint",
        "AReaL, joint mode",
        _AREAL,
        "reward minus β times the reverse KL",
        remark="The task's policy gradient is set apart; what is left of the penalty log p − log q, backpropagated, is "
        "nothing, for any teacher (T4, T18).",
        settings={"reward": True},
    ),
    _loss(
        "areal_joint_penalty",
        "AReaL, penalty of the joint mode, stale rollouts",
        _AREAL,
        "reverse KL",
        remark=_SAMPLER_NOTE
        + "The gradient does not depend on the teacher: descending drives the student away from the sampler (T18).",
        follows="−KL(μ‖p), whatever the teacher",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "mimo_mopd",
        "MiMo-V2-Flash MOPD with an outcome reward",
        _ARXIV + "2601.02780",
        "reverse KL plus an outcome advantage",
        remark=_SECONDARY + "On the student's own rollouts every ratio is 1; the reward is set apart.",
        settings={"reward": True},
    ),
    _loss(
        "nemotron_mopd",
        "Nemotron-Cascade 2 MOPD, ratio masked outside [0.5, 2]",
        _ARXIV + "2603.19220",
        "reverse KL, corrected for the inference engine",
        remark=_SECONDARY + _SAMPLER_NOTE + "Masking biases where it bites; the teacher stays stationary, because "
        "log u vanishes there (T14).",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "verl_token_is",
        "verl, token ratio cut at 2 (TIS)",
        _VERL,
        "policy gradient of the student from its sampler's rollouts",
        remark=_SAMPLER_NOTE + "Truncation biases where it bites; the teacher stays stationary (T14).",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "verl_sequence_is",
        "verl, rollout's ratio cut at 2",
        _VERL,
        "policy gradient of the student from its sampler's rollouts",
        remark=_STALE_NOTE + "Without the cut the ratio of whole rollouts is exact (T8).",
        settings=_STALE,
    ),
    _loss(
        "verl_sequence_mis",
        "verl, rollouts with a ratio above 2 dropped (MIS)",
        _VERL,
        "policy gradient of the student from its sampler's rollouts",
        remark=_STALE_NOTE + "On the panel dropping costs more than cutting.",
        settings=_STALE,
    ),
    _loss(
        "gspo_ratio",
        "GSPO's ratio, stale rollouts",
        _ARXIV + "2507.18071",
        "importance correction of rollouts",
        remark=_SAMPLER_NOTE
        + "The comparison with the reverse KL is ours. The geometric mean is no importance ratio of a token: the bias "
        "is of first order in the mismatch, where truncation and masks have none until they bite (T14 b).",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "lightning_opd",
        "Lightning OPD, fixed rollouts, no ratio",
        _ARXIV + "2604.13010",
        "reverse KL, approximately, with the same optimum",
        remark=_SECONDARY
        + _SAMPLER_NOTE
        + "Without the token's ratio it is exact only for p = μ (T8); the teacher is stationary for every sampler.",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "prime_rl_reference_kl",
        "prime-rl reference KL, tokens with p < μ − 0.2 masked",
        "https://github.com/PrimeIntellect-ai/prime-rl",
        "reverse KL, corrected for mismatch and staleness",
        remark=_SAMPLER_NOTE + "A mask by the difference of probabilities leaves rare tokens alone (T14).",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "deepseek_v32_k3_stale",
        "DeepSeek-V3.2, k3 times the ratio, stale rollouts",
        _ARXIV + "2512.02556",
        "reverse KL, unbiased",
        remark=_SAMPLER_NOTE + "At the student's histories it is biased, with a cosine down to 0.970.",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "opd_plus_truncated",
        "OPD+ forward KL, token ratio cut at 2",
        "",
        "forward KL, corrected for the sampler",
        "forward_kl",
        remark=_SAMPLER_NOTE
        + "No single source; the combination is ours. The weight u is 1 at p = q, so truncation moves a student that "
        "is at the teacher (T14).",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "opd_plus_truncated_centred",
        "the same with the weight u − 1",
        "",
        "forward KL, corrected for the sampler",
        "forward_kl",
        remark=_SAMPLER_NOTE + "The combination is ours. Biased too, but the teacher stays stationary (T14).",
        settings=_AT_SAMPLER,
    ),
    _loss(
        "score_centred",
        "score centering, no importance sampling",
        _NEMO,
        "policy gradient without drift towards the sampler",
        remark=f"Rollouts at temperature {SAMPLING_TEMPERATURE}, claimed at their histories. The comparison with the "
        "reverse KL is ours. The gradient is minus the covariance of advantage and score under the sampler, so every "
        "baseline cancels and the teacher is stationary in any gauge; under the student it would be exact.",
        settings={"sampling_temperature": SAMPLING_TEMPERATURE},
    ),
    _loss(
        "score_centred_truncated",
        "score centering with the ratio cut at 1.2",
        _NEMO,
        "policy gradient without drift towards the sampler",
        remark=f"Rollouts at temperature {SAMPLING_TEMPERATURE}, claimed at their histories. The comparison with the "
        "reverse KL is ours. Without the cut the correction vanishes on average and the loss is exact.",
        settings={"sampling_temperature": SAMPLING_TEMPERATURE},
    ),
)
