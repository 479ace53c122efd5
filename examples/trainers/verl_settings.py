"""Settings of verl's actor that people use, with what each claims to descend."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from verl_update import LOG_RATIOS, SHIPPED, Setting

from opdtheory.divergences import Divergence, alpha, divergence, u
from opdtheory.integrations import verl as opd_plus

SUM = {"loss_agg_mode": "seq-mean-token-sum"}
MEAN = {"loss_agg_mode": "token-mean"}


@dataclass(frozen=True)
class Row:
    """A setting and its claim.

    Attributes:
        words: the setting as a reader of verl's configuration knows it.
        claim: the divergence that it is held to.
        setting: the same as fields.
        reduction: the reduction that it is held to.
    """

    words: str
    claim: str | Divergence
    setting: Setting
    reduction: str = "token_sum"


def _distilled(mode: str, actor: dict, **changes: object) -> Setting:
    return Setting(actor=actor, distillation={**SHIPPED, "loss_mode": mode, **changes})


def verl_rows() -> list[Row]:
    """verl's own losses."""
    rewarded = {"use_policy_gradient": True}
    defaults = {"use_policy_gradient": True, "loss_max_clamp": 10.0, "log_prob_min_clamp": -10.0}
    norm = {"loss_agg_mode": "seq-mean-token-sum-norm"}
    penalty = {**SUM, "use_kl_loss": True, "kl_loss_coef": 1.0}
    return [
        Row("k1, policy gradient, seq-mean-token-sum", "reverse_kl", _distilled("k1", SUM, **rewarded)),
        Row("k1, policy gradient, token-mean (default)", "reverse_kl", _distilled("k1", MEAN, **rewarded)),
        Row(
            "k1, policy gradient, seq-mean-token-mean",
            "reverse_kl",
            _distilled("k1", {"loss_agg_mode": "seq-mean-token-mean"}, **rewarded),
        ),
        Row("k1, policy gradient, seq-mean-token-sum-norm", "reverse_kl", _distilled("k1", norm, **rewarded)),
        Row(
            "the same, loss_scale_factor=2",
            "reverse_kl",
            _distilled("k1", {**norm, "loss_scale_factor": 2}, **rewarded),
        ),
        # Of a sampled token the weights log u and u - 1, whose constants matter where the denominator varies.
        Row(
            "k1, policy gradient, token-mean, as a token mean",
            Divergence.from_expr(u - 1 - sympy.log(u), "reverse_kl of weight log u"),
            _distilled("k1", MEAN, **rewarded),
            "token_mean",
        ),
        Row(
            "k3, backpropagated, token-mean, as a token mean",
            Divergence.from_expr(u * sympy.log(u) - u + 1, "forward_kl of weight u - 1"),
            _distilled("k3", MEAN),
            "token_mean",
        ),
        Row("k2, backpropagated, seq-mean-token-sum", "reverse_kl", _distilled("k2", SUM)),
        Row("k3, backpropagated (shipped YAML), seq-mean-token-sum", "reverse_kl", _distilled("k3", SUM)),
        Row("k3, backpropagated (shipped YAML), token-mean (default)", "reverse_kl", _distilled("k3", MEAN)),
        Row(
            "k3, policy gradient (dataclass defaults), seq-mean-token-sum",
            "reverse_kl",
            _distilled("k3", SUM, **defaults),
        ),
        Row("abs, policy gradient, seq-mean-token-sum", "reverse_kl", _distilled("abs", SUM, **rewarded)),
        Row(
            "forward_kl_topk, top 4 of 4, seq-mean-token-sum", "forward_kl", _distilled("forward_kl_topk", SUM, topk=4)
        ),
        Row(
            "forward_kl_topk, top 2 of 4, seq-mean-token-sum", "forward_kl", _distilled("forward_kl_topk", SUM, topk=2)
        ),
        Row("use_kl_loss, low_var_kl (default), seq-mean-token-sum", "reverse_kl", Setting(actor=penalty)),
        Row("use_kl_loss, k3+, seq-mean-token-sum", "reverse_kl", Setting(actor={**penalty, "kl_loss_type": "k3+"})),
    ]


def our_rows() -> list[Row]:
    """OPD+ under the names that `register` returns."""
    found = []
    for each in (divergence("reverse_kl"), divergence("forward_kl"), divergence("jsd"), divergence("chi2"), alpha(0.5)):
        name = opd_plus.register(each)
        found.append(
            Row(f"{name}, policy gradient, seq-mean-token-sum", each, _distilled(name, SUM, use_policy_gradient=True))
        )
    name, jsd = opd_plus.register("jsd"), divergence("jsd")
    rewards = {**LOG_RATIOS, "adv_estimator": name}
    ratios = {**LOG_RATIOS, "adv_estimator": opd_plus.LOG_RATIO}
    return [
        *found,
        Row(f"{name}, backpropagated, seq-mean-token-sum", jsd, _distilled(name, SUM)),
        Row(
            f"{name}, policy gradient, padded batches",
            jsd,
            Setting(SUM, {**SHIPPED, "loss_mode": name, "use_policy_gradient": True}, use_remove_padding=False),
        ),
        Row(f"{name}, policy gradient, token-mean (default)", jsd, _distilled(name, MEAN, use_policy_gradient=True)),
        Row(f"adv_estimator={name}, seq-mean-token-sum", jsd, Setting(SUM, algorithm=rewards)),
        Row(
            f"policy_loss.loss_mode={name}, seq-mean-token-sum",
            jsd,
            Setting({**SUM, "policy_loss": {"loss_mode": name}}, algorithm=ratios),
        ),
        # A wrong claim about a sound setting, which the audit must refuse.
        Row(
            f"{name}, policy gradient, claimed as forward KL",
            "forward_kl",
            _distilled(name, SUM, use_policy_gradient=True),
        ),
    ]
