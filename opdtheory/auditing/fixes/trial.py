"""The verdict on many variants of one loss: exact gradients are computed once, and the first pair may refute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.scenario import Case, Scenario, count_batches
from opdtheory.exact import Enumeration, Loss, random_pair
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts

__all__ = ["Trial", "attempt"]

Found = TypeVar("Found")

# The pairs of a panel, those that refute most first: far apart, but not so far that one token decides.
_ORDER = (3, 5, 1, 4, 2, 0)

# The number of rollouts for a closer look.
_ROLLOUTS = 64

# The most batches of coupled rollouts in one trial on the panel's pairs.
_PANEL_BATCHES = 600


class Trial:
    """The verdict of an audit, on its own pairs, for one variant of a loss after another.

    Batches of two or more are tried on smaller pairs first, then on at least one pair of the panel.

    Args:
        loss: the loss to be changed; small pairs on which it fails are left out.
        claim: the claimed objective.
        scenario: what the rollouts look like.
        tolerance: relative error that counts as rounding.
        lengths: whether to add rollouts of variable length to a scenario of fixed length, if the loss takes them.
        pairs: number of the panel's pairs to use, those that refute most first.
    """

    def __init__(
        self,
        loss: Loss,
        claim: Objective,
        scenario: Scenario,
        *,
        tolerance: float = 1e-9,
        lengths: bool = False,
        pairs: int = len(_ORDER),
    ) -> None:
        self.loss, self.claim, self.scenario, self.tolerance = loss, claim, scenario, tolerance
        self.cases: list[Case] = []
        # A loss may need a prompt or an environment's tokens, which small pairs lack.
        if scenario.coupled and scenario.prompts == 1 and not scenario.environment:
            self.cases += [case for case in _small_cases(scenario) if _runs(loss, case, scenario.batch_size)]
        self.cases += _kept(scenario)[:pairs]
        if lengths and scenario.lengths != "fixed" and not scenario.masks:
            ending = scenario.ending
            more = _small_cases(ending)[:1] if scenario.coupled else ending.pairs()[1:4:2]
            more = [case for case in more if _runs(loss, case, scenario.batch_size)]
            # The smallest pairs come first, and the last one is of the panel.
            self.cases = more + self.cases if scenario.coupled else self.cases + more
        self._exact: dict[int, list[Tensor]] = {}

    def exact(self, index: int) -> list[Tensor]:
        """The exact gradient of the claimed objective on one pair, by level."""
        if index not in self._exact:
            self._exact[index] = self.cases[index].exact(self.claim)
        return self._exact[index]

    def gradient(self, loss: Loss, index: int) -> list[Tensor]:
        """The expected gradient of a loss on one pair, by level; exactly zero if it is rounding."""
        moments = self.scenario.moments(loss, self.cases[index])
        if moments.is_zero:
            return [level * 0.0 for level in moments.mean]
        return moments.mean

    def batches(self) -> list[Rollouts]:
        """Many sequences of one pair for a closer look, in batches of the claim's size, or in one if that is 1."""
        case, size = self.cases[-1 if self.scenario.coupled else 0], self.scenario.batch_size
        if size == 1 and _runs(self.loss, case, _ROLLOUTS):
            size = _ROLLOUTS
        everything = Enumeration.build(case.student, case.teacher, case.behavior)
        generator = torch.Generator().manual_seed(0)
        index = torch.randint(len(everything), (size * max(1, _ROLLOUTS // size),), generator=generator)
        leaves = [
            everything.gather_logits(everything.student_tables, some).detach().requires_grad_()
            for some in index.split(size)
        ]
        return [everything.rollouts(some, leaf) for some, leaf in zip(index.split(size), leaves, strict=True)]

    def __call__(self, loss: Loss, *, to_the_end: bool = False) -> tuple[str, float]:
        """`exact`, `exact_up_to_scale`, `zero` or `biased`, and the worst relative bias over the pairs used.

        Unless it goes on `to_the_end`, it stops at the first pair that refutes the loss.

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
    """The result of a function, or None if it fails: a black box may fail on inputs that its author did not foresee."""
    try:
        return function()
    except Exception:
        return None


def _runs(loss: Loss, case: Case, batch_size: int) -> bool:
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    rollouts = everything.rollouts(torch.arange(batch_size) % len(everything))
    return attempt(lambda: loss(rollouts)) is not None


def _kept(scenario: Scenario) -> list[Case]:
    """The panel's pairs, those that refute most first; for coupled rollouts, as many as a trial may use."""
    panel = scenario.pairs()
    pairs = [panel[i] for i in _ORDER]
    if not scenario.coupled:
        return pairs
    first = pairs[0].student
    sequences = scenario.prompts * first.vocab_size ** (first.horizon - (scenario.prompts > 1))
    return pairs[: max(1, _PANEL_BATCHES // count_batches(sequences, scenario.batch_size))]


def _small_cases(scenario: Scenario) -> list[Case]:
    cases, eos = [], scenario.eos
    for index, (vocab_size, horizon) in enumerate(((2, 2), (3, 1), (2, 2))):
        # The end-of-sequence token must be in the vocabulary.
        size, seed = max(vocab_size, 0 if eos is None else eos + 1), 1000 * scenario.seed + index
        student, teacher = random_pair(size, horizon, eos=eos, scale=1.0, distance=1.0 + index / 2, seed=seed + 100)
        cases.append(scenario.case(student, teacher, scenario.behavior(student, seed + 600), f"V={size}, T={horizon}"))
    return cases
