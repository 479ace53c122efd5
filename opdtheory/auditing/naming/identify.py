"""The catalogue objective whose exact gradient a black-box loss follows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.auditing.case import Case
from opdtheory.auditing.naming.fit import FLOOR, Fit, fit_scale, flat
from opdtheory.auditing.naming.knob import discount_basis, discount_nodes
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.naming.sparse import STARTS, refined, shortest
from opdtheory.divergences import Divergence
from opdtheory.divergences.registry import Family, parameter_free, parametric
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact.oracle import tree_gradient
from opdtheory.exact.tree import Tree
from opdtheory.objective import Objective

__all__ = ["ExactGradients", "Match", "best_match"]

# Relative misfit at which a short decimal replaces a fitted parameter.
_SHORT = 1e-10

# The share of a plain entry's error below which a fitted member of a family is named in its place.
_CLEARLY = 0.95

# A weight this near to an entry's, relative to its size, may be that of the entry under a discount.
_ALIKE = 1e-3


@dataclass(frozen=True)
class Match:
    """A catalogue objective and its distance from the loss's expected gradient.

    Attributes:
        objective: the objective.
        fit: the comparison on the panel.
    """

    objective: Objective
    fit: Fit

    def error(self, tolerance: float) -> float:
        """The worst error over the panel if that is rounding, else the typical one."""
        return self.fit.worst_error if self.fit.worst_error <= tolerance else self.fit.typical_error


class ExactGradients:
    """The exact gradients of catalogue objectives on every pair of a panel, flat, each computed once."""

    def __init__(self, cases: list[Case]) -> None:
        self.granularities = cases[0].granularities
        self.plain = all(case.plain for case in cases)
        self.trees = [case.trees() for case in cases]
        self._found: dict[tuple[Divergence, str], list[Tensor]] = {}

    def of(self, divergence: Divergence, granularity: str) -> list[Tensor]:
        """The gradients of one objective without a discount."""
        key = (divergence, granularity)
        if key not in self._found:
            self._found[key] = [
                torch.stack(
                    [factor * flat(tree_gradient(tree, divergence, granularity)) for factor, tree in trees]
                ).sum(0)
                for trees in self.trees
            ]
        return self._found[key]


def best_match(
    gradients: list[Tensor], exact: ExactGradients, weight: RecoveredWeight, prefer: str, tolerance: float
) -> Match | None:
    """The catalogue objective whose exact gradients are nearest to a positive multiple of the given ones.

    Entries without a parameter come first. A member of a family, its parameter fitted, is named only if none of them
    matches and it is nearer. A discount is fitted last, and named only if it matches.

    Args:
        gradients: the loss's expected gradient on each pair, flat.
        exact: the catalogue's gradients on the same pairs.
        weight: the recovered weight, to which the parameters are fitted.
        prefer: the granularity to name if several coincide.
        tolerance: largest error of a match.
    """
    order = sorted(exact.granularities, key=lambda granularity: granularity != prefer)
    plain = list(parameter_free())
    best = _nearest(gradients, exact, itertools.product(plain, order), tolerance)
    if (best is None or best.fit.worst_error > tolerance) and weight.depends_on_ratio_only:
        fitted = [entry for each in parametric() if (entry := _fit_family(each, weight)) is not None]
        other = _nearest(gradients, exact, itertools.product(fitted, order), tolerance)
        # A plain name that serves nearly as well is not replaced.
        if other is not None and (best is None or _serves_better(other.fit, best.fit, tolerance)):
            best = other
        if exact.plain and (best is None or best.fit.worst_error > tolerance):
            trees = [tree for ((_, tree),) in exact.trees]
            discounted = (_fit_discount(gradients, trees, entry) for entry in _alike(plain + fitted, weight))
            best = next((m for m in discounted if m is not None and m.fit.worst_error <= tolerance), best)
    return best


def _serves_better(fitted: Fit, plain: Fit, tolerance: float) -> bool:
    """Whether a fitted member matches where the plain entry does not, or is nearer by more than a few per cent."""
    if fitted.worst_error <= tolerance:
        return plain.worst_error > tolerance
    return fitted.typical_error < _CLEARLY * plain.typical_error


def _alike(entries: list[Divergence], recovered: RecoveredWeight) -> list[Divergence]:
    """The entries whose weight is a positive multiple of the recovered one, which one step shows without a discount."""
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
    """`token_return` of an entry at the discount that brings it nearest to a positive multiple of the gradients."""
    nodes = discount_nodes(trees)
    samples = [
        torch.stack([flat(tree_gradient(tree, entry, "token_return", gamma=g)) for g in nodes]) for tree in trees
    ]
    sizes = [max(float(g.norm()), FLOOR) for g in gradients]

    def exact(gamma: float) -> list[Tensor]:
        basis = discount_basis(nodes, gamma)
        return [basis @ sample for sample in samples]

    def residual(gamma: float) -> Tensor:
        candidates = exact(gamma)
        scale = fit_scale(gradients, candidates).scale
        return torch.cat([(g - scale * e) / s for g, e, s in zip(gradients, candidates, sizes, strict=True)])

    def error(gamma: float) -> float:
        return float(residual(gamma).norm())

    start = min(torch.linspace(0.0, 1.0, STARTS).tolist(), key=error)
    gamma = shortest(refined(lambda value: residual(value).numpy(), start, 0.0, 1.0), error, _SHORT)
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

    start = min(torch.linspace(low, high, STARTS, dtype=torch.float64).tolist(), key=error)
    value = refined(lambda value: residual(value).numpy(), start, low, high)
    try:
        return family(shortest(value, error, _SHORT))
    except InvalidArgumentError:
        return None
