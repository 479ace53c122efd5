r"""A loss's gradient on drawn rollouts, minus estimators of known expectation, projected on a few fixed directions.

One observation is the gradient $g$ of one batch in the student's table. A combination $\sum_i \beta_i y_i$ of library
estimators on the same rollouts is subtracted, whose expectation $\sum_i \beta_i E y_i$ is known exactly. The residual
$\delta = g - \sum_i \beta_i y_i$ has little noise, and none if the loss is one of them. The factors come from other
draws, so every $\delta$ is an unbiased estimate of the same vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.black_box import INSISTS
from opdtheory.auditing.sampling.confidence import Moments
from opdtheory.auditing.scenario import Case
from opdtheory.choices import Importance
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import LossError, NotFiniteError
from opdtheory.estimators import offpolicy
from opdtheory.estimators.sampled import RatioAdvantage, ReturnToGo, ScoreFunction, SequenceWeight
from opdtheory.exact import Loss, exact_gradient
from opdtheory.exact.sampling import Sample, Sampler
from opdtheory.exact.tree import row_gradient
from opdtheory.rollouts import Rollouts

__all__ = [
    "Control",
    "Look",
    "Residuals",
    "controls",
    "directions",
    "fit_controls",
    "pilot",
    "sensitivity",
    "splits_into_batches",
]

# The largest table, in numbers: about 0.2 GB with all directions.
TABLE_BUDGET = 2**20

# The number of rollouts from which the frequency of each row is estimated.
_SCOUTS = 2048

# A vector with a smaller remainder after orthogonalisation lies in the span.
_DEPENDENT = 1e-7

_RANDOM_DIRECTIONS = 3
_COLLINEAR = 1e-10

# The number of observations to which the controls are fitted.
PILOT = 16


@dataclass(frozen=True)
class Control:
    """An estimator on the same rollouts, with its exact expectation.

    Attributes:
        gradient: maps a sample to its gradient in each drawn logit, `(B, T, V)`, including the mean over rollouts.
        mean: its expectation in the stacked table, flat.
    """

    gradient: Callable[[Sample], Tensor]
    mean: Float[Tensor, " RV"]


@dataclass(frozen=True)
class Look:
    """How one observation of a loss is made.

    Attributes:
        loss: the black box.
        sampler: the sampler of the pair.
        batch_size: the batch size that the verdict is about.
        batches: number of batches whose mean is one observation.
        at_once: whether one call of the loss serves all of them.
        shared_prompt: whether the rollouts of a batch answer one prompt.
    """

    loss: Loss
    sampler: Sampler
    batch_size: int
    batches: int
    at_once: bool
    shared_prompt: bool = False

    @property
    def calls(self) -> int:
        """The number of calls of the loss in one observation."""
        return 1 if self.at_once else self.batches

    @property
    def rollouts(self) -> int:
        """The number of rollouts in one observation."""
        return self.batch_size * self.batches

    def sample(self, generator: torch.Generator) -> Sample:
        """The rollouts of one observation, batch after batch."""
        return self.sampler.draw(self.rollouts, generator, self.batch_size if self.shared_prompt else 1)

    def draw(self, generator: torch.Generator) -> tuple[Sample, Tensor]:
        """The rollouts of one observation, and the mean gradient of their batches in each logit, `(B, T, V)`."""
        sample = self.sample(generator)
        if self.at_once:
            return sample, sensitivity(self.loss, sample)
        parts = torch.arange(self.rollouts).split(self.batch_size)
        each = [sensitivity(self.loss, sample.select(index)) for index in parts]
        return sample, torch.cat(each) / self.batches


def sensitivity(loss: Loss, sample: Sample) -> Tensor:
    """The gradient of the loss of a batch in the logits of its rollouts, `(B, T, V)`.

    Raises:
        LossError: the loss is not a scalar, has no gradient, or is NaN.
    """
    with torch.enable_grad():
        value = loss(sample.rollouts)
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.dtype.is_floating_point:
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"the loss must return a floating-point tensor of shape (), got {got}")
    shape = tuple(sample.rollouts.student_logits.shape)
    if not torch.isfinite(value):
        found = float(value.detach())
        raise NotFiniteError(
            f"the loss must be finite, got {found} on a drawn batch of shape (B, T, V) = {shape}", shape
        )
    if not value.requires_grad:
        raise LossError("the loss has no gradient: its value does not require grad; is everything detached?")
    (gradient,) = torch.autograd.grad(value, sample.rollouts.student_logits, allow_unused=True)
    if gradient is None:
        raise LossError("the loss has no gradient: it does not depend on student_logits or student_logprobs")
    if not torch.isfinite(gradient).all():
        problem = "the gradient of the loss has NaN or inf although its value is finite, on a drawn batch of shape"
        raise NotFiniteError(f"{problem} (B, T, V) = {shape}", shape)
    return gradient


def splits_into_batches(look: Look, generator: torch.Generator, same: float) -> bool:
    """Whether the loss of many rollouts is the mean of its losses on batches of the requested size.

    Then one call on many rollouts replaces many calls. This is tested on one observation: the gradient in a rollout's
    logits must not depend on the other batches.

    Args:
        look: a look with several batches.
        generator: generator of the draws.
        same: relative difference that counts as rounding.

    Raises:
        LossError: the loss differs between identical calls, or as `sensitivity`.
    """
    many = look.sample(generator)
    first, *others = torch.arange(look.rollouts).split(look.batch_size)
    apart = sensitivity(look.loss, many.select(first))
    if not torch.equal(apart, sensitivity(look.loss, many.select(first))):
        raise LossError("the loss is not deterministic: its gradient changed between two identical calls")
    each = torch.cat([apart, *(sensitivity(look.loss, many.select(index)) for index in others)]) / look.batches
    try:
        together = sensitivity(look.loss, many)
    except INSISTS:
        return False
    scale = max(float(each.abs().max()), float(together.abs().max()), 1e-300)
    return float((each - together).abs().max()) <= same * scale


def controls(
    case: Case, sampler: Sampler, divergence: Divergence, granularity: str, gamma: float, batch_size: int
) -> list[Control]:
    """Estimators of known expectation, that of the claimed objective first.

    The others are three local ones, the bare score, a leave-one-out baseline, and the sum over the vocabulary.

    Raises:
        InvalidArgumentError: the claimed objective has no finite gradient.
    """

    def mean(entry: Divergence, where: str, discount: float = 1.0) -> Tensor:
        return sampler.stack(exact_gradient(case.student, case.teacher, entry, where, gamma=discount)).flatten()

    claimed: Callable[[Rollouts], Tensor]
    if granularity == "token_return":
        claimed = ReturnToGo(divergence, gamma, discounted=True)
    elif granularity == "sequence":
        claimed = SequenceWeight(divergence)
    else:
        claimed = RatioAdvantage(divergence.weight)
    off_policy = sampler.behavior is not sampler.student
    whole: Importance | None = "sequence" if off_policy else None
    prefix: Importance | None = "prefix" if off_policy else None
    own = prefix if granularity == "token_local" else whole
    found = [Control(_score(sampler, claimed, own), mean(divergence, granularity, gamma))]
    for entry in (as_divergence("reverse_kl"), as_divergence("forward_kl"), as_divergence("jsd")):
        if granularity != "token_local" or entry.name != divergence.name:
            local = _score(sampler, RatioAdvantage(entry.weight), prefix)
            found.append(Control(local, mean(entry, "token_local")))
    zero = torch.zeros(sampler.student.numel(), dtype=torch.float64)
    found.append(Control(_score(sampler, lambda r: torch.ones_like(r.mask), prefix), zero))
    if batch_size > 1:
        found.append(Control(_score(sampler, claimed, own, batch_size), zero))
    found.append(Control(_vocabulary(sampler, divergence), mean(divergence, "token_local")))
    return found


def directions(
    sampler: Sampler, exact: Tensor, others: list[Tensor], generator: torch.Generator
) -> Float[Tensor, "K RV"]:
    """Orthonormal directions: the exact gradient, those of other objectives, random ones, row sums and padding.

    Args:
        sampler: the sampler of the pair.
        exact: the claimed objective's gradient in the stacked table, flat; not zero.
        others: further gradients.
        generator: generator of the random directions and of the rollouts that show which rows are read.
    """
    scouts = sampler.draw(_SCOUTS, generator)
    live = scouts.rollouts.mask.flatten() > 0
    rows, count = scouts.rows.flatten(), len(sampler.student)
    read = torch.bincount(rows[live], minlength=count).unsqueeze(-1) / _SCOUTS
    padded = torch.bincount(rows[~live], minlength=count).unsqueeze(-1) / _SCOUTS
    p = torch.softmax(sampler.student, -1)
    found = [exact, *others]
    for _ in range(_RANDOM_DIRECTIONS):
        z = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        found.append((read * p * (z - (p * z).sum(-1, keepdim=True))).flatten())
        found.append(torch.randn(p.numel(), generator=generator, dtype=p.dtype))
    found.append((read * torch.ones_like(p)).flatten())
    found.append((padded * torch.randn(p.shape, generator=generator, dtype=p.dtype)).flatten())
    return _orthonormal(found)


def fit_controls(observed: Float[Tensor, "n K"], known: Float[Tensor, "n I K"], same: float) -> Float[Tensor, " I"]:
    """The factors of the controls that leave the least noise, or of one control alone if it leaves none.

    Args:
        observed: projections of the loss's gradient.
        known: projections of the controls minus their expectations.
        same: relative difference that counts as rounding.
    """
    target = (observed - observed.mean(0)).flatten()
    centred = known - known.mean(0)
    features = centred.transpose(0, 1).flatten(1)
    size = float(target.norm())
    for i, moved in enumerate(features):
        factor = float(moved @ target) / max(float(moved @ moved), 1e-300)
        if float((target - factor * moved).norm()) <= same * size:
            alone = torch.zeros(len(features), dtype=torch.float64)
            alone[i] = round(factor, 9) if abs(factor - round(factor, 9)) <= same else factor
            return alone
    # A control without noise, such as the sum over the vocabulary on one step, is only rounding.
    lengths = features.norm(dim=-1)
    usable = torch.isfinite(lengths)
    usable &= lengths > _COLLINEAR * lengths[usable].max()
    factors = torch.zeros(len(features), dtype=torch.float64)
    # With unit columns, a small singular value means collinearity and not a near teacher.
    sizes = lengths[usable]
    columns = (features[usable] / sizes.unsqueeze(-1)).T
    solution = torch.linalg.lstsq(columns, target.unsqueeze(-1), rcond=_COLLINEAR, driver="gelsd").solution
    factors[usable] = solution.squeeze(-1) / sizes
    return factors


def pilot(
    look: Look, basis: Float[Tensor, "K RV"], found: list[Control], generator: torch.Generator
) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n I K"], float]:
    """Projections of the loss's gradient and of the controls, to fit factors to, and the gradient's largest entry."""
    sampler, means = look.sampler, torch.stack([c.mean for c in found])
    observed, known, largest = [], [], 0.0
    for _ in range(PILOT):
        sample, gradient = look.draw(generator)
        table = sampler.scatter(sample.rows, gradient).flatten()
        observed.append(basis @ table)
        largest = max(largest, float(table.abs().max()))
        parts = torch.stack([sampler.scatter(sample.rows, c.gradient(sample)).flatten() for c in found])
        known.append((parts - means) @ basis.T)
    return torch.stack(observed), torch.stack(known), largest


class Residuals:
    """The stream of one pair: the residuals of the loss's gradient, projected, and their squared length.

    Attributes:
        known: the combined expectation of the controls, flat.
        projections: moments of the residual along each direction.
        products: moments of the product of two successive residuals, an unbiased estimate of the squared length of
            their expectation in all dimensions.
        different: number of observations whose residual was more than rounding.
    """

    def __init__(self, look: Look, basis: Tensor, found: list[Control], factors: Tensor, rounding: float) -> None:
        """Residuals after `factors` of the controls `found`, along the rows of `basis`."""
        self.look, self._basis, self._rounding = look, basis, rounding
        self._controls = [(float(f), c) for f, c in zip(factors, found, strict=True) if float(f) != 0.0]
        self._waiting: Tensor | None = None
        self.known = sum((f * c.mean for f, c in self._controls), torch.zeros_like(found[0].mean))
        self.projections = Moments.empty(len(basis))
        self.products = Moments.empty(1)
        self.different = 0

    def observe(self, generator: torch.Generator) -> None:
        """Make one observation and update the moments."""
        sample, left = self.look.draw(generator)
        for factor, control in self._controls:
            left = left - factor * control.gradient(sample)
        table = self.look.sampler.scatter(sample.rows, left).flatten()
        self.different += bool(table.abs().max() > self._rounding)
        self.projections = self.projections.add(self._basis @ table)
        if self._waiting is None:
            self._waiting = table
        else:
            self.products = self.products.add((self._waiting @ table).unsqueeze(0))
            self._waiting = None


def _score(
    sampler: Sampler,
    advantage: Callable[[Rollouts], Tensor],
    importance: Importance | None,
    group: int | None = None,
) -> Callable[[Sample], Tensor]:
    """The gradient of a score-function loss, or of what a leave-one-out baseline within groups subtracts from it."""
    weigh, p = ScoreFunction(advantage), torch.softmax(sampler.student, -1)

    def gradient(sample: Sample) -> Tensor:
        values = weigh.advantages(sample.rollouts)
        if group is not None:
            values = _mean_of_others(values, sample.rollouts.mask, group)
        if importance is not None:
            values = offpolicy.weighted(values, offpolicy.importance_weight(sample.rollouts, importance))
        per_token = -values.unsqueeze(-1) / len(sample.rows)
        away = -per_token * p[sample.rows]
        return away.scatter_add(-1, sample.rollouts.tokens.unsqueeze(-1), per_token)

    return gradient


def _mean_of_others(values: Tensor, mask: Tensor, group: int) -> Tensor:
    """For each unmasked position, the mean over the other rollouts of the group that are unmasked there."""
    grouped, alive = values.view(-1, group, values.shape[-1]), mask.view(-1, group, mask.shape[-1])
    others = alive.sum(1, keepdim=True) - alive
    mean = (grouped.sum(1, keepdim=True) - grouped) / others.clamp_min(1)
    return (mean * alive).view_as(values)


def _vocabulary(sampler: Sampler, divergence: Divergence) -> Callable[[Sample], Tensor]:
    table = row_gradient(divergence, torch.log_softmax(sampler.student, -1), torch.log_softmax(sampler.teacher, -1))

    def gradient(sample: Sample) -> Tensor:
        weight = sample.rollouts.mask * offpolicy.prefix_weight(sample.rollouts)
        return weight.unsqueeze(-1) * table[sample.rows] / len(sample.rows)

    return gradient


def _orthonormal(vectors: list[Tensor]) -> Tensor:
    basis: list[Tensor] = []
    for vector in vectors:
        size = float(vector.norm())
        if not 0.0 < size < float("inf"):
            continue
        left = vector / size
        for _ in range(2):  # Twice, because of rounding.
            for unit in basis:
                left = left - (unit @ left) * unit
        if float(left.norm()) > _DEPENDENT:
            basis.append(left / left.norm())
    return torch.stack(basis)
