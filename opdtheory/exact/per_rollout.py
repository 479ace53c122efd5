"""The gradients of every rollout's own loss, all at once, and estimates of their first two moments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import LossError, check_integer
from opdtheory.exact.expectation import Loss
from opdtheory.exact.policies import Policy
from opdtheory.exact.sampling import Sample, Sampler
from opdtheory.rollouts import Rollouts, gather_logprobs

__all__ = ["SampledMoments", "rollout_gradients", "sampled_moments"]

# Logits of the rollouts drawn at once, and products of positions formed at once.
_LOGITS_AT_ONCE = 2**19
_PRODUCTS_AT_ONCE = 2**22


def rollout_gradients(loss: Loss, sample: Sample) -> Float[Tensor, "B T V"]:
    r"""The gradient $\nabla_z\,\mathrm{loss}(y_b)$ of each rollout's own loss in its logits, without a loop.

    `torch.func` calls the loss, written for a batch, on batches of one rollout: a loss that couples its rollouts is
    not what it is in training.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor` that `torch.func.vmap` can map.
        sample: the rollouts.

    Raises:
        LossError: the loss is not a scalar, cannot be mapped, or has a gradient that is not finite.

    Example:
        >>> import opdtheory as opd
        >>> from opdtheory.exact.sampling import sample_rollouts
        >>> sample = sample_rollouts(*opd.random_pair(4, 3), 1000)
        >>> rollout_gradients(opd.estimator("opd_plus", "jsd"), sample).shape
        torch.Size([1000, 3, 4])
    """
    r = sample.rollouts

    def alone(
        student: Tensor, tokens: Tensor, mask: Tensor, teacher: Tensor, logprobs: Tensor, behavior: Tensor
    ) -> Tensor:
        tokens, mask, student = tokens.unsqueeze(0), mask.unsqueeze(0), student.unsqueeze(0)
        value = loss(
            Rollouts.unchecked(
                tokens=tokens,
                mask=mask,
                student_logits=student,
                teacher_logits=teacher.unsqueeze(0),
                student_logprobs=gather_logprobs(student, tokens, mask),
                teacher_logprobs=logprobs.unsqueeze(0),
                behavior_logprobs=behavior.unsqueeze(0),
            )
        )
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"the loss must return a scalar tensor, got {got}")
        return value

    mapped = torch.func.vmap(torch.func.grad(alone))
    try:
        gradients = mapped(
            r.student_logits.detach(), r.tokens, r.mask, r.teacher_logits, r.teacher_logprobs, r.behavior_logprobs
        )
    except RuntimeError as error:
        if isinstance(error, LossError):
            raise
        raise LossError(
            f"torch.func.vmap cannot map the loss over rollouts: {str(error).splitlines()[0]}; "
            "no branch may depend on the values of a tensor, and nothing may be modified in place"
        ) from error
    bad = 0 if math.isfinite(gradients.sum()) else int((~torch.isfinite(gradients)).sum())
    if bad:
        raise LossError(f"the gradients of single rollouts hold {bad} NaN or inf among {gradients.numel()} entries")
    return gradients


@dataclass(frozen=True)
class SampledMoments:
    """Estimates of the first two moments of one rollout's gradient.

    Attributes:
        mean: the mean gradient, a list like the parameters of a `TabularPolicy` or `MarkovPolicy`.
        variance: an unbiased estimate of the trace of the covariance of one rollout's gradient.
        variance_error: the standard error of `variance`.
        rollouts: the number of rollouts drawn.
    """

    mean: list[Tensor]
    variance: float
    variance_error: float
    rollouts: int


def sampled_moments(
    loss: Loss,
    student: Policy,
    teacher: Policy,
    rollouts: int,
    behavior: Policy | None = None,
    seed: int = 0,
) -> SampledMoments:
    r"""Mean and variance of one rollout's gradient by Monte Carlo, for losses and horizons without a recursion.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`, as `rollout_gradients` takes it.
        student: the policy `p`, which is differentiated.
        teacher: the policy `q`.
        rollouts: the number of rollouts to draw.
        behavior: the policy that samples (default: the student).
        seed: the seed of the generator; equal seeds give equal results.

    Raises:
        InvalidArgumentError: the policies do not match, or `rollouts` is below two.
        LossError: as `rollout_gradients`.
        BudgetExceededError: the tables are too large.
    """
    check_integer("rollouts", rollouts, 2)
    sampler = Sampler.build(student, teacher, behavior)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _LOGITS_AT_ONCE // (sampler.horizon * sampler.student.shape[-1]))
    total = torch.zeros_like(sampler.student)
    squares = []
    with torch.no_grad():
        for start in range(0, rollouts, at_once):
            sample = sampler.draw(min(at_once, rollouts - start), generator)
            gradients = rollout_gradients(loss, sample).double()
            total += sampler.scatter(sample.rows, gradients)
            squares.append(_squared_norms(sample.rows, gradients, sampler.chain))
        norms, mean = torch.cat(squares), total / rollouts
        # The mean is known far better than the squares, whose spread makes up nearly all of the variance's error.
        variance = (float(norms.mean()) - float(mean.square().sum())) * rollouts / (rollouts - 1)
        error = float(norms.std()) / math.sqrt(rollouts)
    return SampledMoments(sampler.unstack(mean), variance, error, rollouts)


def _squared_norms(rows: Tensor, gradients: Tensor, shared: bool) -> Tensor:
    """The squared norm of each rollout's gradient in the table; in a chain, positions may share rows."""
    if not shared:
        return gradients.square().sum((1, 2))
    at_once = max(1, _PRODUCTS_AT_ONCE // rows.shape[1] ** 2)
    found = []
    for some, part in zip(rows.split(at_once), gradients.split(at_once), strict=True):
        products = part @ part.transpose(1, 2)
        found.append(torch.where(some.unsqueeze(1) == some.unsqueeze(2), products, 0.0).sum((1, 2)))
    return torch.cat(found)
