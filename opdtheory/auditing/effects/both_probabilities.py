r"""The two distributions: top-k sets, and weights $A(p, q)$ that are not functions of the ratio (T4)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opdtheory.auditing.effects.probes import differ, one_step_weights
from opdtheory.auditing.naming.sparse import refined, shortest
from opdtheory.errors import BudgetExceededError
from opdtheory.exact import Loss

__all__ = ["DistributionEffect", "distribution_effect", "likeliest_kept"]

# Tokens of the step on which a top-k set is searched for; a larger k is not found.
_VOCABULARY = 256

# The most batches over these tokens, which only rollouts that are not coupled stay below.
_MOST_BATCHES = 2_000

_SIDE = 6


@dataclass(frozen=True)
class DistributionEffect:
    """The part of `Dependence` on the two distributions: the top-k set, and what a weight of both follows."""

    top_k: int | None = None
    student_and_teacher: str | None = None
    words: list[str] = field(default_factory=list)


def distribution_effect(
    loss: Loss, ratio_only: bool, batch_size: int, seed: int, limit: float, *, local: bool = True
) -> DistributionEffect:
    """The top-k set that a loss depends on; without one, and unless `ratio_only`, what its weight is a function of.

    Unless the loss is `local`, its gradient over several tokens is not that of one step at each of them, and what its
    weight would follow on one step is not what the loss follows.
    """
    top = likeliest_kept(loss, batch_size, seed, limit)
    if top is not None:
        k, whose = top
        return DistributionEffect(
            k, None, [f"All tokens but the {whose}'s {k} likeliest have one weight: their set enters the loss (T9)."]
        )
    if ratio_only:
        return DistributionEffect()
    named, words = _of_both(loss, batch_size, limit)
    if named is not None and not local:
        text = (
            "On one-step policies that sample for themselves, a token's weight is a function of its two probabilities"
        )
        return DistributionEffect(words=[f"{text}; over the panel's rollouts it depends on more."])
    return DistributionEffect(None, named, words)


def likeliest_kept(loss: Loss, batch_size: int, seed: int, limit: float) -> tuple[int, str] | None:
    """The size k of the top-k set, and whether student or teacher ranks it, if two pairs of distributions agree."""
    try:
        first = _sets(loss, batch_size, 31 + 2 * seed, limit)
    except BudgetExceededError:  # rollouts are coupled in a way that no batch of a few showed
        return None
    if not any(first.values()):
        return None
    second = _sets(loss, batch_size, 32 + 2 * seed, limit)
    return next(((k, whose) for whose, k in first.items() if k is not None and k == second[whose]), None)


def _sets(loss: Loss, batch_size: int, seed: int, limit: float) -> dict[str, int | None]:
    """The size of the top-k set on one pair, if the teacher ranks it and if the student does."""
    generator = torch.Generator().manual_seed(seed)
    log_p, log_q = (
        torch.log_softmax(1.5 * torch.randn(_VOCABULARY, generator=generator, dtype=torch.float64), -1)
        for _ in range(2)
    )
    weights = one_step_weights(loss, log_p, log_q, batch_size, budget=_MOST_BATCHES)
    return {"teacher": _likeliest(weights, log_q, limit), "student": _likeliest(weights, log_p, limit)}


def _likeliest(weights: Tensor, ranks: Tensor, limit: float) -> int | None:
    """The number of likeliest tokens after which all weights are equal; None if at most one token remains."""
    ordered = weights[ranks.argsort(descending=True)]
    span = float(weights.max() - weights.min())
    if span <= 1e-12:
        return None
    k = int(((ordered - ordered[-1]).abs() > limit * span).nonzero().max()) + 1
    return k if k <= len(ranks) - 2 else None


def _grid(rest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of student and teacher over a square of pairs (p, q), and the common values of its axes.

    With `rest`, the second half of the tokens has other pairs of the same total mass.
    """
    axis = torch.linspace(-2.0, 0.0, _SIDE, dtype=torch.float64).exp()
    axis = axis / (_SIDE * axis.sum())
    p, q = axis.repeat_interleave(_SIDE), axis.repeat(_SIDE)
    if rest:
        half = len(p) // 2
        p, q = (torch.cat([row[:half], _moved(row[half:], step)]) for row, step in ((p, 5), (q, 3)))
    return p.log(), q.log(), axis


def _moved(masses: Tensor, step: int) -> Tensor:
    """Other masses with the same sum."""
    other = masses.roll(step) * torch.linspace(0.5, 1.5, len(masses), dtype=masses.dtype)
    return other * (masses.sum() / other.sum())


def _of_both(loss: Loss, batch_size: int, limit: float) -> tuple[str | None, list[str]]:
    log_p, log_q, axis = _grid(rest=False)
    weights = one_step_weights(loss, log_p, log_q, batch_size)
    other_p, other_q, _ = _grid(rest=True)
    others = one_step_weights(loss, other_p, other_q, batch_size)
    scale, half = float(weights.abs().max()), len(weights) // 2
    if scale <= 1e-12:
        return None, []
    mine, theirs = weights[:half] - weights[0], others[:half] - others[0]
    if differ(mine, theirs, limit * scale):
        return None, ["A token's weight depends on the probabilities of other tokens of the same step."]
    square = weights.view(_SIDE, _SIDE)
    of_p, of_q = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    if differ(square + square.mean(), of_p + of_q, limit * scale):
        text = "The weight is a function A(p, q) of both probabilities that does not separate"
        text += ": the exact gradient of the sum of H(p, q), dH/dp = -A (T4)."
        return "a sum of H(p, q) with dH/dp = -A", [text]
    return _separated(of_q.flatten().numpy(), -of_p.flatten().numpy(), axis.numpy(), limit * scale)


def _separated(of_q: np.ndarray, of_p: np.ndarray, axis: np.ndarray, close: float) -> tuple[str, list[str]]:
    """What a weight `A = g(q) - h(p)` follows."""
    g, h = of_q - of_q[0], of_p - of_p[0]
    text = "The weight is g(q) - h(p)"
    if np.abs(g).max() <= close:
        return "a function of the student alone", [
            "The weight depends on the student's probability alone: the teacher does not enter it."
        ]
    alpha, other = _power(g, axis, close), _power(h, axis, close)
    shape = None if alpha is None else f"a multiple of {'log' if alpha == 0 else f'the power {alpha:.6g}'}"
    # A weight that falls as the teacher's probability grows goes the other way.
    falls = float(g[-1]) < 0
    way, sign = ("ascends", "minus ") if falls else ("follows", "")
    if np.abs(g - h).max() <= close:
        if alpha is None:
            text = f"{text} with g = h = phi': it {way} the Bregman divergence of phi (T4)."
            return f"{sign}Bregman divergence", [text]
        name = f"density-power divergence, alpha={alpha:.6g}"
        extra = "; at alpha=1 the squared difference of the probabilities" if alpha == 1 else ""
        text = f"{text} with g = h = phi' {shape}: it {way} the Bregman divergence of phi, the {name} (T4){extra}."
        return f"{sign}{name}", [text]
    if alpha == 0 and other == 0 and not falls:
        ratio = float(h @ g / (g @ g))
        name = f"KL(p||q) plus {ratio - 1:.6g} times the negative entropy of p"
        return name, [
            f"The weight is log q - {ratio:.6g} log p: {name}; at rest where p is q^(1/{ratio:.6g}), normalised."
        ]
    what = "" if shape is None else f", g {shape}"
    return "a sum of H(p, q) with dH/dp = h(p) - g(q)", [
        f"{text} with different g and h{what}: the exact gradient of a sum of H(p, q) (T4), at rest where g(q) - h(p) "
        "is one constant, in general not at the teacher."
    ]


def _power(values: np.ndarray, axis: np.ndarray, close: float) -> float | None:
    """The exponent of the power (0: the logarithm) that these values are a multiple of, of either sign."""

    def residual(alpha: float) -> np.ndarray:
        basis = np.log(axis) if abs(alpha) < 1e-9 else np.expm1(alpha * np.log(axis)) / alpha
        basis = basis - basis[0]
        return np.asarray(values - (values @ basis) / (basis @ basis) * basis)

    starts = np.linspace(-3.0, 4.0, 29)
    start = min(starts, key=lambda a: float(np.abs(residual(float(a))).max()))
    alpha = shortest(refined(residual, float(start)), lambda a: float(np.abs(residual(a)).max()), close)
    alpha = 0.0 if abs(alpha) < 1e-7 else alpha
    return alpha if float(np.abs(residual(alpha)).max()) <= 10 * close else None
