"""The catalogue's numbers against its own symbolic generators, evaluated by mpmath; limits, derivatives and errors."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable

import mpmath
import pytest
import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence, divergence, names
from opdtheory.errors import InvalidArgumentError

INF = math.inf
FORMS = ("generator", "log_slope", "weight", "curvature")
SMALLEST_NORMAL, SMALLEST, LARGEST = 2.0**-1022, 2.0**-1074, sys.float_info.max

CATALOGUE_NAMES = (
    "reverse_kl forward_kl jsd skew_jsd chi2 neyman_chi2 hellinger total_variation le_cam jeffreys alpha "
    "skew_forward_kl skew_reverse_kl"
).split()

_FAMILIES: dict[str, tuple[str, tuple[float, ...]]] = {
    "skew_jsd": ("beta", (0.0, 1e-9, 0.1, 0.5, 0.7, 1 - 1e-9, 1.0)),
    "alpha": (
        "alpha",
        (-30.0, -2.5, -1.0, -1e-12, 0.0, 1e-12, 0.3, 0.5, 1 - 1e-12, 1.0, 1 + 1e-12, 1.5, 2.0, 3.7, 50.0),
    ),
    "skew_forward_kl": ("lam", (0.0, 1e-9, 0.1, 0.5, 0.999, 1 - 1e-9)),
    "skew_reverse_kl": ("lam", (0.0, 1e-9, 0.1, 0.5, 0.999, 1 - 1e-9)),
}


def _members() -> list[Divergence]:
    members = []
    for name in CATALOGUE_NAMES:
        if name in _FAMILIES:
            key, values = _FAMILIES[name]
            members += [divergence(name, **{key: value}) for value in values]
        else:
            members.append(divergence(name))
    return members


MEMBERS = _members()
SHORT = [d for d in MEMBERS if not d.parameters or dict(d.parameters).popitem()[1] in (0.1, 0.3)]


def _ids(d: Divergence) -> str:
    return d.label


@functools.cache
def symbolic(d: Divergence) -> dict[str, sympy.Expr]:
    """The forms by sympy from the generator alone; kinks give no delta functions."""
    u = divergences.symbol()
    f = d.expr

    def slope(e: sympy.Expr) -> sympy.Expr:
        return sympy.diff(e, u).replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))

    return {
        "generator": f,
        "log_slope": u * slope(f),
        "weight": u * slope(f) - f,
        "curvature": u**2 * slope(slope(f)),
    }


def _digits(d: Divergence, t: float) -> int:
    """Enough that the terms in u which cancel at both ends, and those in log u at u = 1, leave 60 digits."""
    order = min(abs(d.parameters.get("alpha", 1.0)), 1.0) + 1
    return int(80 + abs(t) / math.log(10) * order + 2 * max(0.0, -math.log10(abs(t) or 1.0)))


@functools.cache
def references(d: Divergence, points: tuple[float, ...]) -> dict[str, list[mpmath.mpf]]:
    u = divergences.symbol()
    function = sympy.lambdify(u, [symbolic(d)[form] for form in FORMS], modules="mpmath", cse=True)
    rows = []
    for t in points:
        with mpmath.workdps(_digits(d, t)):
            values = [mpmath.mpf(x) for x in function(mpmath.exp(mpmath.mpf(t)))]
            # The exact zeros, at log u = 0 and 1 or -1, leave rounding in the last digits.
            noise = mpmath.mpf(10) ** (15 - mpmath.mp.dps) if abs(t) <= 1 else 0
            rows.append([x if abs(x) > noise else mpmath.mpf(0) for x in values])
    return {form: [row[i] for row in rows] for i, form in enumerate(FORMS)}


def error_in_ulp(value: float, reference: mpmath.mpf) -> float:
    """The error in units in the last place of float64; inf for NaN or a wrong infinity."""
    with mpmath.workdps(60):
        if math.isnan(value):
            return INF
        if mpmath.fabs(reference) > mpmath.mpf(LARGEST) * (1 + mpmath.mpf(10) ** -13):
            return 0.0 if math.isinf(value) and (value > 0) == (reference > 0) else INF
        if math.isinf(value):
            near = mpmath.fabs(reference) > mpmath.mpf(LARGEST) * (1 - mpmath.mpf(10) ** -13)
            return 0.0 if near and (value > 0) == (reference > 0) else INF
        unit = mpmath.mpf(SMALLEST)
        if mpmath.fabs(reference) >= SMALLEST_NORMAL:
            unit = mpmath.mpf(2) ** (math.frexp(float(reference))[1] - 53)
        return float(mpmath.fabs(mpmath.mpf(value) - reference) / unit)


def is_accurate(value: float, reference: mpmath.mpf) -> bool:
    """The demand: 8 ulp or 1e-13 relative for normal values, a few units for subnormal ones."""
    error = error_in_ulp(value, reference)
    if error <= 8:
        return True
    if not math.isfinite(error) or mpmath.fabs(reference) < SMALLEST_NORMAL:
        return False
    return bool(mpmath.fabs(mpmath.mpf(value) - reference) <= mpmath.fabs(reference) * mpmath.mpf("1e-13"))


def _grid() -> tuple[float, ...]:
    generator = torch.Generator().manual_seed(20260601)
    powers = [s * 10.0**-k for k in (0.3, 0.6, 1, 1.5, 2, 3, 4, 6, 8, 11, 16, 30, 80, 150, 250, 300) for s in (-1, 1)]
    dense = torch.linspace(-700, 700, 113, dtype=torch.float64).tolist()
    middle = torch.linspace(-4, 4, 97, dtype=torch.float64).tolist()
    random = (torch.rand(24, generator=generator, dtype=torch.float64) * 1400 - 700).tolist()
    near = (torch.randn(24, generator=generator, dtype=torch.float64) * 2).tolist()
    return tuple(sorted({*powers, *dense, *middle, *random, *near, 0.0, -700.0, 700.0}))


GRID = _grid()


def _roots(d: Divergence) -> tuple[float, ...]:
    """Points next to the roots of the weight and the slope other than u = 1."""
    points: set[float] = set()
    for form in ("log_slope", "weight"):
        values = getattr(d, form)(torch.tensor(GRID, dtype=torch.float64)).tolist()
        for low, high, a, b in zip(GRID[:-1], GRID[1:], values[:-1], values[1:], strict=True):
            if a * b < 0 and not low <= 0 <= high:
                root = _bisect(getattr(d, form), low, high)
                points |= {root, math.nextafter(root, -INF), math.nextafter(root, INF)}
                points |= {root + s * 10.0**-k for k in (2, 4, 7, 10, 13) for s in (-1, 1)}
    return tuple(sorted(points))


def _bisect(form: Callable[[Tensor], Tensor], low: float, high: float) -> float:
    sign = form(torch.tensor(low, dtype=torch.float64)).item() > 0
    for _ in range(200):
        middle = (low + high) / 2
        if (form(torch.tensor(middle, dtype=torch.float64)).item() > 0) == sign:
            low = middle
        else:
            high = middle
    return low


def worst(d: Divergence, form: str, values: Iterable[float], points: tuple[float, ...]) -> tuple[float, float]:
    """The largest error in ulp, and where."""
    pairs = zip(values, references(d, points)[form], points, strict=True)
    return max((error_in_ulp(value, reference), t) for value, reference, t in pairs)


def inaccurate(
    d: Divergence, form: str, values: Iterable[float], points: tuple[float, ...]
) -> list[tuple[float, float]]:
    """The points that miss the demand, with their errors in ulp."""
    pairs = zip(values, references(d, points)[form], points, strict=True)
    return [(t, error_in_ulp(value, reference)) for value, reference, t in pairs if not is_accurate(value, reference)]


def _evaluate(d: Divergence, form: str, points: tuple[float, ...], dtype: torch.dtype = torch.float64) -> list[float]:
    return getattr(d, form)(torch.tensor(points, dtype=torch.float64).to(dtype)).to(torch.float64).tolist()


@pytest.mark.parametrize("d", MEMBERS, ids=_ids)
def test_float64_forms_match_mpmath(d: Divergence) -> None:
    points = tuple(sorted({*GRID, *_roots(d)}))
    for form in FORMS:
        if form == "curvature" and d.name == "total_variation":
            continue
        assert inaccurate(d, form, _evaluate(d, form, points), points) == [], form
