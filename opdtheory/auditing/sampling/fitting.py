"""Objectives with one fitted number that are nearest to the sampled gradient of a loss."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opdtheory.auditing.naming.knob import Knob, discount_basis, discount_nodes
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.choices import GRANULARITIES
from opdtheory.divergences import Divergence
from opdtheory.divergences.registry import Family, parameter_free, parametric, summands
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact.oracle import tree_gradient
from opdtheory.exact.tree import Tree
from opdtheory.objective import Objective

__all__ = ["fitted", "knob_range", "shortened"]

# Values of a parameter, and of a discount, that are tried before the best one is refined.
_STARTS = 9
_DISCOUNTS = 41

# Tolerance of a fitted number, which further rounds of samples sharpen.
_NEAR = 1e-6

# A finite misfit that stands for an infinite one while a number is fitted.
_HOPELESS = 1e100

# Halvings in the search for the end of an interval.
_HALVINGS = 12

# Below this, two gradients are so nearly parallel that the coefficients of their sum mean nothing.
_INDEPENDENT = 1e-4

# The smallest relative error ascribed to a projection.
_FLOOR = 1e-9

_DIGITS = 7


def fitted(search: Search) -> list[Objective]:
    """Members of families, discounted entries and signed sums of two, those nearest to the samples first.

    Distances are in units of the intervals' widths, which must be finite. They prove nothing: noise has a nearest
    objective too.
    """
    seen = _Seen.of(search)
    tried = [*_members(seen), *_discounted(seen), *_sums(seen)]
    return [objective for _, objective in sorted(tried, key=lambda pair: pair[0])]


def knob_range(search: Search, knob: Knob) -> tuple[float, float]:
    """The values around the fitted number that the search does not exclude."""

    def excluded(value: float) -> bool:
        try:
            return search.excludes(knob.turned(value))
        except InvalidArgumentError:
            return True

    ends = []
    for far in (knob.low, knob.high):
        inside, outside = knob.value, far
        if excluded(far):
            # Steps grow, to find the end of an interval of any width.
            step = 1e-9 * max(1.0, abs(knob.value))
            while step < abs(far - knob.value):
                tried = knob.value + math.copysign(step, far - knob.value)
                if excluded(tried):
                    outside = tried
                    break
                inside, step = tried, 8.0 * step
            for _ in range(_HALVINGS):
                middle = (inside + outside) / 2.0
                inside, outside = (inside, middle) if excluded(middle) else (middle, outside)
        else:
            outside = far
        ends.append(outside)
    return ends[0], ends[1]


def shortened(knob: Knob, ends: tuple[float, float]) -> float:
    """The shortest decimal that is not excluded; among equally short ones, the nearest to the fitted value."""
    for digits in range(_DIGITS):
        short = round(knob.value, digits) + 0.0
        if ends[0] <= short <= ends[1]:
            return short
    return knob.value


@dataclass(frozen=True)
class _Seen:
    """The middle of each interval in units of its width, over all pairs, and gradients in the same units."""

    search: Search
    trees: list[Tree]
    bases: list[Tensor]
    values: Tensor

    @classmethod
    def of(cls, search: Search) -> _Seen:
        bases, values = [], []
        for pair, bound in zip(search.pairs, search.all_bounds(), strict=True):
            middle, half = (bound.low + bound.high) / 2.0, (bound.high - bound.low) / 2.0
            unit = half + _FLOOR * middle.norm().clamp_min(1e-300)
            bases.append(pair.basis / unit.unsqueeze(-1))
            values.append(middle / unit)
        trees = [Tree.build(case.student, case.teacher) for case in search.cases]
        return cls(search, trees, bases, torch.cat(values))

    def along(self, divergence: Divergence, granularity: str, gamma: float = 1.0) -> Tensor | None:
        """An exact gradient in these units, or None if it is infinite."""
        parts = []
        for tree, basis in zip(self.trees, self.bases, strict=True):
            try:
                levels = tree_gradient(tree, divergence, granularity, gamma=gamma)
            except InvalidArgumentError:
                return None
            parts.append(basis @ torch.cat([level.flatten() for level in levels]))
        return torch.cat(parts)

    def misfit(self, along: Tensor | None) -> float:
        """The distance of the best positive multiple of a gradient."""
        if along is None:
            return math.inf
        scale = float(along @ self.values) / max(float(along @ along), 1e-300)
        return math.inf if scale <= 0.0 else float((self.values - scale * along).norm())

    @property
    def order(self) -> list[str]:
        return sorted(GRANULARITIES, key=lambda granularity: granularity != self.search.objective.granularity)


def _members(seen: _Seen) -> list[tuple[float, Objective]]:
    """The nearest member of each family, at the granularity where it is nearest."""

    def of(family: Family, where: str, value: float) -> float:
        try:
            return seen.misfit(seen.along(family(value), where))
        except InvalidArgumentError:
            return math.inf

    found = []
    for family in parametric():
        values = np.linspace(*family.sought, _STARTS).tolist()
        misfits = {(where, i): of(family, where, value) for where in seen.order for i, value in enumerate(values)}
        where, i = min(misfits, key=lambda key: misfits[key])
        around = values[max(i - 1, 0)], values[min(i + 1, _STARTS - 1)]
        value, misfit = _least(functools.partial(of, family, where), *around)
        if math.isfinite(misfit):
            found.append((misfit, Objective.of(family(value), where)))
    return found


def _discounted(seen: _Seen) -> list[tuple[float, Objective]]:
    """Entries without a parameter, at the discount that brings them nearest."""
    nodes = discount_nodes(seen.trees)
    found = []
    for entry in parameter_free():
        samples = [seen.along(entry, "token_return", gamma) for gamma in nodes]
        if any(sample is None for sample in samples):
            continue
        stacked = torch.stack([sample for sample in samples if sample is not None])

        def of(gamma: float, stacked: Tensor = stacked) -> float:
            return seen.misfit(discount_basis(nodes, gamma) @ stacked)

        grid = np.linspace(0.0, 1.0, _DISCOUNTS)
        start = float(grid[int(np.argmin([of(float(g)) for g in grid]))])
        gamma, misfit = _least(of, max(start - grid[1], 0.0), min(start + grid[1], 1.0))
        if math.isfinite(misfit):
            found.append((misfit, Objective.of(entry, "token_return", gamma)))
    return found


def _sums(seen: _Seen) -> list[tuple[float, Objective]]:
    """The nearest signed sum of two entries without a parameter, by granularity."""
    found = []
    for where in seen.order:
        columns = [(entry, along) for entry in summands() if (along := seen.along(entry, where)) is not None]
        best: tuple[float, Objective] | None = None
        for (one, a), (other, b) in itertools.combinations(columns, 2):
            sizes = torch.stack([a.norm(), b.norm()])
            design = torch.stack([a, b], 1) / sizes
            if float(torch.linalg.svdvals(design)[-1]) < _INDEPENDENT:
                continue
            solution = torch.linalg.lstsq(design, seen.values.unsqueeze(1)).solution.squeeze(1)
            misfit = float((seen.values - design @ solution).norm())
            first, second = (solution / sizes).tolist()
            if first != 0.0 and second != 0.0 and (best is None or misfit < best[0]):
                best = misfit, Objective(((first, one), (second, other)), where)
        found += [] if best is None else [best]
    return found


def _least(of: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    from scipy.optimize import minimize_scalar

    # Differences of infinite misfits are undefined.
    solution = minimize_scalar(
        lambda x: min(of(x), _HOPELESS), bounds=(low, high), method="bounded", options={"xatol": _NEAR}
    )
    misfit = float(solution.fun)
    return float(solution.x), math.inf if misfit >= _HOPELESS else misfit
