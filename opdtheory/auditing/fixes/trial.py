"""A verdict on many variants of one loss: the exact gradients are computed once, and the first pair may refute."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from opdtheory.auditing.black_box import ZERO
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.scenario import Case, panel
from opdtheory.divergences import Divergence
from opdtheory.exact import Enumeration, Loss, exact_gradient, gradient_moments, random_pair

__all__ = ["Trial", "attempt"]

Found = TypeVar("Found")

# Pairs of a panel in the order in which they refute most: far apart, but not so far that one token decides.
_ORDER = (3, 5, 1, 4, 2, 0)

# Batches of coupled rollouts that the panel's pairs may cost one trial.
_PANEL_BATCHES = 600


class Trial:
    """The verdict of an audit, on the audit's own pairs, for one variant of a loss after another.

    Batches of two and more see smaller pairs first, and as many of the panel's own as are affordable, at least one.

    Args:
        loss: the one that is to be changed: small pairs on which it fails are left out.
        divergence: the claimed one.
        granularity: the claimed one.
        batch_size: as of `audit`; likewise `eos`, `off_policy`, `gamma` and `seed`.
        prompts: as of `panel`; likewise `environment` and `shared_prompt`.
        tolerance: relative error that rounding can leave.
        lengths: whether rollouts of variable length are looked at too where `eos` is None.
        pairs: how many of the panel's pairs are looked at, those that refute most first.
    """

    def __init__(
        self,
        loss: Loss,
        divergence: Divergence,
        granularity: str,
        *,
        batch_size: int = 1,
        eos: int | None = None,
        off_policy: float = 0.0,
        gamma: float = 1.0,
        seed: int = 0,
        prompts: int = 1,
        environment: Sequence[int] = (),
        shared_prompt: bool = False,
        tolerance: float = 1e-9,
        lengths: bool = False,
        pairs: int = len(_ORDER),
    ) -> None:
        self.batch_size, self.tolerance = batch_size, tolerance
        self.shared_prompt = shared_prompt
        self.cases: list[Case] = []
        # A loss that looks for a prompt, or for what an environment wrote, may need both.
        if batch_size > 1 and prompts == 1 and not environment:
            small = _small_cases(eos, off_policy, seed)
            self.cases += [case for case in small if _runs(loss, case, batch_size)]
        self.cases += _kept(
            panel(batch_size, eos, off_policy, seed, prompts, environment, shared_prompt), batch_size, prompts
        )[:pairs]
        if lengths and eos is None and batch_size == 1:
            self.cases += panel(1, 0, off_policy, seed)[1:4:2]
        self._exact: dict[int, list[Tensor]] = {}
        self._objective = (divergence, granularity, gamma)

    def exact(self, index: int) -> list[Tensor]:
        """The exact gradient of the claimed objective on one pair, by level."""
        if index not in self._exact:
            case, (divergence, granularity, gamma) = self.cases[index], self._objective
            self._exact[index] = exact_gradient(case.student, case.teacher, divergence, granularity, gamma=gamma)
        return self._exact[index]

    def gradient(self, loss: Loss, index: int) -> list[Tensor]:
        """The expected gradient of a loss on one pair, by level; exactly zero where only rounding is left of it."""
        case = self.cases[index]
        moments = gradient_moments(
            loss, case.student, case.teacher, self.batch_size, case.behavior, shared_prompt=self.shared_prompt
        )
        size = math.sqrt(sum(float(level.square().sum()) for level in moments.mean))
        if size <= ZERO * math.sqrt(moments.second_moment):
            return [level * 0.0 for level in moments.mean]
        return moments.mean

    def __call__(self, loss: Loss, *, to_the_end: bool = False) -> tuple[str, float]:
        """`exact`, `exact_up_to_scale`, `zero` or `biased`, and the worst relative bias over the pairs looked at.

        Args:
            loss: the variant.
            to_the_end: whether to look at all pairs even after one has refuted it.

        Raises:
            LossError: as `audit`.
        """
        actual: list[Tensor] = []
        exact: list[Tensor] = []
        for index in range(len(self.cases)):
            actual.append(flat(self.gradient(loss, index)))
            exact.append(flat(self.exact(index)))
            fit = fit_scale(actual, exact)
            if fit.worst_error > self.tolerance and not to_the_end:
                break
        if all(float(gradient.norm()) == 0.0 for gradient in actual):
            return "zero", 1.0
        return fit.verdict(self.tolerance), max(fit.relative_bias)


def attempt(function: Callable[[], Found]) -> Found | None:
    """What the function returns, or None if it fails: a black box meets inputs here that its author did not foresee."""
    try:
        return function()
    except Exception:
        return None


def _runs(loss: Loss, case: Case, batch_size: int) -> bool:
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    rollouts = everything.rollouts(torch.arange(batch_size) % len(everything))
    return attempt(lambda: loss(rollouts)) is not None


def _kept(pairs: list[Case], batch_size: int, prompts: int) -> list[Case]:
    """The pairs that refute most first, and of coupled rollouts as many as a trial may cost."""
    pairs = [pairs[i] for i in _ORDER if i < len(pairs)]
    if batch_size == 1:
        return pairs
    first = pairs[0].student
    sequences = prompts * first.vocab_size ** (first.horizon - (prompts > 1))
    batches = math.comb(sequences + batch_size - 1, batch_size)
    return pairs[: max(1, _PANEL_BATCHES // batches)]


def _small_cases(eos: int | None, off_policy: float, seed: int) -> list[Case]:
    shapes = ((2, 2), (3, 1), (2, 2))
    return [_small(shape, eos, off_policy, seed, index) for index, shape in enumerate(shapes)]


def _small(shape: tuple[int, int], eos: int | None, off_policy: float, seed: int, index: int) -> Case:
    vocab_size, horizon = shape
    # An end that only the panel's larger vocabulary has needs that vocabulary.
    vocab_size = vocab_size if eos is None else max(vocab_size, eos + 1)
    student, teacher = random_pair(
        vocab_size, horizon, eos=eos, scale=1.0, distance=1.0 + index / 2, seed=1000 * seed + 100 + index
    )
    behavior = student.perturbed(off_policy, seed=1000 * seed + 600 + index) if off_policy else None
    return Case(student, teacher, behavior, f"V={vocab_size}, T={horizon}")
