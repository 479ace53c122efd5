"""What a black-box loss follows: its weight as a function of the ratio, and the catalogue entry that matches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.auditing.naming.fit import _FLOOR, Fit, fit_scale, flat
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.naming.sparse import shortest
from opdtheory.auditing.scenario import Case
from opdtheory.divergences import Divergence
from opdtheory.divergences.registry import Family, parameter_free, parametric
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import OBJECTIVES
from opdtheory.exact.oracle import tree_gradient
from opdtheory.exact.tree import Tree
from opdtheory.objective import Objective

__all__ = ["ExactGradients", "Match", "best_match"]

_STARTS = 41

# A misfit, relative to what is fitted, far below which a short decimal is as good as the fitted parameter.
_SHORT = 1e-10

# A weight this near to an entry's, relative to its size, may be that entry's under a discount.
_ALIKE = 1e-3


@dataclass(frozen=True)
class Match:
    """A catalogue objective with its distance from the loss's expected gradient.

    Attributes:
        objective: the catalogue entry with its granularity and discount.
        fit: the comparison on the panel.
    """

    objective: Objective
    fit: Fit

    def error(self, tolerance: float) -> float:
        """The worst error over the panel where that is rounding, else the typical one."""
        return self.fit.worst_error if self.fit.worst_error <= tolerance else self.fit.typical_error


class ExactGradients:
    """Exact gradients of catalogue objectives on every pair of a panel, flat, each computed once."""

    def __init__(self, cases: list[Case]) -> None:
        self.trees = [Tree.build(case.student, case.teacher) for case in cases]
        self._found: dict[tuple[Divergence, str], list[Tensor]] = {}

    def of(self, divergence: Divergence, granularity: str) -> list[Tensor]:
        """The gradients of one objective, undiscounted."""
        key = (divergence, granularity)
        if key not in self._found:
            self._found[key] = [flat(tree_gradient(tree, divergence, granularity)) for tree in self.trees]
        return self._found[key]


def best_match(
    gradients: list[Tensor], exact: ExactGradients, weight: RecoveredWeight, prefer: str, tolerance: float
) -> Match | None:
    """The catalogue objective whose exact gradients are nearest to a positive multiple of the given ones.

    Parameter-free entries come first; a family with a fitted parameter is named only if it is
    better and none of those matches within the tolerance. A discount is fitted last, and named only
    if it matches.

    Args:
        gradients: the loss's expected gradient on each pair, flat.
        exact: the catalogue's gradients on the same pairs.
        weight: the recovered weight, to which the parameters are fitted.
        prefer: the granularity that is named when several coincide.
        tolerance: error up to which an entry matches.
    """
    order = sorted(OBJECTIVES, key=lambda granularity: granularity != prefer)
    plain = list(parameter_free())
    best = _nearest(gradients, exact, itertools.product(plain, order), tolerance)
    if (best is None or best.fit.worst_error > tolerance) and weight.depends_on_ratio_only:
        fitted = [entry for each in parametric() if (entry := _fit_family(each, weight)) is not None]
        other = _nearest(gradients, exact, itertools.product(fitted, order), tolerance)
        # A member that is an entry in another name does not displace it.
        if other is not None and (best is None or other.fit.typical_error < (1 - 1e-6) * best.fit.typical_error):
            best = other
        if best is None or best.fit.worst_error > tolerance:
            discounted = (_fit_discount(gradients, exact.trees, entry) for entry in _alike(plain + fitted, weight))
            best = next((m for m in discounted if m is not None and m.fit.worst_error <= tolerance), best)
    return best


def _alike(entries: list[Divergence], recovered: RecoveredWeight) -> list[Divergence]:
    """The entries whose weight is a positive multiple of the recovered one: a discount does not show on one step."""
    middle, size = len(recovered.log_u) // 2, float(recovered.weight.norm())
    found = []
    for entry in entries:
        curve = entry.weight(recovered.log_u)
        curve = curve - curve[middle]
        multiple = float(recovered.weight @ curve) / float(curve @ curve)
        if multiple > 0 and float((recovered.weight - multiple * curve).norm()) <= _ALIKE * size:
            found.append(entry)
    return found


def _fit_discount(gradients: list[Tensor], trees: list[Tree], entry: Divergence) -> Match | None:
    """`token_return` with the discount that brings it nearest to a positive multiple of the gradients."""
    import numpy as np
    from scipy.optimize import least_squares

    # The gradient is a polynomial in gamma of degree below the number of positions.
    nodes = np.linspace(0.0, 1.0, max(tree.horizon for tree in trees))
    samples = [
        torch.stack([flat(tree_gradient(tree, entry, "token_return", gamma=float(g))) for g in nodes]) for tree in trees
    ]
    sizes = [max(float(g.norm()), _FLOOR) for g in gradients]

    def exact(gamma: float) -> list[Tensor]:
        basis = [np.prod([(gamma - m) / (n - m) for m in nodes if m != n]) for n in nodes]
        return [torch.tensor(basis, dtype=torch.float64) @ sample for sample in samples]

    def residual(gamma: float) -> Tensor:
        candidates = exact(gamma)
        scale = fit_scale(gradients, candidates).scale
        return torch.cat([(g - scale * e) / s for g, e, s in zip(gradients, candidates, sizes, strict=True)])

    start = min(torch.linspace(0.0, 1.0, _STARTS).tolist(), key=lambda gamma: float(residual(gamma).norm()))
    solution = least_squares(
        lambda x: residual(float(x[0])).numpy(), [start], bounds=([0.0], [1.0]), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    gamma = shortest(float(solution.x[0]), lambda value: float(residual(value).norm()), _SHORT)
    fit = fit_scale(gradients, exact(gamma))
    return Match(Objective.of(entry, "token_return", gamma), fit) if fit.scale > 0 else None


def _nearest(
    gradients: list[Tensor], catalogue: ExactGradients, candidates: Iterable[tuple[Divergence, str]], tolerance: float
) -> Match | None:
    best: Match | None = None
    for divergence, granularity in candidates:
        exact = catalogue.of(divergence, granularity)
        if any(float(g.norm()) == 0.0 for g in exact):
            continue
        match = Match(Objective.of(divergence, granularity), fit_scale(gradients, exact))
        if match.fit.worst_error <= tolerance:
            return match
        if match.fit.scale > 0 and (best is None or match.fit.typical_error < best.fit.typical_error):
            best = match
    return best


def _fit_family(family: Family, recovered: RecoveredWeight) -> Divergence | None:
    """The member of a family whose weight is nearest to a positive multiple of the recovered one."""
    from scipy.optimize import least_squares

    low, high = family.sought
    middle = len(recovered.log_u) // 2
    size = float(recovered.weight.norm())
    if size == 0.0:
        return None

    def residual(value: float) -> Tensor:
        curve = family(float(value)).weight(recovered.log_u)
        curve = curve - curve[middle]
        return recovered.weight / size - (recovered.weight @ curve) / (curve @ curve) * curve / size

    def error(value: float) -> float:
        return float(residual(value).norm())

    starts = torch.linspace(low, high, _STARTS, dtype=torch.float64).tolist()
    start = min(starts, key=error)
    solution = least_squares(
        lambda x: residual(x[0]).numpy(), [start], bounds=([low], [high]), xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    value = shortest(float(solution.x[0]), error, _SHORT)
    try:
        return family(value)
    except InvalidArgumentError:
        return None
