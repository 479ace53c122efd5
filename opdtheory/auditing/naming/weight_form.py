r"""A recovered weight as a formula: a catalogue weight, a combination of several, or an expression in $u$."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from opdtheory.auditing.naming.atoms import catalogue_atoms, fixed_atoms
from opdtheory.auditing.naming.formula import (
    Formula,
    Kind,
    columns_of,
    expressions,
    find_clamped,
    find_formula,
    find_window,
    label_of,
    most_terms,
)
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.naming.shape import Shape, shape_of
from opdtheory.auditing.naming.sparse import Curve, fit
from opdtheory.auditing.records import Finite
from opdtheory.divergences.registry import parameter_free
from opdtheory.errors import check_between

if TYPE_CHECKING:
    import sympy

__all__ = ["WeightForm", "describe"]

Array = np.ndarray[Any, np.dtype[np.float64]]

# Far from the grid, a fitted formula may be off by this many tolerances.
_EXTRAPOLATED = 10.0

# A weight with a smaller range is constant, to rounding.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class WeightForm:
    r"""The recovered local weight $w(u)$ as a formula, up to a constant, and what follows from it.

    Attributes:
        kind: `zero`, `catalogue`, `combination`, `expression`, or `numeric` if no formula fits.
        label: name up to a positive scale, such as `reverse_kl - forward_kl`.
        terms: coefficient of each term, by label.
        expr: $w(u)$ as sympy text in `u`, without the constant; None if numeric.
        latex: `expr` in LaTeX.
        error: largest misfit on the grid, relative to $|w(u)| + E_p|w|$.
        generator: the implied generator $V[w]$ (T4) in the gauge $f(1) = f'(1) = 0$ as sympy text; None if there is no
            closed form, only `generator_values`.
        generator_latex: `generator` in LaTeX.
        generator_values: $V[w]$ at the recovered grid of log-ratios, from the formula or else by quadrature of the
            interpolated weight; empty if the weight is not a function of the ratio.
        genuine: whether the weight never falls, so that an f-divergence is minimised (T4): at all log-ratios seen and,
            if there is a formula, for $|\log u| \le 30$.
        fixed_points: distributions other than the teacher's at which the expected gradient vanishes too (T5), as text:
            those of two tokens whose ratios have the same weight.
        slope_at_teacher: $\mathrm{d}w/\mathrm{d}\log u$ at $u = 1$.
        attracts: whether that slope is positive: the teacher is an attracting fixed point (T5).
        limits: $w(u) - w(1)$ for $u \to 0$ and $u \to \infty$, keys `0` and `inf`; NaN if unknown.
        growth: the behaviour at both ends, in words.
        second_moment: $E_p[w^2]$, and whether it is finite for every pair (T7d), in words.
        seen_to: the largest $|\log u|$ at which the weight was seen; the formula is not tested beyond.
        stop_gradient_of: the catalogue generator $f$ with $w = -f(u) + c(u - 1)$ up to a scale, as in plain OPD
            (T2, T3); None if there is none.
    """

    kind: Kind
    label: str
    terms: dict[str, float]
    expr: str | None
    latex: str | None
    error: float
    generator: str | None
    generator_latex: str | None
    genuine: bool
    fixed_points: list[str]
    slope_at_teacher: float
    attracts: bool
    limits: dict[str, float]
    growth: str
    second_moment: str
    generator_values: list[float] = field(default_factory=list)
    stop_gradient_of: str | None = None
    seen_to: Finite = 0.0


def describe(recovered: RecoveredWeight, tolerance: float = 1e-9) -> WeightForm:
    r"""Name a recovered weight by the fewest terms, those of the catalogue before those of the dictionary.

    The candidates are a positive multiple of a catalogue weight $w_f$ (for families, with a fitted parameter), signed
    combinations of up to three, then functions such as $\log^2 u$, $u\log u$, $u^\alpha$,
    $\log(\beta u + 1 - \beta)$, alone and up to three together, and all of these of a clamped log-ratio, each up to an
    additive constant. A formula that fits on the grid must also fit beyond it, as far as the weight was seen.

    Args:
        recovered: the weight on its grid, from `recover_weight`.
        tolerance: relative misfit that counts as rounding.

    Returns:
        The formula, its implied generator (T4), stability (T5), growth and second moment (T7d).

    Raises:
        InvalidArgumentError: `tolerance` is not positive.

    Example:
        >>> import opdtheory as opd
        >>> from opdtheory.auditing.naming.recover import recover_weight
        >>> from opdtheory.auditing.scenario import Scenario
        >>> describe(recover_weight(opd.estimator("k3_reward"), Scenario())).label
        'reverse_kl - forward_kl'
    """
    check_between("tolerance", tolerance)
    curve, whole = _curves(recovered)
    seen_to = round(float(np.abs(whole.points).max()), 4)
    falls = bool((np.diff(whole.values) < -10.0 * tolerance * np.maximum(whole.scale[1:], whole.scale[:-1])).any())
    shape = Shape(
        log_u=curve.points,
        non_decreasing=recovered.non_decreasing and not falls,
        slope=recovered.slope_at_teacher,
        # A slope this small may be rounding of the finite difference.
        flat=max(1e-6, 100.0 * tolerance) * max(float(np.ptp(curve.values)), _CONSTANT),
    )
    form = _named(recovered, curve, whole, shape, tolerance)
    return replace(form, seen_to=seen_to)


def _named(recovered: RecoveredWeight, curve: Curve, whole: Curve, shape: Shape, tolerance: float) -> WeightForm:
    if not recovered.depends_on_ratio_only:
        return _form(None, shape, error=recovered.residual, label="not a function of the ratio alone")
    if float(np.ptp(whole.values)) <= _CONSTANT:
        return _zero(shape)
    near = None
    if float(np.ptp(curve.values)) > _CONSTANT:
        near = find_formula(curve, tolerance) or find_clamped(curve, tolerance)
    found = near
    if near is None or not _holds(near, curve, whole, tolerance).all():
        found = find_clamped(whole, tolerance) if len(whole.points) > len(curve.points) else None
    if found is None:
        label = find_window(whole, tolerance) or _beyond(near, curve, whole, tolerance) or "no formula found"
        return _form(None, replace(shape, values=curve.values), error=_nearest_error(curve), label=label)
    form = _form(found, shape, error=found.error, label=label_of(found))
    return form if found.kind == "catalogue" else replace(form, stop_gradient_of=_stop_gradient(whole, tolerance))


def _curves(recovered: RecoveredWeight) -> tuple[Curve, Curve]:
    """The weight on the grid, and as far as it was seen."""
    log_u, weight = recovered.log_u.numpy(), recovered.weight.numpy()
    # The rounding of a gradient is relative to the weights that it is summed from, under the student of the bandits.
    p = np.exp(-log_u / 2)
    typical = float((p * np.abs(weight)).sum() / p.sum())

    def curve(points: Array, values: Array) -> Curve:
        scale = np.abs(values) + typical
        return Curve(points, values, np.where(scale > 0, scale, 1.0))

    points = np.concatenate([log_u, recovered.far_log_u.numpy()])
    values = np.concatenate([weight, recovered.far_weight.numpy()])
    order = np.argsort(points)
    return curve(log_u, weight), curve(points[order], values[order])


def _holds(found: Formula, curve: Curve, whole: Curve, tolerance: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where a formula fitted on the grid has the values of the weight."""
    constant = float(np.average(curve.values - found.values(curve.points), weights=curve.scale**-2.0))
    gap = np.abs(found.values(whole.points) + constant - whole.values)
    return gap <= _EXTRAPOLATED * tolerance * whole.scale


def _beyond(near: Formula | None, curve: Curve, whole: Curve, tolerance: float) -> str | None:
    """The formula of the grid, with the log-ratios up to which it holds."""
    if near is None:
        return None
    holds = _holds(near, curve, whole, tolerance)
    inside = np.abs(whole.points) <= np.abs(curve.points).max()
    low = np.flatnonzero(~holds & (whole.points < 0) & ~inside)
    high = np.flatnonzero(~holds & (whole.points > 0) & ~inside)
    ends = whole.points[low[-1] + 1 if len(low) else 0], whole.points[high[0] - 1 if len(high) else -1]
    return f"{label_of(near)} for log u between {ends[0]:.3g} and {ends[1]:.3g}, another function beyond"


def _nearest_error(curve: Curve) -> float:
    """The misfit of the nearest single function, reported if no formula fits."""
    atoms = (*catalogue_atoms(), *fixed_atoms())
    return min(fit(curve, columns_of((atom,), curve.points))[2] for atom in atoms)


def _stop_gradient(curve: Curve, tolerance: float) -> str | None:
    """The catalogue generator `f` with `w = -f + c (u - 1)` up to a positive scale, in any gauge `c` (T3)."""
    import torch

    if most_terms(curve, tolerance) < 2:
        return None
    log_u, u = torch.from_numpy(curve.points), np.exp(curve.points)
    for entry in parameter_free():
        columns = np.column_stack([-entry.generator(log_u).numpy(), u])
        coefficients, _, error = fit(curve, columns)
        if coefficients[0] > 0 and error <= tolerance:
            return entry.name
    return None


def _zero(shape: Shape) -> WeightForm:
    return WeightForm(
        kind="zero",
        label="zero",
        terms={},
        expr="0",
        latex="0",
        error=0.0,
        generator="0",
        generator_latex="0",
        genuine=True,
        fixed_points=["every student distribution: the expected gradient vanishes everywhere"],
        slope_at_teacher=0.0,
        attracts=False,
        limits={"0": 0.0, "inf": 0.0},
        growth="constant: bounded",
        second_moment="E_p[w^2] is a constant for every pair",
        generator_values=[0.0] * len(shape.log_u),
    )


def _form(found: Formula | None, shape: Shape, *, error: float, label: str) -> WeightForm:
    expr, generator = (None, None) if found is None else expressions(found)
    terms = {} if found is None else dict(zip((a.label for a in found.atoms), found.coefficients.tolist(), strict=True))
    text, latex = _written(expr)
    generator_text, generator_latex = _written(generator)
    return WeightForm(
        kind="numeric" if found is None else found.kind,
        label=label,
        terms=terms,
        expr=text,
        latex=latex,
        error=error,
        generator=generator_text,
        generator_latex=generator_latex,
        slope_at_teacher=shape.slope,
        attracts=shape.slope > shape.flat,
        **vars(shape_of(shape, found, expr, generator)),
    )


def _written(expr: sympy.Expr | None) -> tuple[str | None, str | None]:
    import sympy

    return (None, None) if expr is None else (str(expr), sympy.latex(expr))
