r"""The claim of an estimator, derived from the theory: local weights (T1, T4), sequences (T6), modifiers (T7-T11).

Nothing here enumerates policies. An audit does, and must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opdtheory.choices import Verdict
from opdtheory.divergences import Divergence, divergence
from opdtheory.divergences.registry import parameter_free
from opdtheory.estimators.base import Claim, Sampler, TokenLoss
from opdtheory.estimators.sampled import (
    Differentiated,
    PowerAdvantage,
    RatioAdvantage,
    ReturnToGo,
    ScoreFunction,
    SequenceWeight,
)
from opdtheory.estimators.vocabulary import SampledTail, TopKReward, VocabularyLoss

__all__ = ["claim_of", "divided_by_length", "local_weight", "relation"]

_TOLERANCE = 1e-9
_NEAR = torch.linspace(-3, 3, 121, dtype=torch.float64)
_WIDE = torch.linspace(-30, 30, 601, dtype=torch.float64)


def claim_of(loss: TokenLoss, nominal: Divergence, reduction: str, theorem: str, descends: str | None = None) -> Claim:
    """The claim of a token loss under a reduction.

    Args:
        loss: a `ScoreFunction`, `Differentiated`, `VocabularyLoss` or `SampledTail`.
        nominal: the divergence that the loss is for.
        reduction: as in `Estimator`.
        theorem: the theorem that proves the verdict of the unmodified estimator.
        descends: what the loss descends, if not `nominal`.
    """
    if isinstance(loss, VocabularyLoss):
        claim = _of_vocabulary(loss, nominal, theorem)
    elif isinstance(loss, SampledTail):
        claim = Claim(nominal, "token_local", "exact", theorem)
    elif isinstance(loss, Differentiated):
        claim = _of_differentiated(loss, nominal, theorem, descends)
    elif isinstance(loss, ScoreFunction):
        claim = _modified(_of_advantage(loss.advantage, nominal, theorem, descends), loss)
    else:
        raise TypeError(f"no claim can be derived for {type(loss).__name__}")
    claim = claim.assuming(sampler=_sampler(loss, claim))
    return divided_by_length(claim, reduction)


def local_weight(function: Callable[[Tensor], Tensor], log_u: Tensor) -> Tensor:
    r"""The local weight $\kappa'(\log u)$ of a differentiated loss $\kappa$ (T4).

    Indeed $\partial \kappa(\log q - \log p)/\partial \log p = -\kappa'$, and an estimator descends $-A\,s$.
    """
    leaf = log_u.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slope


def relation(weight: Tensor, nominal: Tensor) -> Verdict:
    """The relation of two local weights on one grid of log-ratios, where constants are baselines (T4).

    It is `exact` if they differ by a constant, `exact_up_to_scale` if one is a positive multiple of the other up to a
    constant, `zero` if the weight is constant, else `biased`.
    """
    weight, nominal = weight - weight.mean(), nominal - nominal.mean()
    size = nominal.abs().max()
    if weight.abs().max() <= _TOLERANCE * size.clamp_min(1):
        return "zero"
    if size == 0:
        return "biased"
    scale = (weight * nominal).sum() / nominal.square().sum()
    if scale <= 0 or (weight - scale * nominal).abs().max() > _TOLERANCE * weight.abs().max():
        return "biased"
    return "exact" if abs(scale - 1) <= _TOLERANCE else "exact_up_to_scale"


def _of_advantage(advantage: object, nominal: Divergence, theorem: str, descends: str | None) -> Claim:
    if isinstance(advantage, RatioAdvantage):
        weight = advantage.function(_NEAR)
        verdict = relation(weight, nominal.weight(_NEAR))
        if verdict == "biased" and descends is None:
            descends = _other_divergence(weight, nominal)
            verdict = "biased" if descends is None else "other_objective"
        claim = Claim(nominal, "token_local", verdict, theorem, descends)
        return _clipped(claim, advantage.clip_log_ratio, advantage.function)
    if isinstance(advantage, PowerAdvantage):
        return Claim(nominal, "token_local", "biased", theorem, descends)
    if isinstance(advantage, TopKReward):
        return Claim(nominal, "token_local", "zero", theorem, descends)
    if isinstance(advantage, ReturnToGo):
        return _of_return_to_go(advantage, nominal)
    if isinstance(advantage, SequenceWeight):
        # The sum of clipped log-ratios is not a function of the sum of log-ratios, so a clip always biases.
        return _clipped(Claim(nominal, "sequence", "exact", theorem), advantage.clip_log_ratio)
    raise TypeError(f"no claim can be derived for the advantage {type(advantage).__name__}")


def _other_divergence(weight: Tensor, nominal: Divergence) -> str | None:
    """The label of the catalogue divergence with this local weight, up to a positive scale."""
    candidates = list(parameter_free())
    if nominal.name == "skew_reverse_kl":
        # V[-f] = skew_jsd(1 - lam) / lam: plain OPD with this generator descends the generalised JSD.
        candidates.append(divergence("skew_jsd", beta=round(1 - nominal.parameters["lam"], 12)))
    for candidate in candidates:
        if relation(weight, candidate.weight(_NEAR)) in ("exact", "exact_up_to_scale"):
            return candidate.label
    return None


def _of_return_to_go(advantage: ReturnToGo, nominal: Divergence) -> Claim:
    if advantage.gamma == 0:
        claim = Claim(nominal, "token_local", "exact", "T1")
        if advantage.discounted:  # gamma^(n-1) leaves only the first token
            claim = Claim(nominal, "token_return", "exact", "T6", gamma=0.0)
        functions = [nominal.weight]
    else:
        exact = advantage.gamma == 1 or advantage.discounted
        claim = Claim(nominal, "token_return", "exact" if exact else "biased", "T6", gamma=advantage.gamma)
        if not exact:
            claim = replace(claim, descends="no objective: the outer gamma^(n-1) is left out")
            claim = claim.assuming(several_steps=True)
        functions = [nominal.weight, nominal.generator]
    return _clipped(claim, advantage.clip_log_ratio, *functions)


def _of_differentiated(loss: Differentiated, nominal: Divergence, theorem: str, descends: str | None) -> Claim:
    verdict = relation(local_weight(loss.function, _NEAR), nominal.weight(_NEAR))
    if verdict == "biased" and descends is not None:
        verdict = "other_objective"
    claim = Claim(nominal, "token_local", verdict, theorem, descends)
    # Outside the clamp there is no gradient, where each of these losses has one.
    return _clipped(claim, loss.clip_log_ratio)


def _of_vocabulary(loss: VocabularyLoss, nominal: Divergence, theorem: str) -> Claim:
    if loss.top is None:
        return Claim(nominal, "token_local", "exact", theorem)
    k, form = loss.top.k, loss.top.form
    if form == "renormalised" and k == 1:
        return Claim(nominal, "token_local", "zero", theorem, "nothing: one token renormalised has probability 1")
    if form == "tail":
        what = f"the divergence of the distributions on {k} tokens and one bucket"
        return Claim(nominal, "token_local", "biased", theorem, what).assuming(vocabulary_above=k + 1)
    # At the teacher, the gradient of the terms on S is -f'(1) q (1_S - q(S)), which depends on the gauge.
    rests = abs(float(nominal.log_slope(torch.zeros((), dtype=torch.float64)))) < _TOLERANCE
    what = {
        "truncated": f"the terms of {k} tokens" + ("" if rests else ": the teacher is no fixed point"),
        "renormalised": f"the divergence of the distributions conditioned on {k} tokens",
    }[form]
    return Claim(nominal, "token_local", "biased", theorem, what).assuming(vocabulary_above=k)


def _clipped(claim: Claim, bound: float | None, *functions: Callable[[Tensor], Tensor]) -> Claim:
    """The claim after the log-ratio is clamped to `bound`, unless all given functions of it are flat beyond."""
    if bound is None or (functions and all(_is_flat_beyond(bound, function) for function in functions)):
        return claim
    claim = replace(claim, verdict="biased", descends=None, theorem=_and(claim.theorem, "T4"))
    return claim.assuming(log_ratio_beyond=bound)


def _is_flat_beyond(bound: float, function: Callable[[Tensor], Tensor]) -> bool:
    grid = torch.linspace(-bound - 2, bound + 2, 400, dtype=torch.float64)
    values = function(grid)
    change = function(grid.clamp(-bound, bound)) - values
    return bool(change.abs().max() <= _TOLERANCE * values.abs().max().clamp_min(1))


def _modified(claim: Claim, loss: ScoreFunction) -> Claim:
    claim = _weight_clipped(claim, loss)
    if loss.zscore:
        if claim.verdict != "zero":
            claim = replace(claim, verdict="biased", descends=None)
        claim = replace(claim, theorem=_and(claim.theorem, "T7e"))
        values = _as_function_of_ratio(loss)
        if values is not None and _is_two_valued(values):
            # In groups of 2 or 3, the standard deviation of two values only rescales the mean gradient.
            return claim.assuming(batch_size=4, several_steps=True)
        return claim.assuming(batch_size=2)
    if loss.baseline == "group_mean":
        claim = replace(claim, theorem=_and(claim.theorem, "T7e")).assuming(batch_size=2)
        if claim.verdict in ("exact", "exact_up_to_scale"):
            claim = replace(claim, verdict="exact_up_to_scale").assuming(fixed_length=True)
    elif loss.baseline == "leave_one_out":
        claim = replace(claim, theorem=_and(claim.theorem, "T7e")).assuming(batch_size=2)
    elif loss.baseline is not None:
        claim = replace(claim, theorem=_and(claim.theorem, "T7b" if loss.baseline == "vocabulary" else "T7a"))
    return claim


def _weight_clipped(claim: Claim, loss: ScoreFunction) -> Claim:
    if loss.clip_weight is None or claim.verdict == "zero":
        return claim
    low, high = loss.clip_weight
    verdict: Verdict = "biased"
    values = _as_function_of_ratio(loss)
    if values is not None:
        clipped = values.clamp(low, high)
        if bool((clipped == values).all()):
            return claim
        if bool((clipped == clipped[0]).all()):
            verdict = "zero"
        elif _is_two_valued(values) and claim.verdict in ("exact", "exact_up_to_scale"):
            verdict = "exact_up_to_scale"
    claim = replace(claim, verdict=verdict, descends=None, theorem=_and(claim.theorem, "T4"))
    return claim.assuming(advantage_outside=(low, high))


def _as_function_of_ratio(loss: ScoreFunction) -> Tensor | None:
    """The unclamped advantage on a wide grid of the log-ratio, of one token or of the whole rollout."""
    if isinstance(loss.advantage, RatioAdvantage):
        return loss.advantage.of_log_u(_WIDE)
    if isinstance(loss.advantage, SequenceWeight):
        return loss.advantage.divergence.weight(_WIDE)
    return None


def _is_two_valued(values: Tensor) -> bool:
    """Whether there is one value for u > 1 and one for u < 1, as remains true when it is clamped or scaled."""
    return all(
        bool((part - part[0]).abs().max() <= _TOLERANCE) for part in (values[_WIDE > 0.01], values[_WIDE < -0.01])
    )


def _sampler(loss: object, claim: Claim) -> Sampler:
    """Who may have sampled the rollouts, given the importance weights (T8)."""
    importance = getattr(loss, "importance", None)
    if isinstance(loss, VocabularyLoss):
        return "any" if importance == "prefix" else "on_policy_or_one_step"
    if importance == "sequence" or (importance == "prefix" and claim.granularity == "token_local"):
        return "any"
    if importance == "token" and claim.granularity == "token_local":
        # A gradient that is zero at every history is zero for any distribution of histories.
        return "any" if claim.verdict == "zero" else "on_policy_or_one_step"
    return "on_policy"


def divided_by_length(claim: Claim, reduction: str) -> Claim:
    """The claim of a token sum under another reduction: a scale at fixed length, a bias at variable length (T11)."""
    if reduction == "token_sum":
        return claim
    claim = replace(claim, theorem=_and(claim.theorem, "T11"))
    if claim.verdict == "biased":
        return claim
    scaled = "exact_up_to_scale" if claim.verdict == "exact" else claim.verdict
    return replace(claim, verdict=scaled).assuming(fixed_length=True)


def _and(theorem: str, more: str) -> str:
    return theorem if more in theorem.split(", ") else f"{theorem}, {more}"
