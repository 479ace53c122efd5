r"""The claim of an estimator, derived from the theory: local weights (T1, T4), sequences (T6), modifiers (T7-T11).

Nothing here enumerates policies: an audit does that, and must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.estimators.base import (
    BATCH_OF_TWO,
    FIXED_LENGTH,
    ON_POLICY,
    ON_POLICY_OR_ONE_STEP,
    SEVERAL_STEPS,
    Claim,
    TokenLoss,
    Verdict,
)
from opdtheory.estimators.sampled import (
    Differentiated,
    PowerAdvantage,
    RatioAdvantage,
    ReturnToGo,
    ScoreFunction,
    SequenceWeight,
)
from opdtheory.estimators.vocabulary import TopKReward, VocabularyLoss

__all__ = ["claim_of", "local_weight", "relation"]

_TOLERANCE = 1e-9
_NEAR = torch.linspace(-3, 3, 121, dtype=torch.float64)
_WIDE = torch.linspace(-30, 30, 601, dtype=torch.float64)


def claim_of(loss: TokenLoss, nominal: Divergence, reduction: str, theorem: str, descends: str | None = None) -> Claim:
    """The claim of a loss of each token under a reduction.

    Args:
        loss: a `ScoreFunction`, `Differentiated` or `VocabularyLoss`.
        nominal: the divergence that the loss is meant for.
        reduction: as in `Estimator`.
        theorem: where the verdict of the unmodified estimator comes from.
        descends: what it descends, if that is not `nominal`.
    """
    if isinstance(loss, VocabularyLoss):
        claim = _of_vocabulary(loss, nominal, theorem)
    elif isinstance(loss, Differentiated):
        claim = _of_differentiated(loss, nominal, theorem, descends)
    elif isinstance(loss, ScoreFunction):
        claim = _modified(_of_advantage(loss.advantage, nominal, theorem, descends), loss)
    else:
        raise TypeError(f"no claim can be derived for {type(loss).__name__}")
    claim = _assuming(claim, *_law_of_rollouts(loss, claim))
    return claim if reduction == "token_sum" else _divided_by_length(claim)


def local_weight(function: Callable[[Tensor], Tensor], log_u: Tensor) -> Tensor:
    r"""The local weight $\kappa'(\log u)$ of a loss $\kappa$ that is differentiated (T4).

    $\partial \kappa(\log q - \log p)/\partial \log p = -\kappa'$, and an estimator descends $-A\,s$.
    """
    leaf = log_u.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return slope


def relation(weight: Tensor, nominal: Tensor) -> Verdict:
    """How two local weights on one grid of log-ratios relate, constants being baselines (T4).

    `exact` if they differ by a constant, `exact_up_to_scale` if one is a positive multiple of the other but for a
    constant, `zero` if the weight is constant, else `biased`.
    """
    weight, nominal = weight - weight.mean(), nominal - nominal.mean()
    size = nominal.abs().max()
    if weight.abs().max() <= _TOLERANCE * size.clamp_min(1):
        return "zero"
    scale = (weight * nominal).sum() / nominal.square().sum()
    if scale <= 0 or (weight - scale * nominal).abs().max() > _TOLERANCE * weight.abs().max():
        return "biased"
    return "exact" if abs(scale - 1) <= _TOLERANCE else "exact_up_to_scale"


def _of_advantage(advantage: object, nominal: Divergence, theorem: str, descends: str | None) -> Claim:
    if isinstance(advantage, RatioAdvantage):
        verdict = relation(advantage.function(_NEAR), nominal.weight(_NEAR))
        claim = Claim(nominal, "token_local", verdict, theorem, descends)
        return _clipped_ratio(claim, advantage.clip_log_ratio, advantage.function, advantage.of_log_u)
    if isinstance(advantage, PowerAdvantage):
        return Claim(nominal, "token_local", "biased", theorem, descends)
    if isinstance(advantage, TopKReward):
        return Claim(nominal, "token_local", "zero", theorem, descends)
    if isinstance(advantage, ReturnToGo):
        return _of_return_to_go(advantage, nominal)
    if isinstance(advantage, SequenceWeight):
        claim = Claim(nominal, "sequence", "exact", theorem)
        return claim if advantage.clip_log_ratio is None else _clipped(claim, advantage.clip_log_ratio)
    raise TypeError(f"no claim can be derived for the advantage {type(advantage).__name__}")


def _of_return_to_go(advantage: ReturnToGo, nominal: Divergence) -> Claim:
    if advantage.gamma == 0:
        claim = Claim(nominal, "token_local", "exact", "T1")
        if advantage.discounted:  # gamma^(n-1) leaves the first token alone
            claim = Claim(nominal, "token_return", "exact", "T6", gamma=0.0)
        functions = [nominal.weight]
    else:
        exact = advantage.gamma == 1 or advantage.discounted
        claim = Claim(nominal, "token_return", "exact" if exact else "biased", "T6", gamma=advantage.gamma)
        if not exact:
            claim = replace(claim, descends="no objective: the outer gamma^(n-1) is left out")
            claim = _assuming(claim, SEVERAL_STEPS)
        functions = [nominal.weight, nominal.generator]
    bound = advantage.clip_log_ratio
    if bound is not None and any(_clip_matters(f, lambda x, f=f: f(x.clamp(-bound, bound)), bound) for f in functions):
        return _clipped(claim, bound)
    return claim


def _of_differentiated(loss: Differentiated, nominal: Divergence, theorem: str, descends: str | None) -> Claim:
    verdict = relation(local_weight(loss.function, _NEAR), nominal.weight(_NEAR))
    if verdict == "biased" and descends is not None:
        verdict = "other_objective"
    claim = Claim(nominal, "token_local", verdict, theorem, descends)
    bound = loss.clip_log_ratio
    return _clipped_ratio(
        claim,
        bound,
        lambda grid: local_weight(loss.function, grid),
        lambda grid: local_weight(lambda x: loss.function(x if bound is None else x.clamp(-bound, bound)), grid),
    )


def _of_vocabulary(loss: VocabularyLoss, nominal: Divergence, theorem: str) -> Claim:
    if loss.top is None:
        return Claim(nominal, "token_local", "exact", theorem)
    k, form = loss.top.k, loss.top.form
    if form == "renormalised" and k == 1:
        return Claim(nominal, "token_local", "zero", theorem, "nothing: one token renormalised has probability 1")
    if form == "tail":
        what = f"the divergence of the laws on {k} tokens and one bucket"
        return Claim(nominal, "token_local", "biased", theorem, what, assumptions=(f"vocabulary above {k + 1}",))
    what = {
        "truncated": f"the terms of {k} tokens: the teacher is no fixed point",
        "renormalised": f"the divergence of the laws conditioned on {k} tokens",
    }[form]
    return Claim(nominal, "token_local", "biased", theorem, what, assumptions=(f"vocabulary above {k}",))


def _clipped_ratio(
    claim: Claim,
    bound: float | None,
    plain: Callable[[Tensor], Tensor],
    clipped: Callable[[Tensor], Tensor],
) -> Claim:
    if bound is None or not _clip_matters(plain, clipped, bound):
        return claim
    return _clipped(claim, bound)


def _clip_matters(plain: Callable[[Tensor], Tensor], clipped: Callable[[Tensor], Tensor], bound: float) -> bool:
    grid = torch.linspace(-bound - 2, bound + 2, 400, dtype=torch.float64)
    change = clipped(grid) - plain(grid)
    return bool(change.max() - change.min() > _TOLERANCE * plain(grid).abs().max().clamp_min(1))


def _clipped(claim: Claim, bound: float) -> Claim:
    claim = replace(claim, verdict="biased", descends=None, theorem=_and(claim.theorem, "T4"))
    return _assuming(claim, f"log-ratios beyond {bound:g} occur")


def _modified(claim: Claim, loss: ScoreFunction) -> Claim:
    if loss.clip_weight is not None and claim.verdict != "zero" and _clamp_matters(loss):
        low, high = loss.clip_weight
        claim = replace(claim, verdict="biased", descends=None, theorem=_and(claim.theorem, "T4"))
        claim = _assuming(claim, f"advantages outside [{low:g}, {high:g}] occur")
    if loss.zscore:
        if claim.verdict != "zero":
            claim = replace(claim, verdict="biased", descends=None)
        few = BATCH_OF_TWO if not _two_valued(loss) else "batch of at least 3"
        claim = _assuming(replace(claim, theorem=_and(claim.theorem, "T7e")), few)
        return _assuming(claim, SEVERAL_STEPS) if _two_valued(loss) else claim
    if loss.baseline == "group_mean":
        claim = _assuming(replace(claim, theorem=_and(claim.theorem, "T7e")), BATCH_OF_TWO)
        if claim.verdict in ("exact", "exact_up_to_scale"):
            claim = _assuming(replace(claim, verdict="exact_up_to_scale"), FIXED_LENGTH)
    elif loss.baseline == "leave_one_out":
        claim = _assuming(replace(claim, theorem=_and(claim.theorem, "T7e")), BATCH_OF_TWO)
    elif loss.baseline is not None:
        claim = replace(claim, theorem=_and(claim.theorem, "T7a" if loss.baseline == "constant" else "T7b"))
    return claim


def _clamp_matters(loss: ScoreFunction) -> bool:
    if not isinstance(loss.advantage, RatioAdvantage) or loss.clip_weight is None:
        return True
    values = loss.advantage.of_log_u(_WIDE)
    return bool((values < loss.clip_weight[0]).any() or (values > loss.clip_weight[1]).any())


def _two_valued(loss: ScoreFunction) -> bool:
    """Whether the advantage takes one value for u > 1 and one for u < 1, so that scaling by the spread is milder."""
    if not isinstance(loss.advantage, RatioAdvantage):
        return False
    values = loss.advantage.of_log_u(_NEAR)
    return all(bool((part - part[0]).abs().max() <= _TOLERANCE) for part in (values[_NEAR > 0], values[_NEAR < 0]))


def _law_of_rollouts(loss: object, claim: Claim) -> tuple[str, ...]:
    """The assumption on the policy that sampled, if the importance weights leave one (T8)."""
    importance = getattr(loss, "importance", None)
    if isinstance(loss, VocabularyLoss):
        return () if importance == "prefix" else (ON_POLICY_OR_ONE_STEP,)
    if importance == "sequence" or (importance == "prefix" and claim.granularity == "token_local"):
        return ()
    if importance == "token" and claim.granularity == "token_local":
        # A gradient that is zero at every history is so whatever law the histories have.
        return () if claim.verdict == "zero" else (ON_POLICY_OR_ONE_STEP,)
    return (ON_POLICY,)


def _divided_by_length(claim: Claim) -> Claim:
    claim = replace(claim, theorem=_and(claim.theorem, "T11"))
    if claim.verdict == "biased":
        return claim
    scaled = "exact_up_to_scale" if claim.verdict == "exact" else claim.verdict
    return _assuming(replace(claim, verdict=scaled), FIXED_LENGTH)


def _assuming(claim: Claim, *more: str) -> Claim:
    return replace(claim, assumptions=(*claim.assumptions, *(text for text in more if text not in claim.assumptions)))


def _and(theorem: str, more: str) -> str:
    return theorem if more in theorem.split(", ") else f"{theorem}, {more}"
