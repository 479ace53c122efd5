"""Members of the catalogue, points at which to look at them, and their forms by mpmath."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable

import mpmath
import sympy
import torch

from opdtheory import divergences
from opdtheory.divergences import Divergence, divergence

INF = math.inf
FORMS = ("generator", "log_slope", "weight", "curvature", "remainder", "centred_weight")
SMALLEST_NORMAL, SMALLEST, LARGEST = 2.0**-1022, 2.0**-1074, sys.float_info.max

CATALOGUE_NAMES = (
    "reverse_kl forward_kl jsd skew_jsd chi2 neyman_chi2 hellinger total_variation le_cam jeffreys alpha "
    "skew_forward_kl skew_reverse_kl"
).split()

FAMILIES: dict[str, tuple[str, tuple[float, ...]]] = {
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
        if name in FAMILIES:
            key, values = FAMILIES[name]
            members += [divergence(name, **{key: value}) for value in values]
        else:
            members.append(divergence(name))
    return members


MEMBERS = _members()
SHORT = [d for d in MEMBERS if not d.parameters or dict(d.parameters).popitem()[1] in (0.1, 0.3)]


def ids(d: Divergence) -> str:
    return d.label


@functools.cache
def symbolic(d: Divergence) -> dict[str, sympy.Expr]:
    """The forms by sympy from the generator alone; kinks give no delta functions."""
    u = divergences.symbol()
    f = d.expr

    def slope(e: sympy.Expr) -> sympy.Expr:
        return sympy.diff(e, u).replace(sympy.DiracDelta, lambda *_: sympy.Integer(0))

    at_one = sympy.simplify(slope(f).subs(u, 1))
    return {
        "generator": f,
        "remainder": f - at_one * (u - 1),
        "centred_weight": u * slope(f) - f - at_one,
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
    dense = torch.linspace(-700, 700, 85, dtype=torch.float64).tolist()
    middle = torch.linspace(-4, 4, 65, dtype=torch.float64).tolist()
    random = (torch.rand(24, generator=generator, dtype=torch.float64) * 1400 - 700).tolist()
    near = (torch.randn(24, generator=generator, dtype=torch.float64) * 2).tolist()
    return tuple(sorted({*powers, *dense, *middle, *random, *near, 0.0, -700.0, 700.0}))


GRID = _grid()


def inaccurate(
    d: Divergence, form: str, values: Iterable[float], points: tuple[float, ...]
) -> list[tuple[float, float]]:
    """The points that miss the demand, with their errors in ulp."""
    pairs = zip(values, references(d, points)[form], points, strict=True)
    return [(t, error_in_ulp(value, reference)) for value, reference, t in pairs if not is_accurate(value, reference)]


def evaluate(d: Divergence, form: str, points: tuple[float, ...], dtype: torch.dtype = torch.float64) -> list[float]:
    return getattr(d, form)(torch.tensor(points, dtype=torch.float64).to(dtype)).to(torch.float64).tolist()


AWAY = torch.tensor([-3.1, -1.0, -0.4, -1e-3, 2e-3, 0.3, 1.0, 2.7], dtype=torch.float64)
