r"""A loss's gradient on drawn rollouts, seen from a few fixed directions and beside estimators of known expectation.

One observation is the gradient $g$ of one batch in the student's table. From it a combination $\sum_i \beta_i y_i$
of library estimators on the same rollouts is taken, whose expectation $\sum_i \beta_i E y_i$ is known exactly: what is
left, $\delta = g - \sum_i \beta_i y_i$, has little noise, none at all if the loss is one of them. The factors come from
draws that are not used again, so that every $\delta$ is an unbiased look at the same vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.sampling.confidence import Moments
from opdtheory.auditing.scenario import Case
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import LossError
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
    "sensitivity",
    "splits_into_batches",
]

# Numbers in one table that are worth a matrix of directions: about 0.2 GB with all of them.
TABLE_BUDGET = 2**20

# Rollouts from which it is learned how often each row is read.
_SCOUTS = 2048

# What orthogonalising leaves of a vector that lies in the span already.
_DEPENDENT = 1e-7

_RANDOM_DIRECTIONS = 3
_COLLINEAR = 1e-10


@dataclass(frozen=True)
class Control:
    """An estimator on the same rollouts, as the gradient in each drawn logit, with its exact expectation.

    Attributes:
        gradient: maps a sample to `(B, T, V)`, the mean over rollouts included.
        mean: its expectation in the stacked table, flat.
    """

    gradient: Callable[[Sample], Tensor]
    mean: Float[Tensor, " RV"]


@dataclass(frozen=True)
class Look:
    """How a loss is looked at in one observation.

    Attributes:
        loss: the black box.
        sampler: of the pair.
        batch_size: rollouts it is judged at.
        batches: how many batches one observation is the mean of.
        at_once: whether one call of the loss does for all of them.
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
        """Calls of the loss in one observation."""
        return 1 if self.at_once else self.batches

    @property
    def rollouts(self) -> int:
        """Rollouts in one observation."""
        return self.batch_size * self.batches

    def sample(self, generator: torch.Generator) -> Sample:
        """The rollouts of one observation, batch after batch."""
        return self.sampler.draw(self.rollouts, generator, self.batch_size if self.shared_prompt else 1)

    def draw(self, generator: torch.Generator) -> tuple[Sample, Tensor]:
        """Rollouts, and the mean gradient of their batches in each logit, `(B, T, V)`."""
        sample = self.sample(generator)
        if self.at_once:
            return sample, sensitivity(self.loss, sample)
        parts = torch.arange(self.rollouts).split(self.batch_size)
        each = [sensitivity(self.loss, sample.select(index)) for index in parts]
        return sample, torch.cat(each) / self.batches


def sensitivity(loss: Loss, sample: Sample) -> Tensor:
    """Gradient of the loss of a batch in each of its rollouts' logits, `(B, T, V)`.

    Raises:
        LossError: the loss is no scalar, has no gradient, or gives NaN.
    """
    with torch.enable_grad():
        value = loss(sample.rollouts)
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.dtype.is_floating_point:
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"the loss returned {got}; a floating tensor of shape () is needed")
    if not torch.isfinite(value):
        raise LossError(f"the loss's value is {float(value.detach())} on a drawn batch; it must be finite")
    if not value.requires_grad:
        raise LossError("the loss has no gradient: its value does not require grad; is everything detached?")
    (gradient,) = torch.autograd.grad(value, sample.rollouts.student_logits, allow_unused=True)
    if gradient is None:
        raise LossError("the loss has no gradient: it does not depend on student_logits or student_logprobs")
    if not torch.isfinite(gradient).all():
        raise LossError("the loss's gradient holds NaN or inf on a drawn batch although its value is finite")
    return gradient


def splits_into_batches(look: Look, generator: torch.Generator, same: float) -> bool:
    """Whether the loss of many rollouts is the mean of its losses on batches of the size asked for.

    Then one call on many rollouts stands for many calls. Looked at on one observation, as a sensitivity that moves
    with the company a rollout keeps.

    Args:
        look: at several batches.
        generator: of the draws.
        same: relative difference that is rounding.

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
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):  # It may insist on its batch size.
        return False
    scale = max(float(each.abs().max()), float(together.abs().max()), 1e-300)
    return float((each - together).abs().max()) <= same * scale


def controls(
    case: Case, sampler: Sampler, divergence: Divergence, granularity: str, gamma: float, batch_size: int
) -> list[Control]:
    """The claimed objective's estimator first; local ones, baselines, the bare score, and the whole vocabulary's.

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
    whole: offpolicy.Importance | None = "sequence" if off_policy else None
    prefix: offpolicy.Importance | None = "prefix" if off_policy else None
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
    """Orthonormal directions: the exact gradient, other objectives', random ones, row sums and padding.

    Args:
        sampler: of the pair.
        exact: the claimed objective's gradient in the stacked table, flat; not zero.
        others: further gradients.
        generator: of the random directions and of the rollouts that tell where gradients live.
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
    """The factors of the controls that leave least noise; of one control alone if it leaves none.

    Args:
        observed: projections of the loss's gradient.
        known: projections of the controls less their expectation.
        same: relative difference that is rounding.
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
    # A control without noise, such as the whole vocabulary's on one step, has nothing but rounding to offer.
    lengths = features.norm(dim=-1)
    usable = torch.isfinite(lengths)
    usable &= lengths > _COLLINEAR * lengths[usable].max()
    factors = torch.zeros(len(features), dtype=torch.float64)
    # Unit columns: a singular value then tells collinearity, and not that a teacher is near.
    sizes = lengths[usable]
    columns = (features[usable] / sizes.unsqueeze(-1)).T
    solution = torch.linalg.lstsq(columns, target.unsqueeze(-1), rcond=_COLLINEAR, driver="gelsd").solution
    factors[usable] = solution.squeeze(-1) / sizes
    return factors


class Residuals:
    """The stream of one pair: what the controls leave of the loss's gradient, projected, and its squared length.

    Attributes:
        known: the controls' combined expectation, flat.
        projections: moments of the residual along each direction.
        products: moments of the product of two successive residuals, an unbiased look at the squared length of
            their expectation, over all directions there are.
        different: in how many observations the residual was no rounding.
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
        """Make one observation and add what it says."""
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
    importance: offpolicy.Importance | None,
    group: int | None = None,
) -> Callable[[Sample], Tensor]:
    """The gradient of a score-function loss, or of what a leave-one-out baseline in groups takes off it."""
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
    """Mean over the other rollouts of a group that are unmasked at a position, for the unmasked ones."""
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
        for _ in range(2):  # Once more, for what rounding left.
            for unit in basis:
                left = left - (unit @ left) * unit
        if float(left.norm()) > _DEPENDENT:
            basis.append(left / left.norm())
    return torch.stack(basis)
