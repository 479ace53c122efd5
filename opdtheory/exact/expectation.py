"""The exact expected gradient of any loss under the distribution that samples its rollouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError, check_integer
from opdtheory.exact.enumeration import SEQUENCE_BUDGET, Enumeration
from opdtheory.exact.modes import plain_modes
from opdtheory.exact.policies import Policy
from opdtheory.exact.probe import Loss, Probe

__all__ = [
    "BATCH_BUDGET",
    "GradientMoments",
    "Loss",
    "OwnGradients",
    "expected_gradient",
    "gradient_moments",
    "own_gradients",
]

# Evaluations of a loss that one expectation may take: about half a minute at 0.5 ms each.
BATCH_BUDGET = 60_000

# How many batches of the requested size are compared with larger ones for a rollout's sensitivity.
_SEPARABILITY_SAMPLE = 8

# Up to this many batches are all evaluated, since a sample of so few may be all alike.
_EVERY_COMPANY = 16

# Entries of gradients that are held at once: 32 MiB.
_HELD = 2**22

# Every batch is evaluated up to these numbers: of a loss that `torch.func.vmap` can map over batches, which then costs
# microseconds each, and of one that it cannot.
_MOST_MAPPED = 20_000
_MOST_CALLED = 1_000

# What was left to a sample of batches: nothing, the order of rollouts in a batch, or the rollouts beside each other.
Sampled = Literal["", "order", "company"]


@dataclass(frozen=True)
class GradientMoments:
    """The exact first two moments of a stochastic gradient.

    Attributes:
        mean: the expected gradient, by level of the student's table.
        variance: the trace of the covariance of one batch's gradient.
        second_moment: `E |g|^2` of one batch's gradient.
        separable: whether the loss of a batch is the mean of its rollouts' own losses.
        evaluations: the number of calls of the loss.
        terms: the largest gradient that enters a softmax; what is much smaller than this cancels to zero.
        rounding: the share of `size` up to which a mean is zero, by the dtype of the loss.
        sampled: what was judged by a sample of batches, because there are too many to evaluate each: `company` (which
            rollouts meet in a batch: the loss is then taken to treat each alone), `order` (of the rollouts in a
            batch), or nothing, an empty string.
    """

    mean: list[Tensor]
    variance: float
    second_moment: float
    separable: bool
    evaluations: int
    terms: float = 0.0
    sampled: Sampled = ""
    rounding: float = 1e-12

    @property
    def size(self) -> float:
        """What the mean is compared with to tell whether it is zero: the noise, or the terms that cancel."""
        return max(math.sqrt(self.second_moment), self.terms)

    @property
    def is_zero(self) -> bool:
        """Whether the mean is zero, up to rounding of what cancels."""
        norm = math.sqrt(sum(float(level.square().sum()) for level in self.mean))
        return norm <= self.rounding * self.size

    def times(self, factor: float) -> GradientMoments:
        """The moments of the loss times a positive constant."""
        return replace(
            self,
            mean=[factor * level for level in self.mean],
            variance=factor**2 * self.variance,
            second_moment=factor**2 * self.second_moment,
            terms=factor * self.terms,
        )


def expected_gradient(
    loss: Loss,
    student: Policy,
    teacher: Policy,
    batch_size: int = 1,
    behavior: Policy | None = None,
    budget: int = BATCH_BUDGET,
    shared_prompt: bool = False,
) -> list[Tensor]:
    r"""The exact expectation $E_{y_1,\dots,y_B\sim\mu}[\nabla_\theta\,\mathrm{loss}]$ of a loss's gradient.

    The expectation is over every batch of `batch_size` rollouts that the behaviour policy $\mu$ can sample, in every
    order. Where these are more than 20,000 (1,000 for a loss that `torch.func.vmap` cannot map), a loss that treats
    each rollout alone on a sample of batches is taken to do so on all, and one whose value does not change with the
    order of the rollouts on a sample is evaluated in one order; `gradient_moments(...).sampled` says so.

    Args:
        loss: a function of `Rollouts` that returns a differentiable scalar.
        student: the policy `p`, whose parameters are differentiated.
        teacher: the policy `q`.
        batch_size: the number of rollouts in a batch.
        behavior: the policy that samples (default: the student).
        budget: the largest number of loss evaluations, and of sequences, which never exceed $2^{18}$.
        shared_prompt: whether the rollouts of a batch answer one prompt, drawn once, and are independent given it, as
            in a group of GRPO; otherwise each rollout draws its own. The prompt is what an environment writes before
            the student's first token.

    Returns:
        A list like `student.parameters()` (for a `TabularPolicy`, like `student.logits`).

    Raises:
        InvalidArgumentError: the policies do not match, or `batch_size` is below one.
        BudgetExceededError: more batches than `budget`; the message states the count.
        LossError: the loss is not a scalar, has no gradient, differs between identical calls, or gives NaN.
    """
    moments = gradient_moments(loss, student, teacher, batch_size, behavior, budget, shared_prompt)
    return student.pull_back(moments.mean)


def gradient_moments(
    loss: Loss,
    student: Policy,
    teacher: Policy,
    batch_size: int = 1,
    behavior: Policy | None = None,
    budget: int = BATCH_BUDGET,
    shared_prompt: bool = False,
    thorough: bool = True,
) -> GradientMoments:
    """Mean and variance of a loss's gradient in the student's table of logits; see `expected_gradient`.

    With `thorough=False` a sample of batches decides whether rollouts are coupled, however few batches there are: for
    searches, whose result is examined afterwards.

    Raises:
        InvalidArgumentError: the policies do not match, or `batch_size` is below one.
        BudgetExceededError: more batches than `budget`.
        LossError: as `expected_gradient`.
    """
    if not callable(loss):
        raise InvalidArgumentError("loss", f"must be a function of Rollouts, got {type(loss).__name__}")
    check_integer("batch_size", batch_size)
    with plain_modes():
        everything = Enumeration.build(student, teacher, behavior, min(budget, SEQUENCE_BUDGET))
        groups = _groups(everything, shared_prompt)
        probe = Probe(loss, everything)
        probe.check(groups[0], batch_size)
        if thorough:
            most = min(budget, _MOST_MAPPED if probe.maps(groups[0], batch_size) else _MOST_CALLED)
            for ordered in (True, False):
                if _count(groups, batch_size, ordered) <= most:
                    found = _from_batches(probe, groups, batch_size, ordered)
                    if found is not None:
                        return found
        shares = _shares_if_separable(probe, groups, batch_size, thorough)
        if shares is not None:
            return _from_singles(probe, shares, groups, batch_size)
        ordered = batch_size > 1 and not all(_symmetric(probe, group, batch_size) for group in groups)
        probe.maps(groups[0], batch_size)
        _check_budget(groups, batch_size, ordered, budget)
        found = _from_batches(probe, groups, batch_size, ordered)
        if found is None:  # an order that the sample missed
            _check_budget(groups, batch_size, True, budget)
            found = _from_batches(probe, groups, batch_size, True)
        assert found is not None
        return found


@dataclass(frozen=True)
class OwnGradients:
    """The gradient of each rollout's own loss, with the rollout's length and probability.

    Attributes:
        shares: the gradients in the logits, `(N, T, V)`.
        lengths: the number of unmasked tokens, `(N,)`.
        probability: the probability of each rollout, `(N,)`.
        table: sums gradients in logits by row of the student's table.
        evaluations: the number of calls of the loss.
        terms: as in `GradientMoments`.
        rounding: as in `GradientMoments`.
    """

    shares: Float[Tensor, "N T V"]
    lengths: Int64[Tensor, " N"]
    probability: Float[Tensor, " N"]
    table: _Table
    evaluations: int
    terms: float
    rounding: float

    def expected(self, weight: Float[Tensor, " N"]) -> Tensor:
        """The expected gradient with each rollout multiplied by a weight, rows of all levels stacked."""
        weighted = (self.probability * weight).view(-1, 1, 1) * self.shares
        return self.table.gradients(torch.arange(len(weight)).view(1, -1), weighted.unsqueeze(0))[0]

    @property
    def squared_norms(self) -> Float[Tensor, " N"]:
        """The squared length of each rollout's gradient; its positions are different rows of the table."""
        return self.shares.square().sum((1, 2))

    def levels(self, gradient: Float[Tensor, "R V"]) -> list[Tensor]:
        """A gradient by level."""
        return self.table.levels(gradient)


def own_gradients(loss: Loss, student: Policy, teacher: Policy, behavior: Policy | None = None) -> OwnGradients:
    """The gradient of each single rollout's loss.

    Raises:
        InvalidArgumentError: the policies do not match.
        LossError: as `expected_gradient`.
    """
    with plain_modes():
        everything = Enumeration.build(student, teacher, behavior)
        probe = Probe(loss, everything)
        every = torch.arange(len(everything))
        probe.check(every, 1)
        probe.maps(every, 1)
        shares = probe.sensitivities(every.view(-1, 1)).squeeze(1).double()
        lengths = everything.mask.sum(-1).long()
        table, probability = _Table(everything), everything.probability
        return OwnGradients(shares, lengths, probability, table, probe.evaluations, probe.terms, probe.rounding)


def _groups(everything: Enumeration, shared_prompt: bool) -> list[Tensor]:
    """The sequences that can meet in one batch: those of one prompt, or all."""
    if not shared_prompt:
        return [torch.arange(len(everything))]
    prompts = everything.prompts
    return [(prompts == prompt).nonzero().squeeze(-1) for prompt in prompts.unique()]


def _shares_if_separable(probe: Probe, groups: list[Tensor], batch_size: int, thorough: bool) -> Tensor | None:
    """As `_separable_shares`; None for a loss that refuses batches of another size."""
    try:
        return _separable_shares(probe, groups, batch_size, thorough)
    except LossError:
        raise
    except Exception:  # whatever the loss raises
        return None


def _separable_shares(probe: Probe, groups: list[Tensor], batch_size: int, thorough: bool) -> Tensor | None:
    """Each rollout's own gradient `(N, T, V)`, or None unless a batch's loss is the mean of its rollouts' losses.

    Each rollout is evaluated in different company: in the batch of its whole group, of a random half and of a random
    third, and some rollouts in batches of the requested size, where coupling is strongest. Its sensitivity must not
    change.
    """
    shares = torch.zeros_like(probe.logits)
    for group in groups:
        count = len(group)
        # Where a batch is larger than the group, the batch of all repeats some.
        everyone = torch.arange(max(count, batch_size)) % count
        shares[group] = len(everyone) * probe.sensitivity(group[everyone])[:count]
        alone = batch_size == 1 and not thorough
        for company in _a_few_companies(count) if alone else _companies(count, batch_size):
            batch = group[company]
            # The copies of a repeated rollout share its sensitivity equally.
            together, apart = len(batch) * probe.sensitivity(batch), shares[batch]
            scale = max(float(together.abs().max()), float(apart.abs().max()), 1e-300)
            if float((together - apart).abs().max()) > probe.same * scale:
                return None
    return shares


def _companies(count: int, batch_size: int) -> list[Tensor]:
    """Batches to evaluate a rollout in: all of them if they are few, else a sample and two partitions."""
    if math.comb(count + batch_size - 1, batch_size) <= _EVERY_COMPANY:
        return list(_batches(count, batch_size, ordered=False)[0])
    generator = torch.Generator().manual_seed(0)
    sample = torch.linspace(0, count - 1, min(count, _SEPARABILITY_SAMPLE)).round().long()
    companies = [torch.cat([i.view(1), torch.randint(count, (batch_size - 1,), generator=generator)]) for i in sample]
    for parts in (2, 3):
        if count // parts >= batch_size:
            companies.extend(torch.randperm(count, generator=generator).tensor_split(parts))
    return companies


def _a_few_companies(count: int) -> list[Tensor]:
    """Two single rollouts and two halves, for searches."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [order[:1], order[-1:], *(half for half in order.tensor_split(2) if len(half))]


def _from_singles(probe: Probe, shares: Tensor, groups: list[Tensor], batch_size: int) -> GradientMoments:
    table, probability = _Table(probe.everything), probe.everything.probability
    mean, within, between = table.zeros(), 0.0, 0.0
    for group in groups:
        total = float(probability[group].sum())
        weights = (probability[group] / total).view(-1, 1, 1)
        # Levels are disjoint sets of parameters, so one rollout's squared norm is a sum over positions.
        single = float((weights * shares[group].square()).sum())
        expected = table.gradients(group.view(1, -1), (weights * shares[group]).unsqueeze(0))[0]
        norm = float(expected.square().sum())
        mean += total * expected
        within += total * max(single - norm, 0.0)
        between += total * norm
    norm = float(mean.square().sum())
    # One group has no spread of means, not even by rounding.
    variance = within / batch_size + (max(between - norm, 0.0) if len(groups) > 1 else 0.0)
    return GradientMoments(
        table.levels(mean),
        variance,
        variance + norm,
        True,
        probe.evaluations,
        probe.terms,
        "company",
        probe.rounding,
    )


def _count(groups: list[Tensor], batch_size: int, ordered: bool) -> int:
    """The number of batches, in every order or in one."""
    counts = map(len, groups)
    return sum(n**batch_size if ordered else math.comb(n + batch_size - 1, batch_size) for n in counts)


def _check_budget(groups: list[Tensor], batch_size: int, ordered: bool, budget: int) -> None:
    evaluations = _count(groups, batch_size, ordered)
    if evaluations > budget:
        out_of = f"{max(map(len, groups))} sequences"
        out_of += f" for each of {len(groups)} prompts" if len(groups) > 1 else ""
        raise BudgetExceededError(
            f"the expectation over {'ordered ' if ordered else ''}batches of {batch_size} out of {out_of}",
            evaluations,
            budget,
            "lower the batch size, the vocabulary or the horizon, or raise budget",
        )


def _from_batches(probe: Probe, groups: list[Tensor], batch_size: int, ordered: bool) -> GradientMoments | None:
    """The moments from every batch; None if, `ordered` being false, another order gives another gradient.

    Each batch is then evaluated in two orders, ascending and by chance.
    """
    table, probability = _Table(probe.everything), probe.everything.probability
    mean, second_moment, separable = table.zeros(), 0.0, True
    one_order = batch_size > 1 and not ordered
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        batches, orderings = _batches(len(group), batch_size, ordered)
        total = float(probability[group].sum())
        weights = total * orderings * (probability[group] / total)[batches].prod(-1)
        # A batch of copies shows a rollout's own gradient if the loss treats each rollout alone; one rollout is alone.
        own = torch.zeros_like(probe.logits)
        if batch_size > 1:
            own[group] = probe.sensitivities(group.view(-1, 1).expand(-1, batch_size)).sum(1).to(own.dtype)
        for some, weight in _chunks(group[batches], weights, mean.numel()):
            found = probe.sensitivities(some)
            if one_order and not _same_in_other_orders(probe, some, found, generator):
                return None
            separable = separable and (batch_size == 1 or _alike(probe, batch_size * found, own[some]))
            gradients = table.gradients(some, found)
            mean += torch.einsum("m,mrv->rv", weight, gradients)
            second_moment += float(weight @ gradients.square().sum((1, 2)))
    norm = float(mean.square().sum())
    return GradientMoments(
        table.levels(mean),
        max(second_moment - norm, 0.0),
        second_moment,
        separable,
        probe.evaluations,
        probe.terms,
        "order" if one_order else "",
        probe.rounding,
    )


def _chunks(batches: Tensor, weights: Tensor, entries: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with their weights, as many at a time as gradients of so many entries may be held."""
    chunk = max(1, _HELD // entries)
    yield from zip(batches.split(chunk), weights.split(chunk), strict=True)


def _same_in_other_orders(probe: Probe, batches: Tensor, found: Tensor, generator: torch.Generator) -> bool:
    order = torch.rand(batches.shape, generator=generator).argsort(-1)
    again = probe.sensitivities(batches.gather(-1, order))
    return _alike(probe, found.gather(1, order[..., None, None].expand_as(found)), again)


def _alike(probe: Probe, first: Tensor, second: Tensor) -> bool:
    """Whether sensitivities are equal, batch by batch, up to rounding."""
    sizes = torch.maximum(first.abs().amax((1, 2, 3)), second.abs().amax((1, 2, 3))).clamp_min(1e-300)
    return bool(((first - second).abs().amax((1, 2, 3)) <= probe.same * sizes).all())


def _batches(count: int, batch_size: int, ordered: bool) -> tuple[Int64[Tensor, "M B"], Float[Tensor, " M"]]:
    """Every batch, with the number of orderings that it stands for."""
    if ordered:
        batches = torch.tensor(list(itertools.product(range(count), repeat=batch_size)))
        return batches, torch.ones(len(batches), dtype=torch.float64)
    # Not `torch.combinations`, which makes every order before it drops all but one.
    batches = torch.tensor(list(itertools.combinations_with_replacement(range(count), batch_size)))
    # The multinomial coefficient, member by member: members ascend, so equal ones form a run.
    run = torch.ones(len(batches), dtype=torch.float64)
    orderings = run
    for n in range(1, batch_size):
        run = torch.where(batches[:, n] == batches[:, n - 1], run + 1.0, 1.0)
        orderings = orderings * (n + 1) / run
    return batches, orderings


def _symmetric(probe: Probe, group: Tensor, batch_size: int) -> bool:
    """Whether the loss treats the rollouts of a batch alike, judged by a few shuffled batches."""
    generator = torch.Generator().manual_seed(1)
    # A rotation and an exchange of two generate every order; a loss may be unchanged by either one alone.
    rotated = torch.arange(batch_size).roll(1)
    exchanged = torch.arange(batch_size)
    exchanged[:2] = exchanged[:2].flip(0)
    orders = (rotated, exchanged) if batch_size > 2 else (rotated,)
    for _ in range(4):
        batch = group[torch.randint(len(group), (batch_size,), generator=generator)]
        straight = probe.sensitivity(batch)
        scale = max(float(straight.abs().max()), 1e-300)
        for order in orders:
            if float((straight[order] - probe.sensitivity(batch[order])).abs().max()) > probe.same * scale:
                return False
    return True


class _Table:
    """The student's table with its levels stacked, `(R, V)`, for sums over many rollouts."""

    def __init__(self, everything: Enumeration) -> None:
        self.heights = [len(table) for table in everything.student_tables]
        self.shape = (sum(self.heights), everything.student_tables[0].shape[-1])
        above = torch.tensor([0, *self.heights[:-1]]).cumsum(0)
        self.rows = everything.rows + above

    def zeros(self) -> Tensor:
        """A gradient of zero."""
        return torch.zeros(self.shape, dtype=torch.float64)

    def gradients(self, batches: Int64[Tensor, "M B"], sensitivity: Float[Tensor, "M B T V"]) -> Tensor:
        """Sums of sensitivities by table row: the gradient of each batch, `(M, R, V)`."""
        height, size = self.shape
        rows = self.rows[batches] + height * torch.arange(len(batches)).view(-1, 1, 1)
        sums = torch.zeros(len(batches) * height, size, dtype=torch.float64)
        sums.index_add_(0, rows.flatten(), sensitivity.to(sums.dtype).reshape(-1, size))
        return sums.view(-1, height, size)

    def levels(self, gradient: Float[Tensor, "R V"]) -> list[Tensor]:
        """A gradient by level."""
        return [level.clone() for level in gradient.split(self.heights)]
