"""What the losses of TRL and torchrl say they minimise."""

from __future__ import annotations

from examples.published_losses.entry import Entry

__all__ = ["ENTRIES"]

_GKD = "When beta is `0.0`, the loss is the KL divergence. When beta is `1.0`, the loss is the Inverse KL Divergence."
_DISTILLATION = "When `0.0`, the loss is the forward KL divergence. When `1.0`, the loss is the reverse KL divergence."
_SDPO = "trl.experimental.sdpo.loss_utils.compute_{}_self_distillation_loss"
_SERVER = "trl.experimental.server_distillation.ServerDistillationTrainer."
_ASYNC = "trl.experimental.async_distillation.async_distillation_trainer._jsd_loss_chunk"
_WHOLE = "The comparison is with the divergence over the whole vocabulary. "
_TAIL = _WHOLE + "How mass is spread outside the top tokens is unconstrained (T9 d)."
_SAMPLED = "It compares the sampled token with the rest, so the support moves with the sample."


def _gkd(function: str, beta: float, says: str, objective: str, parameters: dict[str, float]) -> Entry:
    source = "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss"
    return Entry(function, f"GKD, β = {beta:g}", "trl", source, says, _GKD, objective, parameters)


ENTRIES: tuple[Entry, ...] = (
    _gkd("gkd_jsd_0", 0, "forward KL", "forward_kl", {}),
    _gkd("gkd_jsd_0_1", 0.1, "JSD(0.1)", "skew_jsd", {"beta": 0.1}),
    _gkd("gkd_jsd_0_5", 0.5, "JSD(0.5)", "skew_jsd", {"beta": 0.5}),
    _gkd("gkd_jsd_0_9", 0.9, "JSD(0.9)", "skew_jsd", {"beta": 0.9}),
    _gkd("gkd_jsd_1", 1, "reverse KL", "reverse_kl", {}),
    Entry(
        "distillation_chunked_1",
        "DistillationTrainer, β = 1",
        "trl",
        "trl.trainer.distillation_trainer._chunked_divergence_loss",
        "reverse KL",
        _DISTILLATION,
        "reverse_kl",
    ),
    Entry(
        "sdpo_sampled_token",
        "SDPO, SDFT: sampled token",
        "trl",
        _SDPO.format("sampled_token"),
        "reverse KL",
        "token-level (reverse-KL) distillation on sampled `completion_ids`",
        "reverse_kl",
    ),
    Entry(
        "sdpo_full_logits",
        "SDPO, SDFT: full logits, α = 1",
        "trl",
        _SDPO.format("full_logit"),
        "reverse KL",
        "Compute full-vocabulary self-distillation loss between student and teacher logits.",
        "reverse_kl",
    ),
    Entry(
        "sdpo_top_2",
        "SDPO, SDFT: top 2 of 4, α = 1",
        "trl",
        _SDPO.format("topk"),
        "reverse KL within the top k",
        "Drop the tail and renormalize the top-k to sum to 1: divergence over the top-k conditional only.",
        "reverse_kl",
        remark=_WHOLE + "The mass outside the top tokens is unconstrained (T9 c).",
        follows="reverse KL within the student's top 2",
    ),
    Entry(
        "sdpo_top_2_tail",
        "the same with a tail bucket",
        "trl",
        _SDPO.format("topk"),
        "approximate reverse KL",
        "Lump the tail into one bucket so the divergence approximates the full-vocab divergence.",
        "reverse_kl",
        remark=_TAIL,
        follows="reverse KL of the student's top 2 and the rest",
    ),
    Entry(
        "iw_opd",
        "IW-OPD, γ = 0.5",
        "trl",
        "trl.experimental.iw_opd.IWOPDTrainer._compute_iw_opd_loss",
        "reverse KL, early tokens first",
        "reweights the sampled-token distillation signal by accumulated teacher-student prefix discrepancy",
        "reverse_kl",
        remark="The weights depend on later tokens. They lie between 1 and 1.5, so the teacher stays stationary.",
    ),
    Entry(
        "server_top_1_tail",
        "ServerDistillation, β = 1 (default)",
        "trl",
        _SERVER + "_compute_sparse_top_1_divergence_loss",
        "reverse KL on the top 1",
        "Compute exact generalized JSD/KL on top-1 support for the mixed beta>0 path.",
        "reverse_kl",
        remark=_SAMPLED,
        follows="Σ ½ [p² (logit p − logit q) + p + log(1−p)]",
    ),
    Entry(
        "server_top_1",
        "the same, `loss_add_tail=False`",
        "trl",
        _SERVER + "_compute_sparse_top_1_divergence_loss",
        "reverse KL on the top 1",
        "Compute exact generalized JSD/KL on top-1 support for the mixed beta>0 path.",
        "reverse_kl",
        remark="A single token, renormalised, has probability 1 under both models.",
    ),
    Entry(
        "server_jsd_tail",
        "ServerDistillation, β = 0.5",
        "trl",
        _SERVER + "_compute_sparse_top_1_divergence_loss",
        "JSD(0.5) on the top 1",
        "Compute exact generalized JSD/KL on top-1 support for the mixed beta>0 path.",
        "skew_jsd",
        {"beta": 0.5},
        remark=_SAMPLED,
    ),
    Entry(
        "server_forward_top_2_tail",
        "ServerDistillation, β = 0, top 2 of 4",
        "trl",
        _SERVER + "_compute_server_forward_kl_loss",
        "sparse forward KL",
        "Compute sparse forward KL from server-provided teacher top-k logprobs (beta==0 path).",
        "forward_kl",
        remark=_TAIL,
        follows="forward KL of the teacher's top 2 and the rest",
    ),
    Entry(
        "async_forward_all",
        "AsyncDistillation, β = 0, every token",
        "trl",
        _ASYNC,
        "forward KL",
        "`0.0` is forward KL (mean-seeking), `1.0` is reverse KL (mode-seeking)",
        "forward_kl",
    ),
    Entry(
        "async_sampled_tail",
        "AsyncDistillation, β = 1",
        "trl",
        _ASYNC,
        "reverse KL",
        "`0.0` is forward KL (mean-seeking), `1.0` is reverse KL (mode-seeking)",
        "reverse_kl",
        remark=_SAMPLED,
        follows="Σ ½ [p² (logit p − logit q) + p + log(1−p)]",
    ),
    Entry(
        "gold_hybrid_0_5",
        "GOLD hybrid, β = 0.5, 3 of 4 tokens shared",
        "trl",
        "trl.experimental.gold.gold_trainer.ULDLoss._compute_hybrid_uld_loss",
        "JSD on shared tokens, L1 on the rest",
        "a hybrid loss that combines ULD loss and JSD loss",
        "skew_jsd",
        {"beta": 0.5},
        remark=_WHOLE + "The teacher is stationary.",
    ),
    Entry(
        "gold_hybrid_1",
        "GOLD hybrid, β = 1, 3 of 4 tokens shared",
        "trl",
        "trl.experimental.gold.gold_trainer.ULDLoss._compute_hybrid_uld_loss",
        "reverse KL on shared tokens, L1 on the rest",
        _GKD,
        "reverse_kl",
        remark=_WHOLE + "The teacher is not stationary (T9 b).",
    ),
    Entry(
        "grpo_kl",
        "GRPO's KL penalty",
        "trl",
        "trl.GRPOTrainer._compute_loss",
        "reverse KL",
        "the KL gradient becomes the unbiased reverse-KL gradient",
        "reverse_kl",
    ),
    Entry(
        "grpo_kl_uncorrected",
        "the same, `use_bias_correction_kl=False`",
        "trl",
        "trl.GRPOTrainer._compute_loss",
        "KL to the reference",
        "Compute the KL divergence between the model and the reference model",
        "reverse_kl",
    ),
    Entry(
        "k3_reverse",
        "k3 estimate, reverse",
        "torchrl",
        "torchrl.objectives.llm.k3_kl_token_estimate",
        "reverse KL",
        "it estimates KL(sampling distribution || target distribution)",
        "reverse_kl",
    ),
    Entry(
        "distillation_reverse",
        "DistillationLoss, reverse",
        "torchrl",
        "torchrl.objectives.llm.DistillationLoss",
        "reverse KL; a note says forward",
        "minimizes KL(student || teacher) [...] the expected gradient of both directions matches the gradient of the "
        "forward (mass-covering) KL",
        "reverse_kl",
    ),
    Entry(
        "distillation_forward",
        "DistillationLoss, forward, on student rollouts",
        "torchrl",
        "torchrl.objectives.llm.DistillationLoss",
        "forward KL, on teacher rollouts",
        "minimizes KL(teacher || student). Here the scored tokens must be sampled from the teacher",
        "forward_kl",
    ),
    Entry(
        "grpo_kl_to_ref",
        "GRPOLoss, KL to the reference",
        "torchrl",
        "torchrl.objectives.llm.GRPOLoss._kl_to_ref",
        "KL to the reference",
        "coefficient for the KL divergence to the reference policy",
        "reverse_kl",
    ),
)
