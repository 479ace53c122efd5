"""How the losses of tokens become one number, undone: is a loss exact but for the weight of its rollouts (T11)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.records import Keyed, Positive
from opdtheory.auditing.scenario import Scenario
from opdtheory.choices import Reduction
from opdtheory.exact import Loss
from opdtheory.exact.expectation import own_gradients
from opdtheory.exact.token_mean import of_token_mean
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts

__all__ = [
    "WORDS",
    "AgainstSum",
    "PerToken",
    "against_sum",
    "averaged_over_rollouts",
    "rollout_lengths",
    "undone",
    "weighted_tokens",
]

# Maps rollouts to a number for each token, `(B, T)`.
PerToken = Callable[[Rollouts], Tensor]

WORDS = {
    "token_sum": "a sum over tokens and mean over rollouts",
    "token_mean": "a token mean",
    "sequence_mean": "a mean over each rollout's tokens",
}

# Batch sizes at which a token mean is compared with the sum.
_SIZES = (1, 2, 4, 16)


@dataclass(frozen=True, eq=False)
class AgainstSum(Keyed):
    """What a mean costs against the sum over tokens, where lengths vary.

    Attributes:
        batch_size: number of rollouts in the batch.
        error: distance of the expected gradients at the best scale, relative to the loss's.
        cosine: cosine between them.
        scale: the best scale; for a token mean it tends to the inverse of the number of tokens of a rollout.
    """

    batch_size: Positive
    error: float
    cosine: float
    scale: float


def undone(loss: Loss, reduction: Reduction) -> Loss:
    r"""The loss with a mean made a sum over tokens and mean over rollouts: it is exact iff the loss is, as that mean.

    A token mean is multiplied by the batch's tokens per rollout, $\sum m / B$. In a mean over each rollout's tokens the
    gradient of each rollout is multiplied by its length.
    """
    if reduction == "token_mean":
        return averaged_over_rollouts(loss)
    if reduction == "sequence_mean":
        return weighted_tokens(loss, rollout_lengths)
    return loss


def against_sum(loss: Loss, reduction: Reduction, objective: Objective, scenario: Scenario) -> list[AgainstSum]:
    """A mean compared with the sum on one pair whose rollouts may end early, at several batch sizes.

    A mean over each rollout's tokens has the same expected gradient at every batch size.
    """
    (case,) = scenario.ending.single.sized(4, 3, (3,))
    exact = flat(case.exact(objective))
    if reduction == "token_mean":
        own = own_gradients(undone(loss, reduction), case.student, case.teacher, case.behavior)
        asked = {size: of_token_mean(own, size) for size in sorted({*_SIZES, scenario.batch_size})}
    else:
        asked = {1: scenario.single.moments(loss, case)}
    found = []
    for size, moments in asked.items():
        fit = fit_scale([flat(moments.mean)], [exact])
        found.append(AgainstSum(size, fit.errors[0], fit.cosine[0], fit.scale))
    return found


def averaged_over_rollouts(loss: Loss) -> Loss:
    r"""A mean over the batch's tokens made a sum over tokens and mean over rollouts, $\ell\,\sum m / B$ (T11)."""

    def averaged(rollouts: Rollouts) -> Tensor:
        value = loss(rollouts)
        # In the loss's own dtype, which determines what counts as rounding.
        return (value * (rollouts.mask.sum() / rollouts.mask.shape[0])).to(value.dtype)

    return averaged


def rollout_lengths(rollouts: Rollouts) -> Float[Tensor, "B T"]:
    """The number of unmasked tokens of each rollout, at least 1, for each of its positions."""
    return rollouts.mask.sum(-1, keepdim=True).clamp_min(1).expand_as(rollouts.mask)


def weighted_tokens(loss: Loss, weight: PerToken) -> Loss:
    r"""The loss with the term of each token multiplied by a detached weight, $\sum_n \mathrm{sg}(c_n)\,\ell_n$.

    The value is unchanged, and the gradient at each position is multiplied. That is equivalent for every loss in which
    the term of a token depends on the student only through the logits of its position.
    """

    def changed(rollouts: Rollouts) -> Tensor:
        weights = weight(rollouts).detach()
        return loss(
            replace(
                rollouts,
                student_logits=_gate(rollouts.student_logits, weights.unsqueeze(-1)),
                student_logprobs=_gate(rollouts.student_logprobs, weights),
            )
        )

    return changed


def _gate(values: Tensor, weights: Tensor) -> Tensor:
    """The values themselves, with gradients multiplied by weights; -inf has none."""
    moved = torch.where(torch.isfinite(values), values - values.detach(), 0.0)
    return values.detach() + weights * moved
