"""Signed sums of catalogue objectives that a loss follows on the whole panel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.auditing.naming.identify import ExactGradients
from opdtheory.divergences.registry import summands
from opdtheory.objective import Objective, simple_ratios

__all__ = ["Combination", "best_combination"]

# Below this, gradients of several objectives are so nearly dependent that coefficients mean nothing.
_INDEPENDENT = 1e-6


@dataclass(frozen=True)
class Combination:
    r"""A signed sum of catalogue objectives whose gradient is the loss's expected gradient.

    Attributes:
        objective: the sum, with the coefficients of $\nabla = \sum_i c_i \nabla J_i$.
        error: largest `|actual - combination| / |actual|` over the panel.
    """

    objective: Objective
    error: float


def best_combination(
    gradients: list[Tensor], exact: ExactGradients, prefer: str, tolerance: float
) -> Combination | None:
    """Two or three catalogue objectives of one granularity whose signed sum has the given gradients, or None.

    Sums with fewer terms come first, then those of the preferred granularity. Jeffreys' divergence is written as the
    sum of the two KLs. The arguments are those of `best_match`.
    """
    if any(float(g.norm()) == 0.0 for g in gradients):
        return None
    order = sorted(exact.granularities, key=lambda granularity: granularity != prefer)
    names = [entry.name for entry in summands()]
    designs = {granularity: _design(gradients, exact, names, granularity) for granularity in order}
    target = torch.cat([g / g.norm() for g in gradients])
    for size, granularity in itertools.product((2, 3), order):
        combination = _combined(designs[granularity], target, names, granularity, size, gradients, tolerance)
        if combination is not None:
            return combination
    return None


def _design(gradients: list[Tensor], catalogue: ExactGradients, names: list[str], granularity: str) -> Tensor:
    """The exact gradients of the entries as columns, in units of the loss's own gradient on each pair."""
    columns = []
    for name in names:
        exact = catalogue.of(divergences.divergence(name), granularity)
        columns.append(torch.cat([e / g.norm() for e, g in zip(exact, gradients, strict=True)]))
    return torch.stack(columns, 1)


def _combined(
    design: Tensor,
    target: Tensor,
    names: list[str],
    granularity: str,
    size: int,
    gradients: list[Tensor],
    tolerance: float,
) -> Combination | None:
    """The best combination of `size` columns, if it matches and needs all its terms."""
    lengths = design.norm(dim=0)
    # The triangular factor of the long columns, with the target as the last one, is all that least squares needs.
    triangle = torch.linalg.qr(torch.cat([design / lengths, target.unsqueeze(1)], 1)).R
    chosen = torch.tensor(list(itertools.combinations(range(len(names)), size)))
    q, r = torch.linalg.qr(triangle[:, :-1].T[chosen].transpose(1, 2))
    goal = triangle[:, -1]
    left = goal - (q @ (q.transpose(1, 2) @ goal).unsqueeze(-1)).squeeze(-1)
    misfit = left.norm(dim=-1)
    misfit[r.diagonal(dim1=1, dim2=2).abs().amin(-1) < _INDEPENDENT] = torch.inf
    indices = chosen[int(misfit.argmin())]
    columns = design[:, indices]
    coefficients = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution.squeeze(1)
    parts = [len(g) for g in gradients]
    error, simple = _worst(columns @ coefficients - target, parts), simple_ratios(coefficients.tolist())
    if error > tolerance or float((coefficients * lengths[indices]).abs().min()) <= 100 * tolerance:
        return None
    if simple is not None:
        ratios = torch.tensor([float(f) for f in simple], dtype=torch.float64)
        direction = columns @ ratios
        short = float(direction @ target / (direction @ direction)) * ratios
        snapped = _worst(columns @ short - target, parts)
        if snapped <= max(10 * error, 1e-3 * tolerance):
            coefficients, error = short, snapped
    entries = [divergences.divergence(names[int(i)]) for i in indices]
    return Combination(Objective(tuple(zip(coefficients.tolist(), entries, strict=True)), granularity), error)


def _worst(left: Tensor, parts: list[int]) -> float:
    return max(float(part.norm()) for part in left.split(parts))
