"""The sampling policy: whether the loss reads it, as which importance weight, and where that is clipped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdtheory.auditing.effects.probes import Effect, Pool, sampled_by

__all__ = ["sampler_effect"]

# Log-ratios log p/mu within every clip in use, and beyond most.
_SMALL, _LARGE = 0.04, 1.2

_KINDS = {
    "token": "the token's own p/mu",
    "prefix": "the product of p/mu up to the token",
    "sequence": "the product of p/mu over the whole rollout",
    "history": "the product of p/mu before the token",
}


def sampler_effect(pool: Pool, batch_size: int, limit: float) -> Effect:
    """How the gradient depends on `behavior_logprobs` at unchanged tokens."""
    index = torch.arange(max(len(pool) // batch_size, 1) * batch_size) % len(pool)
    generator = torch.Generator().manual_seed(2)
    noise = 2 * torch.rand(len(index), 2, generator=generator, dtype=torch.float64) - 1
    on_policy = pool.sensitivity(index)
    near, far = (pool.sensitivity(index, sampled_by(size * noise)) for size in (_SMALL, _LARGE))
    scale = max(float(on_policy.abs().max()), 1e-300)
    if max(float((x - on_policy).abs().max()) for x in (near, far)) <= limit * scale:
        return Effect()
    factor, proportional = _factor(near, on_policy, limit)
    kind = _kind(factor, _SMALL * noise)
    if not proportional:
        text = "The sampling policy's probabilities enter the weight itself, not as a factor (T8)."
    elif kind == "none":
        text = "The sampling policy enters only where it is far from the student (T8)."
    elif kind is not None:
        clips = _clip_words(pool, index, on_policy, kind, limit)
        text = f"The weight is multiplied by {_KINDS[kind]} (importance-weighted, T8){clips}"
    elif _shifted(pool, index, near, on_policy, _SMALL * noise):
        text = "The weight is a function of q/mu in place of q/p: another weight off-policy (T8)."
    else:
        text = "The sampling policy enters, but not as a product of p/mu (T8)."
    return Effect(True, [text])


def _factor(changed: Tensor, before: Tensor, limit: float) -> tuple[Tensor, bool]:
    """The multiple of its former gradient that each token has, NaN if it had none, and whether all are multiples."""
    size = before.square().sum(-1)
    live = size > (1e-6 * size.max())
    factor = torch.where(live, (changed * before).sum(-1) / torch.where(live, size, 1.0), torch.nan)
    left = changed - factor.nan_to_num().unsqueeze(-1) * before
    return factor, float(left[live].abs().max()) <= 10 * limit * float(before.abs().max())


def _shifted(pool: Pool, index: Tensor, changed: Tensor, before: Tensor, log_ratio: Tensor) -> bool:
    """Whether each token has the weight of a token whose log q/p is its own log q/mu."""
    import numpy as np

    score = pool.score(index)
    old, new = (-(x * score).sum(-1) / score.square().sum(-1) for x in (before, changed))
    log_u = pool.everything.rollouts(index).log_u.detach()
    order = log_u.flatten().argsort()
    expected = np.interp((log_u + log_ratio).flatten(), log_u.flatten()[order], old.flatten()[order])
    error = np.abs(expected - new.flatten().numpy())
    moved = np.abs((new - old).flatten().numpy())
    return bool(np.median(error) < 0.05 * np.median(moved))


def _product(kind: str, log_ratio: Tensor) -> Tensor:
    total = {
        "token": log_ratio,
        "prefix": log_ratio.cumsum(-1),
        "sequence": log_ratio.sum(-1, keepdim=True).expand_as(log_ratio),
        "history": log_ratio.cumsum(-1) - log_ratio,
    }[kind]
    return total.exp()


def _kind(factor: Tensor, log_ratio: Tensor) -> str | None:
    live = ~factor.isnan()
    if bool(((factor - 1).abs() < 1e-7)[live].all()):
        return "none"
    for kind in _KINDS:
        if bool(((factor - _product(kind, log_ratio)).abs() < 1e-6)[live].all()):
            return kind
    return None


def _clip_words(pool: Pool, index: Tensor, on_policy: Tensor, kind: str, limit: float) -> str:
    """Where the factor departs from the product: held at a bound, or zero beyond it."""
    found = []
    for sign in (1.0, -1.0):
        log_ratio = torch.full((len(index), 2), sign * _LARGE, dtype=torch.float64)
        if kind != "token":
            log_ratio[:, 1] = 0.0
        factor, _ = _factor(pool.sensitivity(index, sampled_by(log_ratio)), on_policy, limit)
        departs = (factor - _product(kind, log_ratio)).abs() > 1e-6
        if not bool(departs.any()):
            continue
        held = factor[departs]
        if float(held.abs().max()) < 1e-9:
            bound = _bound(pool, index, on_policy, kind, departs, sign)
            found.append(f"zero {'above' if sign > 0 else 'below'} {bound:.4g}" + _of_which(departs, factor))
        elif float((held - held[0]).abs().max()) < 1e-6:
            found.append(f"held at {float(held[0]):.4g} {'above' if sign > 0 else 'below'}")
        else:
            found.append("changed where it is far from 1")
    return f", clipped: {', '.join(found)}." if found else "."


def _of_which(departs: Tensor, factor: Tensor) -> str:
    live = ~factor.isnan()
    return "" if bool(departs[live].all()) else " for the weights of one sign, as in PPO"


def _bound(pool: Pool, index: Tensor, on_policy: Tensor, kind: str, departs: Tensor, sign: float) -> float:
    """The p/mu beyond which the gradient vanishes, from sweeps over the tokens whose gradient does."""
    low, high = 0.0, _LARGE
    first_only = departs[:, 0] if bool(departs[:, 0].any()) else departs[:, 1]
    column = 0 if bool(departs[:, 0].any()) else 1
    rows = torch.nonzero(first_only).flatten()
    for _ in range(3):
        steps = torch.linspace(low, high, len(rows), dtype=torch.float64)
        log_ratio = torch.zeros(len(index), 2, dtype=torch.float64)
        log_ratio[rows, column] = sign * steps
        factor, _ = _factor(pool.sensitivity(index, sampled_by(log_ratio)), on_policy, 1.0)
        gone = factor[rows, column].abs() < 1e-9
        if not bool(gone.any()) or bool(gone[0]):
            break
        edge = int(gone.nonzero()[0])
        low, high = float(steps[edge - 1]), float(steps[edge])
    bound = math.exp(sign * (low + high) / 2)
    return round(bound, 2) if abs(round(bound, 2) - bound) < 1e-3 else bound
