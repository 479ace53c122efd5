r"""Any divergence on a chunk, by its own functions of $\log u$ in float64, with the conventions of T10."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.kernels.distributions import Distributions, row_sum
from opdtheory.kernels.forms import Filled, Form

__all__ = [
    "LogDistributions",
    "form",
    "log_distributions",
    "paired",
    "reference_form",
    "terms",
    "under_student",
    "weight_masses",
]

# Beyond, e^t nears the end of float64, and f(u)/u is taken as its limit or as a straight line in log u.
_FARTHEST = 700.0


class LogDistributions(NamedTuple):
    """Log-probabilities of a chunk in float64, and the tokens that both distributions have, `(R, V)` each."""

    log_p: Tensor
    log_q: Tensor
    log_u: Tensor
    both: Tensor


def paired(log_p: Tensor, log_q: Tensor) -> LogDistributions:
    """Log-probabilities with their log-ratio, which is 0 where a distribution lacks the token."""
    both = (log_p > -math.inf) & (log_q > -math.inf)
    return LogDistributions(log_p, log_q, torch.where(both, log_q - log_p, 0.0), both)


def log_distributions(distributions: Distributions) -> LogDistributions:
    """Log-probabilities from the logits of a chunk."""
    log_p = distributions.student.double() * distributions.scale - distributions.student_normaliser()
    return paired(log_p, distributions.teacher.double() * distributions.scale - distributions.teacher_normaliser())


def reference_form(divergence: Divergence) -> Form:
    r"""The terms $p f(u)$ and the masses $p\,w_f(u)$ by the divergence's own methods, for float64 buffers.

    $p = 0 < q$ gives the value $f'(\infty)\,q$ and no gradient, $p > 0 = q$ the value $p f(0)$ and its gradient, and
    $p = q = 0$ nothing. An infinite term has the value inf and no gradient.
    """

    def fill(distributions: Distributions) -> Filled:
        logs = log_distributions(distributions)
        # Forms work on the scale of the buffers.
        mass = weight_masses(divergence, logs).mul_(distributions.total)
        # A distribution whose normaliser is NaN would pass for one without tokens: its value becomes NaN instead.
        unusable = 0.0 * (distributions.student_normaliser() + distributions.teacher_normaliser())
        return Filled(mass, distributions.total * row_sum(terms(divergence, logs)) + unusable, row_sum(mass))

    return Form("mass", 1.0, fill)


def terms(divergence: Divergence, logs: LogDistributions, waits: bool = True) -> Tensor:
    """The terms $p f(q/p)$; without `waits` the host waits for no number of the device, and NaN is not refused."""
    terms = under_student(form(divergence, "generator", logs.log_u.clamp(max=_FARTHEST), waits), logs)
    far = logs.log_u > _FARTHEST
    if not waits:
        terms = torch.where(far, logs.log_q.exp() * _per_ratio(divergence, logs.log_u, waits)[0], terms)
    elif bool(far.any()):
        height, _ = _per_ratio(divergence, logs.log_u[far])
        terms = terms.masked_scatter(far, logs.log_q[far].exp() * height)
    terms = terms + _boundary(~logs.both, logs.log_p, divergence.at_zero)
    return terms + _boundary(~logs.both, logs.log_q, divergence.slope_at_infinity)


def weight_masses(divergence: Divergence, logs: LogDistributions, waits: bool = True) -> Tensor:
    r"""The masses $p\,w_f(q/p)$, zero where the term of the value is infinite."""
    mass = under_student(form(divergence, "weight", logs.log_u.clamp(max=_FARTHEST), waits), logs)
    far = logs.log_u > _FARTHEST
    if not waits:
        mass = torch.where(far, logs.log_q.exp() * _per_ratio(divergence, logs.log_u, waits)[1], mass)
    elif bool(far.any()):
        _, slope = _per_ratio(divergence, logs.log_u[far])
        mass = mass.masked_scatter(far, logs.log_q[far].exp() * slope)
    mass = mass + _boundary(~logs.both, logs.log_p, -divergence.at_zero)
    return torch.where(torch.isfinite(mass), mass, 0.0)


def form(divergence: Divergence, kind: Literal["generator", "weight"], log_u: Tensor, waits: bool) -> Tensor:
    """The generator or the weight, which wait for the device in order to refuse NaN, or not."""
    if waits:
        return divergence.generator(log_u) if kind == "generator" else divergence.weight(log_u)
    function = divergence._forms[kind]
    values = function.function(log_u)
    values = torch.where(log_u == -math.inf, torch.full_like(values, function.at_zero), values)
    return torch.where(log_u == math.inf, torch.full_like(values, function.at_infinity), values)


def under_student(values: Tensor, logs: LogDistributions) -> Tensor:
    """Values times `p`, zero for tokens that a distribution lacks; infinite only if the product is."""
    # The root is applied twice, as p may underflow where the product does not.
    root = torch.where(logs.both, logs.log_p / 2, -math.inf).exp()
    return torch.where(root > 0, values * root * root, 0.0)


def _per_ratio(divergence: Divergence, log_u: Tensor, waits: bool = True) -> tuple[Tensor, Tensor]:
    """The quotients `f(u)/u` and `w(u)/u` of huge ratios: limits, or a straight line in `log u` and its slope."""
    if math.isfinite(divergence.slope_at_infinity):
        return torch.full_like(log_u, divergence.slope_at_infinity), torch.zeros_like(log_u)
    end = torch.full_like(log_u, _FARTHEST)
    slope = form(divergence, "weight", end, waits) * torch.exp(-end)
    return form(divergence, "generator", end, waits) * torch.exp(-end) + slope * (log_u - end), slope


def _boundary(where: Tensor, log_mass: Tensor, limit: float) -> Tensor:
    mass = torch.where(where, log_mass, -math.inf).exp()
    # 0 * inf must be 0.
    return mass * limit if math.isfinite(limit) else torch.zeros_like(mass).masked_fill(mass > 0, limit)
