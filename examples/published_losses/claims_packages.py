"""What the losses of the other packages say they minimise; `make gallery` installs them."""

from __future__ import annotations

from examples.published_losses.entry import Entry

__all__ = ["ENTRIES"]

_LIGER = "liger_kernel.chunked_loss.LigerFusedLinearJSDLoss"
_LIGER_SAYS = "Coefficient beta of generalized JSD in the interval [0, 1]."
_SWIFT = "swift.rlhf_trainers.gkd_loss.gkd_loss"
_SWIFT_SAYS = "JSD interpolation (0=forward KL, 1=reverse KL, 0<beta<1=JSD)"
_TWINKLE = "twinkle.loss.gkd.GKDLoss"
_TWINKLE_SAYS = "JSD mixture weight (0=forward KL, 1=reverse KL, 0.5=symmetric JSD)."
_VERL = "verl.trainer.distillation.losses.distillation_loss"
_VERL_SAYS = "Compute the distillation loss and related metrics using single-sample KL estimators."
_VERL_PENALTY = "verl.trainer.ppo.core_algos.kl_penalty"
_VERL_PLUS = "k2 estimator gives right gradient estimator, so we use a straight through trick"
_OPENRLHF = "openrlhf.models.utils.compute_approx_kl"
_OPENRLHF_SAYS = "Compute the approximate KL divergence between two distributions."
_TOP_2 = (
    "Both distributions are renormalised on the teacher's top tokens, so the student's mass outside is unconstrained "
    "(T9 c).",
    "JSD(0.5) within the teacher's top 2",
)
_HARD_LABELS = "Half of the loss is the cross-entropy of the student's own samples, whose expected gradient is zero."
_TEXTBREWER = "textbrewer.losses.kd_{}_loss"


def _jsd(
    package: str, function: str, label: str, beta: float, source: str, quote: str, remark: str = "", follows: str = ""
) -> Entry:
    ends = {0.0: ("forward KL", "forward_kl", {}), 1.0: ("reverse KL", "reverse_kl", {})}
    says, objective, parameters = ends.get(beta, (f"JSD({beta:g})", "skew_jsd", {"beta": beta}))
    return Entry(function, label, package, source, says, quote, objective, parameters, remark=remark, follows=follows)


def _verl(function: str, label: str, quote: str, remark: str = "", follows: str = "") -> Entry:
    return Entry(function, label, "verl", _VERL, "reverse KL", quote, "reverse_kl", remark=remark, follows=follows)


def _verl_penalty(function: str, kind: str, quote: str, remark: str = "", follows: str = "") -> Entry:
    label = f"kl_penalty, `{kind}`, as a loss"
    says = "KL to the reference"
    return Entry(function, label, "verl", _VERL_PENALTY, says, quote, "reverse_kl", remark=remark, follows=follows)


def _openrlhf(function: str, label: str, remark: str = "", follows: str = "") -> Entry:
    quote = _OPENRLHF_SAYS if remark else "backprop the true reverse-KL gradient"
    return Entry(
        function, label, "openrlhf", _OPENRLHF, "reverse KL", quote, "reverse_kl", remark=remark, follows=follows
    )


# A clamp passes no gradient outside its range, so the weight there falls back to that of a token with u = 1.
_KL3 = "A clamp at 10 drops the gradient of tokens with k3 > 10, that is log u > 2.6 or log u < −11."
_KL2 = "A clamp at 10 drops the gradient of tokens with k2 > 10, that is |log u| > 4.5."
_CUT_FORWARD = "forward KL (T4), where k3 ≤ 10"
_CUT_REVERSE = "reverse KL, where k2 ≤ 10"

ENTRIES: tuple[Entry, ...] = (
    _jsd("liger-kernel", "liger_jsd_0", "fused linear JSD, β = 0, soft loss", 0.0, _LIGER, _LIGER_SAYS),
    _jsd("liger-kernel", "liger_jsd_0_5", "fused linear JSD, β = 0.5, soft loss", 0.5, _LIGER, _LIGER_SAYS),
    _jsd("liger-kernel", "liger_jsd_1", "fused linear JSD, β = 1, soft loss", 1.0, _LIGER, _LIGER_SAYS),
    _jsd(
        "liger-kernel",
        "liger_jsd_default",
        "the same at its defaults, labels = samples",
        0.5,
        _LIGER,
        _LIGER_SAYS,
        _HARD_LABELS,
    ),
    _jsd("ms-swift", "swift_gkd_0", "gkd_loss, β = 0", 0.0, _SWIFT, _SWIFT_SAYS),
    _jsd("ms-swift", "swift_gkd_0_1", "gkd_loss, β = 0.1", 0.1, _SWIFT, _SWIFT_SAYS),
    _jsd("ms-swift", "swift_gkd_0_5", "gkd_loss, β = 0.5", 0.5, _SWIFT, _SWIFT_SAYS),
    _jsd("ms-swift", "swift_gkd_1", "gkd_loss, β = 1", 1.0, _SWIFT, _SWIFT_SAYS),
    _jsd("ms-swift", "swift_gkd_top_2", "gkd_loss, β = 0.5, top 2 of 4", 0.5, _SWIFT, _SWIFT_SAYS, *_TOP_2),
    _jsd("twinkle-kit", "twinkle_gkd_0", "GKDLoss, β = 0", 0.0, _TWINKLE, _TWINKLE_SAYS),
    _jsd("twinkle-kit", "twinkle_gkd_0_5", "GKDLoss, β = 0.5", 0.5, _TWINKLE, _TWINKLE_SAYS),
    _jsd("twinkle-kit", "twinkle_gkd_1", "GKDLoss, β = 1", 1.0, _TWINKLE, _TWINKLE_SAYS),
    _jsd(
        "twinkle-kit",
        "twinkle_gkd_top_2",
        "GKDLoss, β = 0.5, top 2 of 4",
        0.5,
        _TWINKLE,
        _TWINKLE_SAYS,
        *_TOP_2,
    ),
    _verl(
        "verl_k3_loss",
        "distillation, `k3` backpropagated (shipped YAML)",
        "Recommended to use loss_mode=k3 or forward_kl_topk.",
        _KL3,
        _CUT_FORWARD,
    ),
    _verl(
        "verl_k1_reward",
        "distillation, `k1` as a reward",
        "Recommended to use loss_mode=k1.",
    ),
    _verl(
        "verl_k3_reward",
        "distillation, `k3` as a reward",
        "Use negative distillation loss as reward",
        "This combination is the default of the dataclass, not of the shipped YAML. The weight log u − u + 1 falls for "
        "u > 1, and the teacher does not attract to first order (T5).",
        "reverse KL − forward KL (T4), where k3 ≤ 10",
    ),
    _verl("verl_k2_loss", "distillation, `k2` backpropagated", _VERL_SAYS),
    _verl(
        "verl_k1_loss",
        "distillation, `k1` backpropagated",
        "Directly backpropagating k1 loss is incorrect",
        "The configuration rejects this combination and says why; the audit agrees.",
    ),
    _verl(
        "verl_abs_reward",
        "distillation, `abs` as a reward",
        _VERL_SAYS,
        "The reward −|log u| is largest at u = 1, so tokens that the teacher prefers are discouraged too.",
    ),
    Entry(
        "verl_forward_kl_top_2",
        "distillation, `forward_kl_topk`, top 2 of 4",
        "verl",
        "verl.trainer.distillation.fsdp.losses.compute_forward_kl_topk",
        "forward KL on the top k",
        "Compute forward KL distillation loss using top-k log probabilities.",
        "forward_kl",
        remark="Without renormalisation the minimum is at p = q/q(S) on the top tokens S (T9 a). The clamp at 0 stops "
        "the gradient wherever the sum is negative.",
        follows="Σ q log(q/p) over the teacher's top 2, where positive",
    ),
    _verl_penalty(
        "verl_kl_k3", "low_var_kl", "Compute KL divergence given logprob and ref_logprob.", _KL3, _CUT_FORWARD
    ),
    _verl_penalty("verl_kl_k3_plus", "k3+", _VERL_PLUS),
    _verl_penalty("verl_kl_k1_plus", "k1+", _VERL_PLUS),
    _verl_penalty(
        "verl_kl_abs",
        "abs",
        "Compute KL divergence given logprob and ref_logprob.",
        "The derivative of |log u| is a sign, and a sign is the weight of the total variation.",
    ),
    _openrlhf("openrlhf_k3", "KL loss, `k3`", _KL3, _CUT_FORWARD),
    _openrlhf("openrlhf_k2", "KL loss, `k2`", _KL2, _CUT_REVERSE),
    _openrlhf("openrlhf_k3_unbiased", "KL loss, `k3`, `unbiased_gradient`"),
    Entry(
        "tinker_opd",
        "on-policy distillation, discount 0 (default)",
        "tinker-cookbook",
        "tinker_cookbook.distillation.train_on_policy.incorporate_kl_penalty",
        "reverse KL",
        "Compute reverse KL between the student (log p) and the teacher model (log q)",
        "reverse_kl",
        remark="The advantages come from the package; the line that turns them into a loss is ours.",
    ),
    Entry(
        "tinker_opd_discounted",
        "the same, discount 1",
        "tinker-cookbook",
        "tinker_cookbook.distillation.train_on_policy.incorporate_kl_penalty",
        "reverse KL of whole rollouts",
        "We can optionally apply a discount factor.",
        "reverse_kl",
        granularity="sequence",
        remark="The advantages come from the package; the line that turns them into a loss is ours.",
    ),
    Entry(
        "textbrewer_kd_ce",
        "kd_ce_loss",
        "textbrewer",
        _TEXTBREWER.format("ce"),
        "forward KL",
        "Calculate the cross entropy between logits_S and logits_T",
        "forward_kl",
    ),
    Entry(
        "textbrewer_kd_ce_hot",
        "kd_ce_loss × 4, temperature 2",
        "textbrewer",
        _TEXTBREWER.format("ce"),
        "forward KL between softened distributions",
        "Calculate the cross entropy between logits_S and logits_T",
        "forward_kl",
        remark="The comparison is with the forward KL at temperature 1. Softened distributions are different "
        "distributions, but the minimiser is the same.",
    ),
    Entry(
        "textbrewer_kd_mse",
        "kd_mse_loss",
        "textbrewer",
        _TEXTBREWER.format("mse"),
        "mean squared error of logits",
        "Calculate the mse loss between logits_S and logits_T",
        "forward_kl",
        remark="The comparison is with the forward KL, which it does not claim. It also moves the sum of a row of "
        "logits, on which no divergence depends.",
    ),
    Entry(
        "torchdistill_kd",
        "KDLoss, temperature 1, no labels",
        "torchdistill",
        "torchdistill.losses.mid_level.KDLoss",
        "forward KL",
        "KL divergence between class-probability distributions",
        "forward_kl",
    ),
)
