"""A mean over the tokens of a batch, at any batch size, from single rollouts and the law of their lengths (T11)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import check_integer
from opdtheory.exact.expectation import GradientMoments, Loss, OwnGradients, own_gradients
from opdtheory.exact.modes import plain_modes
from opdtheory.exact.policies import Policy

__all__ = ["of_token_mean", "token_mean_moments"]


def token_mean_moments(
    token_sum: Loss, student: Policy, teacher: Policy, batch_size: int, behavior: Policy | None = None
) -> GradientMoments:
    r"""Mean and variance of the gradient of a token mean over batches of any size.

    If a loss sums over tokens, $\frac1B\sum_b \ell_b$, the mean over the tokens of the batch is $\frac1N\sum_b \ell_b$
    with $N = \sum_b L_b$. Rollouts are independent, so that with $S$ the number of tokens of $B-1$ others

    $$\textstyle E[\nabla] = B\, E_y\!\left[\nabla\ell(y)\; E\,\frac{1}{L(y)+S}\right],$$

    and the law of $S$ is a convolution: no batch is enumerated.

    Args:
        token_sum: the loss that sums over tokens and averages over rollouts, each treated alone.
        student: the policy `p`, whose table is differentiated.
        teacher: the policy `q`.
        batch_size: the number of rollouts `B`.
        behavior: the policy that samples (default: the student).

    Raises:
        InvalidArgumentError: the policies do not match, or `batch_size` is below one.
        LossError: as `gradient_moments`.
    """
    check_integer("batch_size", batch_size)
    return of_token_mean(own_gradients(token_sum, student, teacher, behavior), batch_size)


def of_token_mean(own: OwnGradients, batch_size: int) -> GradientMoments:
    """The moments of `token_mean_moments` from the gradients of single rollouts, which serve any batch size.

    Args:
        own: the gradient of each rollout of the loss that sums over tokens.
        batch_size: the number of rollouts `B`.
    """
    with plain_modes():
        lengths = own.lengths
        longest = int(lengths.max())
        law = torch.zeros(longest + 1, dtype=torch.float64).index_add_(0, lengths, own.probability)
        others = [_law_of_sum(law, batch_size - 1), _law_of_sum(law, max(batch_size - 2, 0))]
        inverse = torch.stack([_mean_inverse(others[0], int(n), 1) for n in range(longest + 1)])
        mean = batch_size * own.expected(inverse[lengths])
        by_length = torch.stack([own.expected((lengths == n).double()) for n in range(longest + 1)])
        once = torch.stack([_mean_inverse(others[0], n, 2) for n in range(longest + 1)])
        second = batch_size * float((own.probability * once[lengths] * own.squared_norms).sum())
        if batch_size > 1:
            products = torch.einsum("irv,jrv->ij", by_length, by_length)
            total = torch.arange(longest + 1).view(-1, 1) + torch.arange(longest + 1)
            twice = torch.stack([_mean_inverse(others[1], n, 2) for n in range(2 * longest + 1)])
            second += batch_size * (batch_size - 1) * float((products * twice[total]).sum())
        norm = float(mean.square().sum())
        return GradientMoments(
            own.levels(mean), max(second - norm, 0.0), second, False, own.evaluations, own.terms, "", own.rounding
        )


def _law_of_sum(law: Float[Tensor, " L"], count: int) -> Float[Tensor, " S"]:
    """The distribution of a sum of so many independent lengths, by repeated squaring."""
    total, power = torch.ones(1, dtype=torch.float64), law
    while count:
        if count % 2:
            total = _convolved(total, power)
        power, count = _convolved(power, power), count // 2
    return total


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.conv1d(a.view(1, 1, -1), b.flip(0).view(1, 1, -1), padding=len(b) - 1).flatten()


def _mean_inverse(law: Float[Tensor, " S"], more: int, power: int) -> Tensor:
    """`E[1 / max(S + more, 1)^power]`."""
    return (law / (torch.arange(len(law)) + more).clamp_min(1).double() ** power).sum()
