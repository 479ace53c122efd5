"""What a black-box loss follows: its weight as a function of the ratio, and the catalogue entry that matches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory import divergences
from opdtheory.auditing.naming.atoms import FAMILIES
from opdtheory.auditing.naming.sparse import shortest
from opdtheory.auditing.panel import STEP, Case, bandit_parts, bandits, far_bandit, far_grid
from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError, OpdTheoryError
from opdtheory.exact import OBJECTIVES, Loss, gradient_moments
from opdtheory.exact.oracle import tree_gradient
from opdtheory.exact.tree import Tree

__all__ = [
    "ExactGradients",
    "Fit",
    "Match",
    "RecoveredWeight",
    "best_match",
    "explains_panel",
    "fit_scale",
    "flat",
    "recover_weight",
]

# A weight recovered from a gradient carries its rounding, amplified by 1/p of the rarest token.
_AMPLIFIED = 10.0

# Interpolating a recovered weight between grid points costs less than this, relative to the gradient.
_INTERPOLATION = 0.05
_FINE_GRID = 0.5

_STARTS = 41

# A misfit, relative to what is fitted, far below which a short decimal is as good as the fitted parameter.
_SHORT = 1e-10

_FLOOR = 1e-100

# Far log-ratios in one bandit.
_TOGETHER = 4

# Rounds by which the cell where a far plateau begins is narrowed, and the points that each puts into it.
_ROUNDS, _INSIDE = 4, 12

# A weight this near to an entry's, relative to its size, may be that entry's under a discount.
_ALIKE = 1e-3


@dataclass(frozen=True)
class RecoveredWeight:
    r"""The local weight $w(u)$ that a loss puts on a token, up to a constant: $w(1) = 0$.

    Attributes:
        log_u: grid of log-ratios.
        weight: the weight on the grid, averaged over the bandits.
        residual: largest disagreement between bandits that differ in `p` alone, relative to the
            weight's range.
        depends_on_ratio_only: whether that disagreement is rounding.
        non_decreasing: whether the weight rises or stays everywhere on the grid: then a genuine
            f-divergence is minimised (T4).
        slope_at_teacher: $dw/d\log u$ at $u = 1$ by a five-point difference; positive means that
            the teacher attracts (T5).
        far_log_u: log-ratios beyond the grid, and close to where a plateau begins, for single rollouts; ascending.
        far_weight: the weight there, each from one pair of policies.
    """

    log_u: Float[Tensor, " points"]
    weight: Float[Tensor, " points"]
    residual: float
    depends_on_ratio_only: bool
    non_decreasing: bool
    slope_at_teacher: float
    far_log_u: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    far_weight: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))


@dataclass(frozen=True)
class Fit:
    """How well the gradients of a loss are a common positive multiple of an objective's, pair by pair.

    Attributes:
        scale: the multiple that makes the errors smallest, each pair counting alike.
        relative_bias: `|actual - exact| / |exact|` per pair, at scale one.
        errors: `|actual - scale * exact| / |actual|` per pair.
        cosine: of the angle, per pair; 0 for a zero gradient.
    """

    scale: float
    relative_bias: list[float]
    errors: list[float]
    cosine: list[float]

    @property
    def worst_error(self) -> float:
        """The largest error at best scale; inf unless the scale is positive."""
        return max(self.errors) if self.scale > 0 else float("inf")

    def verdict(self, tolerance: float) -> str:
        """`exact`, `exact_up_to_scale` or `biased`, with errors up to the tolerance taken for rounding."""
        if max(self.relative_bias) <= tolerance:
            return "exact"
        return "exact_up_to_scale" if self.worst_error <= tolerance else "biased"

    @property
    def typical_error(self) -> float:
        """Root mean square of the errors at best scale, at most 1; inf unless the scale is positive."""
        return (sum(e * e for e in self.errors) / len(self.errors)) ** 0.5 if self.scale > 0 else float("inf")


@dataclass(frozen=True)
class Match:
    """A catalogue objective with its distance from the loss's expected gradient.

    Attributes:
        divergence: the catalogue entry.
        granularity: which of the three objectives.
        fit: the comparison on the panel.
        gamma: the discount of `token_return`.
    """

    divergence: Divergence
    granularity: str
    fit: Fit
    gamma: float = 1.0


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


def recover_weight(
    loss: Loss, batch_size: int, off_policy: float, seed: int, tolerance: float, *, laws: int = 3
) -> RecoveredWeight:
    r"""Recover $w(u_a) = -G_a / p_a + \text{const}$ from the expected gradient $G$ on one-step bandits.

    Args:
        loss: the black box.
        batch_size: rollouts it sees at once.
        off_policy: noise of the sampling policy's logits.
        seed: of the bandits.
        tolerance: relative error of the loss's gradient that is rounding.
        laws: students of equal log-ratios that are compared, two at least.

    Raises:
        LossError: as `gradient_moments`.
    """
    parts = bandit_parts(batch_size)
    found = [_curves(loss, part, batch_size, off_policy, seed, laws) for part in parts]
    # Every part holds 0, where its curves are zero.
    log_u, order = torch.cat([part[part != 0.0] for part in parts] + [torch.zeros(1, dtype=torch.float64)]).sort()
    values = [c[:, part != 0.0] for c, part in zip(found, parts, strict=True)]
    curves = torch.cat([*values, torch.zeros(len(values[0]), 1, dtype=torch.float64)], 1)[:, order]
    middle = len(log_u) // 2
    curve = curves.mean(0)
    spread = float((curves - curve).abs().max())
    span = float(curve.max() - curve.min())
    # Of a loss whose weight is constant only rounding is left, which depends on nothing.
    residual = spread / span if span > 1e-9 else 0.0
    steps = curve.diff()
    ratio_only = residual < _AMPLIFIED * tolerance
    far_log_u, far_weight = _NOTHING
    if batch_size == 1 and ratio_only:
        far_log_u, far_weight = _far(loss, log_u, curve, off_policy, seed, tolerance)
    return RecoveredWeight(
        log_u=log_u,
        weight=curve,
        residual=residual,
        depends_on_ratio_only=ratio_only,
        non_decreasing=bool((steps >= -_AMPLIFIED * tolerance * max(span, 1e-9)).all()),
        slope_at_teacher=_central_slope(curve[middle - 2 : middle + 3].tolist()),
        far_log_u=far_log_u,
        far_weight=far_weight,
    )


_NOTHING = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)


def _curves(loss: Loss, log_u: Tensor, batch_size: int, off_policy: float, seed: int, laws: int) -> Tensor:
    """The weight at log-ratios with 0 in the middle, less its value there, from each law of the bandits."""
    return torch.stack(
        [_advantage(loss, case, batch_size, len(log_u) // 2) for case in bandits(log_u, off_policy, seed)[-laws:]]
    )


def _advantage(loss: Loss, case: Case, batch_size: int, origin: int) -> Tensor:
    gradient = gradient_moments(loss, case.student, case.teacher, batch_size, case.behavior).mean[0][0]
    advantage = -gradient / torch.softmax(case.student.logits[0][0], -1)
    return advantage - advantage[origin]


def _far(
    loss: Loss, log_u: Tensor, curve: Tensor, off_policy: float, seed: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """The weight beyond the grid and close to where a plateau begins; nothing if the loss fails there.

    Args:
        loss: the black box.
        log_u: the grid.
        curve: the weight on it, to whose ends what lies beyond is joined.
        off_policy: noise of the sampling policy's logits.
        seed: of that noise.
        tolerance: relative error that is rounding.
    """
    count = len(log_u) // 2
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for sign, grid, known in ((-1, log_u.flip(0), curve.flip(0)), (1, log_u, curve)):
            far = far_grid(sign)

            def at(points: Tensor, near: Tensor = far[:1], end: Tensor = known[-1]) -> Tensor:
                case = far_bandit(torch.cat([near, points]), off_policy, seed)
                return end + _advantage(loss, case, 1, 0)[1:-1]

            # A few at a time: weights that grow steeply would drown the smaller ones in their rounding.
            more = [(some, at(some)) for some in far[1:].split(_TOGETHER)]
            points = torch.cat([grid[count + 1 :], far[1:]])
            values = torch.cat([known[count + 1 :], *(part for _, part in more)])
            for _ in range(_ROUNDS):
                level = (values - values[-1]).abs() <= tolerance * values.abs().max()
                first = len(level) - int(level.flip(0).long().cumprod(0).sum())
                if first == 0 or len(level) - first < 2:
                    break
                ends = float(points[first - 1]), float(points[first])
                inside = torch.linspace(*ends, _INSIDE + 2, dtype=points.dtype)[1:-1]
                more.append((inside, at(inside)))
                points, order = torch.cat([points, inside]).sort(descending=sign < 0)
                values = torch.cat([values, more[-1][1]])[order]
            found += more
    except (OpdTheoryError, RuntimeError, ValueError):
        return _NOTHING
    far_log_u, order = torch.cat([points for points, _ in found]).sort()
    return far_log_u, torch.cat([values for _, values in found])[order]


def explains_panel(weight: RecoveredWeight, gradients: list[Tensor], cases: list[Case]) -> bool | None:
    """Whether the recovered weight of each token's own ratio gives the loss's gradients, up to one scale.

    The weight was found on one-step policies. Over several tokens a loss may weigh a token by its
    position, or by the ratios of others. None if the grid is too coarse to tell.
    """
    spacing, limit = float(weight.log_u[-1] - weight.log_u[-2]), float(weight.log_u[-1])
    if spacing > _FINE_GRID or limit < 1.0:
        return None
    from scipy.interpolate import PchipInterpolator

    curve = PchipInterpolator(weight.log_u.numpy(), weight.weight.numpy(), extrapolate=False)
    actual, predicted = [], []
    for case, gradient in zip(cases, gradients, strict=True):
        tree = Tree.build(case.student, case.teacher)
        log_u = [q - p for p, q in zip(tree.log_p, tree.log_q, strict=True)]
        if not spacing < max(float(level.abs().max()) for level in log_u) <= limit:
            continue
        levels = []
        for n, level in enumerate(log_u):
            p, advantage = tree.log_p[n].exp(), torch.from_numpy(curve(level.numpy()))
            levels.append(-tree.reach(n).unsqueeze(-1) * p * (advantage - (p * advantage).sum(-1, keepdim=True)))
        actual.append(gradient)
        predicted.append(flat(levels))
    return fit_scale(actual, predicted).worst_error < _INTERPOLATION if actual else None


def _central_slope(values: list[float]) -> float:
    """Slope in the middle of five points `STEP` apart, to fourth order."""
    return (8.0 * (values[3] - values[1]) - (values[4] - values[0])) / (12.0 * STEP)


def fit_scale(actual: list[Tensor], exact: list[Tensor]) -> Fit:
    """Compare two lists of flat gradients, one per pair, up to one common positive scale."""
    # The floor lets a gradient that is exactly zero come out as unlike any other, without dividing by it.
    sizes = [max(float(a.norm()), _FLOOR) for a in actual]
    norms = [max(float(g.norm()), _FLOOR) for g in exact]
    dots = [float(a @ g) for a, g in zip(actual, exact, strict=True)]
    # Least squares over all pairs, each measured in units of the loss's own gradient.
    scale = sum(d / s**2 for d, s in zip(dots, sizes, strict=True)) / sum(
        (n / s) ** 2 for n, s in zip(norms, sizes, strict=True)
    )
    return Fit(
        scale=scale,
        relative_bias=[float((a - g).norm()) / n for a, g, n in zip(actual, exact, norms, strict=True)],
        errors=[float((a - scale * g).norm()) / s for a, g, s in zip(actual, exact, sizes, strict=True)],
        cosine=[d / (s * n) for d, s, n in zip(dots, sizes, norms, strict=True)],
    )


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
    plain = [divergences.divergence(name) for name in divergences.names() if name not in FAMILIES]
    best = _nearest(gradients, exact, itertools.product(plain, order), tolerance)
    if (best is None or best.fit.worst_error > tolerance) and weight.depends_on_ratio_only:
        fitted = [entry for name in FAMILIES if (entry := _fit_family(name, weight)) is not None]
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
    return Match(entry, "token_return", fit, gamma) if fit.scale > 0 else None


def _nearest(
    gradients: list[Tensor], catalogue: ExactGradients, candidates: Iterable[tuple[Divergence, str]], tolerance: float
) -> Match | None:
    best: Match | None = None
    for divergence, granularity in candidates:
        exact = catalogue.of(divergence, granularity)
        if any(float(g.norm()) == 0.0 for g in exact):
            continue
        match = Match(divergence, granularity, fit_scale(gradients, exact))
        if match.fit.worst_error <= tolerance:
            return match
        if match.fit.scale > 0 and (best is None or match.fit.typical_error < best.fit.typical_error):
            best = match
    return best


def flat(levels: list[Tensor]) -> Tensor:
    """A gradient by level as one vector."""
    return torch.cat([level.flatten() for level in levels])


def _fit_family(name: str, recovered: RecoveredWeight) -> Divergence | None:
    """The member of a family whose weight is nearest to a positive multiple of the recovered one."""
    from scipy.optimize import least_squares

    parameter, low, high = FAMILIES[name]
    middle = len(recovered.log_u) // 2
    size = float(recovered.weight.norm())
    if size == 0.0:
        return None

    def residual(value: float) -> Tensor:
        curve = divergences.divergence(name, **{parameter: float(value)}).weight(recovered.log_u)
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
        return divergences.divergence(name, **{parameter: value})
    except InvalidArgumentError:
        return None
