r"""The expected gradient of an estimator that theory predicts, without the estimator's own code.

An estimator whose weight depends on the next token's probabilities alone has the expected gradient
$-E_p[A s] = g_{\mathrm{exact}} + E_p[(w_f(u) - A) s]$ at each prefix. For the stop-gradient estimator the second
term is $E_p[u f'(u) s]$ (T2). The weights here come from the statements of the theory (T1, T2, T4, T7-T9) and from
the divergence's own weight and slope; the estimators' code is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opdtheory.divergences import Divergence, symbol
from opdtheory.divergences.transform import on_tensors
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.estimators.factory import formula_of
from opdtheory.exact.sampled_tail import row_scores, tail_moments

__all__ = [
    "VOCABULARY",
    "group_factor",
    "on_set",
    "predicted_constant",
    "predicted_weight",
    "ratio_correction",
    "ratio_weight",
    "standardised",
]

_TOP = ("topk_truncated", "topk_renormalised", "topk_tail")
VOCABULARY = ("full_vocab", *_TOP)


def predicted_weight(estimator: Estimator, log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""The weight $A_a$ of every next token, before importance ratios; the estimator descends $-E_p[A s]$.

    Baselines without bias are left out (T7a, T7b). For groups, the z-score and the factor of a mean that includes the
    rollout itself are left out too; see `standardised` and `group_factor`.

    Args:
        estimator: the estimator.
        log_p: log-probabilities of the student, `(N, V)`, float64.
        log_q: log-probabilities of the teacher, likewise.

    Raises:
        InvalidArgumentError: the weight is not a function of one token's probabilities.
    """
    if not estimator.is_token_local:
        raise InvalidArgumentError(
            "estimator", f"must not depend on later tokens, got {estimator!r}; only full enumeration predicts it"
        )
    options, divergence, log_u = estimator.settings, estimator.claim.divergence, log_q - log_p
    if estimator.name in _TOP:
        return _top_weight(estimator.name, options, divergence, log_p, log_q)
    if estimator.name == "power":
        weight = (options["alpha"] * log_q).exp() - (options["alpha"] * log_p).exp()
    elif estimator.name in ("topk_reward", "constant_advantage"):
        return torch.zeros_like(log_u)  # constant in the token: no gradient (T4, T9e)
    else:
        weight = ratio_weight(estimator.name, options, divergence, log_u)
    if "clip_weight" in options:
        weight = weight.clamp(*options["clip_weight"])
    return weight


def ratio_weight(name: str, options: Mapping[str, Any], divergence: Divergence, log_u: Tensor) -> Tensor:
    """The weight as a function of the ratio, with the clip of the log-ratio (T1, T2 and the table of T4)."""
    bound = options.get("clip_log_ratio")
    inside = log_u if bound is None else log_u.clamp(-bound, bound)
    differentiated: dict[str, Callable[[Tensor], Tensor]] = {
        "k1_loss": lambda x: torch.full_like(x, -1.0),
        "k2_loss": lambda x: x,
        "k3_loss": lambda x: x.exp() - 1,
    }
    if name in differentiated:  # outside the clamp there is no gradient, so constants matter: u - 1, not u
        weight = differentiated[name](inside)
        return weight if bound is None else torch.where(log_u.abs() <= bound, weight, 0.0)
    if name == "opd":
        return divergence.weight(inside) - divergence.log_slope(inside)  # T2: off the exact weight by u f'(u)
    if name == "opd_plus_centred":  # the constant counts where ratios are cut (T14)
        return divergence.weight(inside) - divergence.weight(torch.zeros_like(inside))
    if name in ("opd_plus", "full_vocab", "return_to_go", "topk_tail_sampled"):
        return divergence.weight(inside)
    if name == "box_cox":
        order = options["alpha"]
        return inside if order == 0 else ((order * inside).exp() - 1) / order
    rewards: dict[str, Callable[[Tensor], Tensor]] = {
        "k1_reward": lambda x: x,
        "k2_reward": lambda x: -x.square() / 2,
        "k3_reward": lambda x: x - x.exp() + 1,
        "sign": torch.sign,
    }
    return rewards[name](inside) if name in rewards else _by_formula(name, options, divergence)(inside)


def _by_formula(name: str, options: Mapping[str, Any], divergence: Divergence) -> Callable[[Tensor], Tensor]:
    """The weight as the estimator's entry writes it in sympy, which its numeric form does not use."""
    import sympy

    formula = formula_of(name, divergence, options)
    if formula is None:
        raise InvalidArgumentError("estimator", f"must have a weight that the theory states, got {name!r}")
    log_u = sympy.Symbol("log_u", real=True)
    weight = on_tensors(log_u, sympy.expand_log(formula.subs(symbol(), sympy.exp(log_u))))
    return lambda x: weight(x) + torch.zeros_like(x)


def standardised(weight: Tensor, distribution: Tensor, eps: float) -> Tensor:
    r"""The expected z-score of each entry in a group of two whose other is drawn from `distribution` (T7e).

    With two rollouts $\sigma = |A - A'|/\sqrt 2$, so the z-score is nearly the sign of the difference:
    $\sum_{a'} \mathrm{distribution}_{a'}\, \frac{(A_a - A_{a'})/2}{|A_a - A_{a'}|/\sqrt2 + \epsilon}$.

    Args:
        weight: `(..., K)`.
        distribution: probabilities of the entries, `(..., K)`.
        eps: added to the standard deviation.
    """
    gap = weight.unsqueeze(-1) - weight.unsqueeze(-2)
    return (distribution.unsqueeze(-2) * (gap / 2) / (gap.abs() / 2**0.5 + eps)).sum(-1)


def _top_weight(name: str, options: Mapping[str, Any], divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """T9: the gradient of each truncated divergence, with the set held fixed, as a weight of every token."""
    k = options["k"]
    if k >= log_p.shape[-1]:
        return divergence.weight(log_q - log_p)
    chosen, log_u = on_set(options, log_p, log_q), log_q - log_p
    if name == "topk_truncated":
        return torch.where(chosen, divergence.weight(log_u), 0.0)
    inside_p = log_p.masked_fill(~chosen, -torch.inf).logsumexp(-1, keepdim=True)
    inside_q = log_q.masked_fill(~chosen, -torch.inf).logsumexp(-1, keepdim=True)
    if name == "topk_tail":
        rest = [x.masked_fill(chosen, -torch.inf).logsumexp(-1, keepdim=True) for x in (log_p, log_q)]
        return divergence.weight(torch.where(chosen, log_u, rest[1] - rest[0]))
    weight = divergence.weight(torch.where(chosen, log_u + inside_p - inside_q, 0.0))
    distribution = torch.where(chosen, (log_p - inside_p).exp(), 0.0)
    centred = weight - (distribution * weight).sum(-1, keepdim=True)
    return torch.where(chosen, centred / inside_p.exp(), 0.0)


def predicted_constant(estimator: Estimator, log_p: Tensor, log_q: Tensor) -> Tensor | None:
    """What an estimator subtracts from the sampled token's weight at each prefix, `(N, 1)` (T7a, T7b, T9e, T13, T19b).

    None where theory states none: for baselines over a group.
    """
    options, divergence = estimator.settings, estimator.claim.divergence
    baseline = options.get("baseline")
    if baseline in ("group_mean", "leave_one_out"):
        return None
    if estimator.name == "topk_reward":  # the same for every token, so all of it is subtracted
        terms = log_p.exp() * divergence.generator(log_q - log_p)
        paid = terms.masked_fill(~on_set(options, log_p, log_q), 0.0).sum(-1, keepdim=True)
        return paid + options.get("baseline_value", 0.0)
    if baseline == "vocabulary":
        weight = predicted_weight(estimator, log_p, log_q)
        return (log_p.exp() * weight).sum(-1, keepdim=True)
    if baseline in ("optimal", "rest"):
        if options.keys() & {"clip_log_ratio", "clip_weight"}:
            return None
        split = (log_p, log_q, divergence, options.get("k", 0), options.get("support", "teacher"))
        found = tail_moments(*split).constant if baseline == "optimal" else row_scores(*split).level_weight()
        return found.unsqueeze(-1)
    return torch.full_like(log_p[:, :1], options.get("baseline_value", 0.0) if baseline == "constant" else 0.0)


def on_set(options: Mapping[str, Any], log_p: Tensor, log_q: Tensor) -> Tensor:
    """Whether a token is one of the `k` likeliest of the model that ranks them (T9, T13)."""
    ranking = log_p if options.get("support") == "student" else log_q
    chosen = ranking.topk(min(options["k"], log_p.shape[-1]), dim=-1).indices
    return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, chosen, True)


def ratio_correction(options: Mapping[str, Any], weight: Tensor, ratio: Tensor) -> Tensor:
    r"""The factor of the weight of a token drawn from $\mu$, given $\rho = p/\mu$ of the wanted kind (T8, T14)."""
    importance = options.get("importance")
    if importance is None:
        return torch.ones_like(ratio)
    if importance == "tis":
        return torch.minimum(ratio, torch.full_like(ratio, options.get("clip_range", 2.0)))
    if importance == "mask":
        low, high = options.get("keep_range", (0.5, 5.0))
        return torch.where((low <= ratio) & (ratio <= high), ratio, 0.0)
    if importance != "ppo":
        return ratio
    clip_range = options.get("clip_range", 0.2)
    # The clip is active where a step along the advantage would leave the interval.
    active = ((weight > 0) & (ratio > 1 + clip_range)) | ((weight < 0) & (ratio < 1 - clip_range))
    return torch.where(active, 0.0, ratio)


def group_factor(estimator: Estimator, size: int) -> float:
    """The factor of a baseline that includes the rollout itself, in groups of one length (T7e)."""
    return (size - 1) / size if estimator.settings.get("baseline") == "group_mean" else 1.0
