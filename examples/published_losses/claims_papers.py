"""What well-known published estimators, as written in `papers.py`, say they minimise."""

from __future__ import annotations

from examples.published_losses.entry import Entry, described

__all__ = ["ENTRIES"]

_ARXIV = "https://arxiv.org/abs/"


_POWER = (
    "The comparison is with the reverse KL. The weight q^α − p^α is exact for "
    "Σ [p^(α+1)/(α+1) − p q^α + α q^(α+1)/(α+1)], whose minimum is at the teacher (T4b)."
)
_TOP = "The comparison is with the divergence over the whole vocabulary. "

ENTRIES: tuple[Entry, ...] = (
    described(
        "thinking_machines_opd",
        "On-policy distillation, Thinking Machines",
        "https://thinkingmachines.ai/blog/on-policy-distillation",
        "reverse KL",
        "reverse_kl",
    ),
    described(
        "minillm",
        "MiniLLM, no length normalisation",
        _ARXIV + "2306.08543",
        "reverse KL",
        "reverse_kl",
        granularity="sequence",
    ),
    described(
        "minillm_normalised",
        "MiniLLM, length-normalised",
        _ARXIV + "2306.08543",
        "reverse KL, less bias towards short rollouts",
        "reverse_kl",
        "A mean over later tokens instead of a sum gives later tokens less weight; the paper introduces it to reduce "
        "the bias towards short rollouts, not as an unbiased form.",
        granularity="sequence",
    ),
    described(
        "minillm_discounted",
        "MiniLLM, later tokens discounted by 0.9",
        _ARXIV + "2306.08543",
        "reverse KL, discounted",
        "reverse_kl",
        "At discount 0 it is the token-local reverse KL, at 1 that of whole rollouts; in between it follows neither.",
        granularity="sequence",
    ),
    described("gkd", "GKD, β = 0.3", _ARXIV + "2306.13649", "JSD(0.3)", "skew_jsd", beta=0.3),
    described(
        "distillm_skew_kl", "DistiLLM, skew KL", _ARXIV + "2402.03898", "skew KL(0.1)", "skew_forward_kl", lam=0.1
    ),
    described(
        "distillm_skew_reverse_kl",
        "DistiLLM, skew reverse KL",
        _ARXIV + "2402.03898",
        "skew reverse KL(0.1)",
        "skew_reverse_kl",
        lam=0.1,
    ),
    described(
        "power_opd_1",
        "PowerOPD, α = 1",
        _ARXIV + "2606.17199",
        "bounded, sign-consistent reward",
        "reverse_kl",
        remark=_POWER,
        follows="density-power divergence of order α = 1",
    ),
    described(
        "power_opd_5",
        "PowerOPD, α = 5 (default)",
        _ARXIV + "2606.17199",
        "bounded, sign-consistent reward",
        "reverse_kl",
        remark=_POWER,
        follows="density-power divergence of order α = 5",
    ),
    described("tv_opd", "Sign-TV, of TV-OPD", _ARXIV + "2609.08341", "total variation", "total_variation"),
    described("vopd", "vOPD", _ARXIV + "2605.07865", "reverse KL", "reverse_kl"),
    described("vopd_top_2", "vOPD, baseline on the top 2", _ARXIV + "2605.07865", "reverse KL", "reverse_kl"),
    described("grpo_k3", "GRPO, k3 penalty", _ARXIV + "2402.03300", "KL to the reference", "reverse_kl"),
    described(
        "grpo_k3_corrected",
        "GRPO, k3 times the ratio",
        _ARXIV + "2512.02556",
        "reverse KL",
        "reverse_kl",
    ),
    described(
        "top_2_forward_kl",
        "forward KL on the teacher's top 2 of 4",
        "",
        "approximate forward KL",
        "forward_kl",
        remark=_TOP + "Its minimum is at p = q/q(S) on the top tokens S, so the teacher is not a fixed point (T9 a).",
        follows="Σ q log(q/p) over the teacher's top 2",
    ),
    described(
        "top_2_forward_kl_renormalised",
        "the same, both distributions renormalised",
        "",
        "forward KL within the top k",
        "forward_kl",
        remark=_TOP + "The student's mass outside the top tokens is unconstrained (T9 c).",
        follows="forward KL within the teacher's top 2",
    ),
    described(
        "top_2_forward_kl_tail",
        "the same with a tail bucket",
        "",
        "approximate forward KL",
        "forward_kl",
        remark=_TOP
        + "Forward KL of coarser distributions: how mass is spread outside the top tokens is unconstrained (T9 d).",
        follows="forward KL of the teacher's top 2 and the rest",
    ),
    described(
        "top_2_reverse_kl",
        "reverse KL on the teacher's top 2 of 4",
        "",
        "approximate reverse KL",
        "reverse_kl",
        remark=_TOP + "Without renormalisation it pushes mass off the top tokens, down to 1/e of the teacher's (T9 b).",
        follows="Σ p log(p/q) over the teacher's top 2",
    ),
)
