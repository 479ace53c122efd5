"""The exact expected gradient of any loss under the distribution that samples its rollouts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import (
    BudgetExceededError,
    InvalidArgumentError,
    LossError,
    NotFiniteError,
    check_integer,
)
from opdtheory.exact.enumeration import SEQUENCE_BUDGET, Enumeration
from opdtheory.exact.policies import Policy
from opdtheory.exact.threads import one_thread
from opdtheory.rollouts import Rollouts

__all__ = ["BATCH_BUDGET", "GradientMoments", "Loss", "expected_gradient", "gradient_moments"]

Loss = Callable[[Rollouts], Tensor]

# Evaluations of a loss that one expectation may take: about half a minute at 0.5 ms each.
BATCH_BUDGET = 60_000

# How many batches of the requested size are compared with larger ones for a rollout's sensitivity.
_SEPARABILITY_SAMPLE = 8

# Up to this many batches are all evaluated, since a sample of so few may be all alike.
_EVERY_COMPANY = 16

# Two evaluations of one separable loss differ only by rounding in the dtype that it returns, unless that is too narrow
# for the difference to tell anything. A tenth of what an audit takes for rounding of the expectation itself.
_SAME = {torch.float32: 1e-5}
_SAME_IN_FLOAT64 = 1e-10

# Entries of gradients that are held at once: 32 MiB.
_HELD = 2**22


@dataclass(frozen=True)
class GradientMoments:
    """The exact first two moments of a stochastic gradient.

    Attributes:
        mean: the expected gradient, by level of the student's table.
        variance: the trace of the covariance of one batch's gradient.
        second_moment: `E |g|^2` of one batch's gradient.
        separable: whether the loss of a batch is the mean of its rollouts' own losses.
        evaluations: the number of calls of the loss.
    """

    mean: list[Tensor]
    variance: float
    second_moment: float
    separable: bool
    evaluations: int


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

    The expectation is over every batch of `batch_size` rollouts that the behaviour policy $\mu$ can sample: batch by
    batch, up to symmetry, if the loss couples its rollouts, and from single rollouts if it is found not to.

    Args:
        loss: a function of `Rollouts` that returns a differentiable scalar.
        student: the policy `p`, whose parameters are differentiated.
        teacher: the policy `q`.
        batch_size: the number of rollouts in a batch.
        behavior: the policy that samples (default: the student).
        budget: the largest number of loss evaluations, and of sequences, which never exceed 2**18.
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
) -> GradientMoments:
    """Mean and variance of a loss's gradient in the student's table of logits; see `expected_gradient`.

    Raises:
        InvalidArgumentError: the policies do not match, or `batch_size` is below one.
        BudgetExceededError: more batches than `budget`.
        LossError: as `expected_gradient`.
    """
    if not callable(loss):
        raise InvalidArgumentError("loss", f"must be a function of Rollouts, got {type(loss).__name__}")
    check_integer("batch_size", batch_size)
    with one_thread():
        everything = Enumeration.build(student, teacher, behavior, min(budget, SEQUENCE_BUDGET))
        groups = _groups(everything, shared_prompt)
        probe = _Probe(loss, everything)
        probe.check(groups[0])
        shares = _separable_shares(probe, groups, batch_size)
        if shares is not None:
            return _from_singles(probe, shares, groups, batch_size)
        return _from_batches(probe, groups, batch_size, budget)


def _groups(everything: Enumeration, shared_prompt: bool) -> list[Tensor]:
    """The sequences that can meet in one batch: those of one prompt, or all."""
    if not shared_prompt:
        return [torch.arange(len(everything))]
    prompts = everything.prompts
    return [(prompts == prompt).nonzero().squeeze(-1) for prompt in prompts.unique()]


class _Probe:
    """Evaluates a loss on batches of enumerated sequences and reads its sensitivity to every logit."""

    def __init__(self, loss: Loss, everything: Enumeration) -> None:
        self.loss = loss
        self.everything = everything
        self.logits = everything.gather_logits([t.detach() for t in everything.student_tables])
        self.evaluations = 0
        self.same = _SAME_IN_FLOAT64

    def check(self, group: Tensor) -> None:
        """Raise if the loss differs between two identical calls on some sequences of a group."""
        index = group[:4]
        first, second = self.value_and_sensitivity(index), self.value_and_sensitivity(index)
        for name, a, b in zip(("value", "gradient"), first, second, strict=True):
            if not torch.equal(a, b):
                raise LossError(
                    f"the loss is not deterministic: its {name} changed by {float((a - b).abs().max()):.3g} between "
                    "two identical calls; seed or remove its randomness, and keep no state between calls"
                )

    def sensitivity(self, index: Tensor) -> Float[Tensor, "B T V"]:
        """The gradient of the loss of a batch in each of its rollouts' logits."""
        return self.value_and_sensitivity(index)[1]

    def value_and_sensitivity(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch and its gradient in each rollout's logits."""
        self.evaluations += 1
        leaf = self.logits[index].requires_grad_()
        with torch.enable_grad():
            value = self.loss(self.everything.rollouts(index, leaf))
        _check_value(value, tuple(leaf.shape))
        self.same = _SAME.get(value.dtype, _SAME_IN_FLOAT64)
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
        if gradient is None:
            raise LossError(
                "the loss has no gradient: its value does not depend on student_logits or student_logprobs; "
                "is everything detached?"
            )
        # A sum is finite only if its terms are, and takes one operation.
        bad = 0 if math.isfinite(gradient.sum()) else int((~torch.isfinite(gradient)).sum())
        if bad:
            raise NotFiniteError(
                f"the loss's gradient holds {bad} NaN or inf among {gradient.numel()} entries although its value is "
                f"finite; look for inf * 0 in its backward pass; the batch has shape (B, T, V) = {tuple(leaf.shape)}",
                tuple(leaf.shape),
            )
        return value.detach(), gradient


def _check_value(value: object, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor):
        raise LossError(f"the loss must return a scalar tensor, got {type(value).__name__}")
    if value.ndim != 0:
        raise LossError(
            f"the loss must return a scalar tensor, got shape {tuple(value.shape)}; reduce it, for example by "
            "rollouts.token_sum(values)"
        )
    if not value.dtype.is_floating_point:
        raise LossError(f"the loss must return a floating-point dtype, got {value.dtype}")
    if not math.isfinite(value.detach()):
        found = float(value.detach())
        raise NotFiniteError(
            f"the loss's value must be finite, got {found} on a batch of shape (B, T, V) = {shape}", shape
        )
    if not value.requires_grad:
        raise LossError("the loss has no gradient: its value does not require grad; is everything detached?")


def _separable_shares(probe: _Probe, groups: list[Tensor], batch_size: int) -> Tensor | None:
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
        for company in _companies(count, batch_size):
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


def _from_singles(probe: _Probe, shares: Tensor, groups: list[Tensor], batch_size: int) -> GradientMoments:
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
    return GradientMoments(table.levels(mean), variance, variance + norm, True, probe.evaluations)


def _from_batches(probe: _Probe, groups: list[Tensor], batch_size: int, budget: int) -> GradientMoments:
    ordered = batch_size > 1 and not all(_symmetric(probe, group, batch_size) for group in groups)
    counts = [len(group) for group in groups]
    evaluations = sum(n**batch_size if ordered else math.comb(n + batch_size - 1, batch_size) for n in counts)
    if evaluations > budget:
        out_of = f"{max(counts)} sequences" + (f" for each of {len(groups)} prompts" if len(groups) > 1 else "")
        raise BudgetExceededError(
            f"the expectation over {'ordered ' if ordered else ''}batches of {batch_size} out of {out_of}",
            evaluations,
            budget,
            "lower the batch size, the vocabulary or the horizon, or raise budget",
        )
    table, probability = _Table(probe.everything), probe.everything.probability
    mean, second_moment = table.zeros(), 0.0
    for group in groups:
        batches, orderings = _batches(len(group), batch_size, ordered)
        total = float(probability[group].sum())
        weights = total * orderings * (probability[group] / total)[batches].prod(-1)
        chunk = max(1, _HELD // mean.numel())
        for some, weight in zip(group[batches].split(chunk), weights.split(chunk), strict=True):
            gradients = table.gradients(some, torch.stack([probe.sensitivity(batch) for batch in some]))
            mean += torch.einsum("m,mrv->rv", weight, gradients)
            second_moment += float(weight @ gradients.square().sum((1, 2)))
    norm = float(mean.square().sum())
    return GradientMoments(table.levels(mean), max(second_moment - norm, 0.0), second_moment, False, probe.evaluations)


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


def _symmetric(probe: _Probe, group: Tensor, batch_size: int) -> bool:
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
