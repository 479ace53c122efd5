"""What the token-level losses of `papers_tokens.py` say they minimise."""

from __future__ import annotations

import functools

from examples.published_losses.entry import Entry, described

__all__ = ["ENTRIES"]

_ARXIV = "https://arxiv.org/abs/"
_NEMO = "https://github.com/NVIDIA-NeMo/RL"
_MARIN = "https://github.com/marin-community/marin"


_paper = functools.partial(described, module="papers_tokens")

_NOTES = " Written from the abstract and from notes on the paper, which itself could not be read."
_TOP = "The comparison is with the divergence over the whole vocabulary. "
_OURS_REVERSE = "The comparison with the reverse KL is ours. "
_OURS_TEACHER = "The comparison with the teacher itself is ours. "
_OURS_BOTH = "The comparison with the sum of both is ours. "
_SHARES = (
    _OURS_BOTH + "At every history it is a mixture of the forward and the reverse KL, in "
    "shares that depend on the history; where student and teacher agree exactly, they are 0/0 and the gradient is NaN."
)

ENTRIES: tuple[Entry, ...] = (
    _paper("opsd_forward_kl", "OPSD, forward KL", _ARXIV + "2601.18734", "forward KL", "forward_kl"),
    _paper(
        "opsd_forward_kl_clipped",
        "OPSD, each entry of the vocabulary clipped at 0.05",
        _ARXIV + "2601.18734",
        "forward KL, capped on style tokens",
        "forward_kl",
        "A clipped entry, a token that the student lacks, has no gradient of its own, so the gradients of the others "
        "push it down. Read from copies of the authors' code.",
        "Σ min(q log(q/p), 0.05)",
    ),
    _paper(
        "eopd",
        "EOPD, forward KL over the whole vocabulary",
        _ARXIV + "2603.07079",
        "reverse KL, plus forward KL where the teacher is uncertain",
        "reverse_kl",
        _OURS_REVERSE + "Whether the forward KL is added depends on the teacher alone, so the "
        "teacher remains the minimum." + _NOTES,
        "reverse KL, plus the forward KL where the teacher's entropy exceeds 0.8",
    ),
    _paper(
        "eopd_top_2",
        "EOPD, forward KL on the teacher's top 2 of 4",
        _ARXIV + "2603.07079",
        "reverse KL, plus forward KL where the teacher is uncertain",
        "reverse_kl",
        _OURS_REVERSE + "Where the teacher is uncertain, it is not a fixed point: the truncated "
        "forward KL draws mass to its top tokens (T9 a)." + _NOTES,
        "reverse KL, plus Σ q log(q/p) over the teacher's top 2 where its entropy exceeds 0.8",
    ),
    _paper(
        "tropd_mask",
        "TrOPD, outliers masked",
        _ARXIV + "2606.01249",
        "reverse KL on trusted tokens",
        "reverse_kl",
        "The comparison with the reverse KL of all tokens is ours. The weight is log u for u > 1 and u log u below, "
        "which is lowest at u = 1/e: the more the teacher rules a token out beyond that, the less it is discouraged."
        + _NOTES,
    ),
    _paper(
        "tropd_forward_top_2",
        "TrOPD, outliers by forward KL on the top 2 of 4",
        _ARXIV + "2606.01249",
        "reverse KL on trusted tokens, forward KL on outliers",
        "reverse_kl",
        _OURS_REVERSE + "On average a position gives the truncated forward KL the weight "
        "TV(p, q), so the teacher is a fixed point in spite of T9 a." + _NOTES,
    ),
    _paper(
        "reopold_clip",
        "REOPOLD, reward clipped below at log(1/4)",
        _ARXIV + "2603.11137",
        "relaxed reverse KL",
        "reverse_kl",
        _OURS_REVERSE + "The clipped weight does not fall anywhere, so it is that of another "
        "f-divergence, with the same minimum (T4)." + _NOTES,
    ),
    _paper(
        "aopd",
        "AOPD, forward KL over the whole vocabulary",
        _ARXIV + "2605.06387",
        "reward where positive, else imitation",
        "reverse_kl",
        _OURS_REVERSE + "The teacher is a fixed point." + _NOTES,
    ),
    _paper(
        "aopd_top_2",
        "AOPD, forward KL on the teacher's top 2 of 4",
        _ARXIV + "2605.06387",
        "reward where positive, else imitation",
        "reverse_kl",
        _OURS_REVERSE + "At the teacher no advantage is positive, so there the loss is the "
        "truncated forward KL alone, which leaves the teacher (T9 a)." + _NOTES,
    ),
    _paper(
        "fire_opd",
        "FiRe-OPD, one rollout per batch",
        _ARXIV + "2606.02684",
        "reverse KL, informative tokens emphasised",
        "reverse_kl",
        "A token's weight is scaled by the entropies of the whole rollout, which the token itself changes. So within "
        "one history the direction is not that of the reverse KL, though the teacher remains a fixed point.",
    ),
    _paper(
        "veto_forward",
        "Veto, forward KL, β = 0.8",
        _ARXIV + "2601.07155",
        "forward KL to a bridge q p^β",
        "forward_kl",
        "The comparison with the teacher itself is ours; the fixed point is q^(1/(1−β)), normalised, here q^5, as the "
        "notes say." + _NOTES,
    ),
    _paper(
        "veto_reverse",
        "Veto, reverse KL, β = 0.8",
        _ARXIV + "2601.07155",
        "reverse KL to a bridge q p^β",
        "reverse_kl",
        "The comparison with the teacher itself is ours; the fixed point is q^(1/(1−β)), normalised, here q^5, as the "
        "notes say (T16)." + _NOTES,
        "reverse KL to q^5, normalised, × 1/5",
    ),
    _paper(
        "taid",
        "TAID, t = 0.4",
        _ARXIV + "2501.16937",
        "forward KL to a bridge p^(1−t) q^t",
        "forward_kl",
        _OURS_TEACHER + "The bridge's powers sum to 1, so unlike Veto's its fixed point is the teacher at every t.",
    ),
    _paper(
        "todi",
        "ToDi",
        _ARXIV + "2505.16297",
        "forward and reverse KL, by token",
        "jeffreys",
        _OURS_BOTH + "The weight is (u² − 1 + log u)/(1 + u), which rises everywhere, so it "
        "is that of an f-divergence (T4).",
    ),
    _paper(
        "akl", "AKL, shares detached", _ARXIV + "2404.02657", "forward and reverse KL, by history", "jeffreys", _SHARES
    ),
    _paper(
        "akl_not_detached",
        "AKL, shares differentiated",
        _ARXIV + "2404.02657",
        "forward and reverse KL, by history",
        "jeffreys",
        _SHARES,
    ),
    _paper(
        "distillm2_skew_reverse_kl",
        "DistiLLM-2, skew reverse KL on student rollouts",
        _ARXIV + "2503.07067",
        "skew reverse KL(0.1)",
        "skew_reverse_kl",
        "The code detaches the student's part of the mixture. That makes the gradient exactly that of the generalised "
        "JSD, divided by 1 − β.",
        lam=0.1,
    ),
    _paper(
        "torchforge_forward_kl",
        "torchforge, sampled forward KL",
        "https://github.com/meta-pytorch/torchforge/pull/525",
        "forward KL",
        "forward_kl",
        "The weight of a sampled token is q, without the ratio to p that the student's sampling asks for. The pull "
        "request was closed, and marked as not for review.",
        "−Σ p q, which is lowest with all mass on the teacher's likeliest token",
    ),
    _paper(
        "nemo_top_2_tail",
        "NeMo-RL #3608, top 2 of 4 exact, the rest sampled",
        _NEMO + "/pull/3608",
        "reverse KL",
        "reverse_kl",
        "The terms of the top tokens, differentiated, have the weight log u − 1, the sampled ones log u: the mass of "
        "the top tokens is pushed down. Read from the docstring and one line quoted in the review; if the rest of the "
        "pull request adds the constant, the next row holds.",
        "reverse KL to the teacher with its top 2 divided by e",
    ),
    _paper(
        "nemo_top_2_tail_centred",
        "the same with log u − 1 in both parts",
        "",
        "reverse KL",
        "reverse_kl",
        "This is the estimator of T13.",
    ),
    _paper(
        "nemo_mixed_top_2",
        "NeMo-RL `DistillationLossFn`, defaults, top 2 of 4",
        _NEMO,
        "half forward, half reverse KL on the top k",
        "jeffreys",
        _TOP + "Both distributions are renormalised, so the student's mass outside is unconstrained (T9 c).",
        "half of Jeffreys within the teacher's top 2",
    ),
    _paper(
        "nemo_reverse_zero_outside",
        "NeMo-RL `DistillationLossFn`, reverse, `zero_outside_topk`",
        _NEMO,
        "reverse KL, the teacher zero outside the top k",
        "reverse_kl",
        _TOP + "A token outside costs 100 nats, whatever the teacher says of it.",
        "reverse KL to the teacher renormalised on its top 2, with e^−100 outside",
    ),
    _paper(
        "rethinking_opd_top_2",
        "Rethinking OPD, equation 5, student's top 2 of 4",
        _ARXIV + "2604.13016",
        "reverse KL on the top k, renormalised",
        "reverse_kl",
        _TOP + "The student's mass outside the top tokens is unconstrained (T9 c). Written from an issue that quotes "
        "the equation.",
        "reverse KL within the student's top 2",
    ),
    _paper(
        "rethinking_opd_top_1",
        "the same with k = 1",
        "https://github.com/Thinking-Space/Rethinking-OPD/issues/15",
        "reverse KL on the top k, renormalised",
        "reverse_kl",
        "One token, renormalised, has probability 1 under both.",
    ),
    _paper(
        "miles_top_2_reward",
        "miles, top-k KL subtracted from the advantage",
        "https://github.com/radixark/miles/issues/2362",
        "reverse KL on the top k",
        "reverse_kl",
        "The penalty does not depend on the sampled token (T9 e), as the issue says. Written from the issue.",
    ),
    _paper(
        "marin_k1_loss",
        "Marin, KL penalty `k1_loss`",
        _MARIN,
        "KL to the reference",
        "reverse_kl",
        "The reference has no effect. If rollouts may end early, the mean over a rollout's tokens leaves the gradient "
        "of E[1/N], N the length, so that descending makes rollouts longer (T18).",
    ),
    _paper(
        "marin_opd",
        "Marin, sampled-token reverse KL",
        _MARIN,
        "reverse KL",
        "reverse_kl",
        "On fresh rollouts. On stale ones the advantage log q − log μ is not the reverse KL's (T8).",
    ),
)
