"""The catalogue's numbers against its own symbolic generators, evaluated by mpmath; limits and relations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import mpmath
import pytest
import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence, divergence
from tests.divergences.members import (
    AWAY,
    FORMS,
    GRID,
    INF,
    MEMBERS,
    SHORT,
    error_in_ulp,
    evaluate,
    ids,
    inaccurate,
    references,
    symbolic,
)
from tests.sparse import some


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


@pytest.mark.parametrize("d", some(MEMBERS, ids=map(ids, MEMBERS)))
def test_float64_forms_match_mpmath(d: Divergence) -> None:
    points = tuple(sorted({*GRID, *_roots(d)}))
    for form in FORMS:
        if form == "curvature" and d.name == "total_variation":
            continue
        assert inaccurate(d, form, evaluate(d, form, points), points) == [], form


def test_exact_zeros_of_weights_and_slopes() -> None:
    one = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert divergences.reverse_kl.weight(one)[0] == 0
    assert divergences.forward_kl.log_slope(one)[1] == 0
    assert divergences.skew_forward_kl(0.0).log_slope(one)[1] == 0
    assert divergences.skew_reverse_kl(0.0).weight(one)[0] == 0


NAIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda t: torch.exp(t).log() * torch.exp(t),
    "jsd": lambda t: (t.exp() * t.exp().log() - (t.exp() + 1) * ((t.exp() + 1) / 2).log()) / 2,
    "chi2": lambda t: (t.exp() - 1) ** 2,
    "hellinger": lambda t: (t.exp().sqrt() - 1) ** 2,
    "le_cam": lambda t: (t.exp() - 1) ** 2 / (t.exp() + 1),
    "jeffreys": lambda t: (t.exp() - 1) * t,
    "skew_jsd": lambda t: 0.1 * t * t.exp() - (0.1 * t.exp() + 0.9) * (0.1 * t.exp() + 0.9).log(),
    "alpha": lambda t: ((0.3 * t).exp() - 1 - 0.3 * (t.exp() - 1)) / (0.3 * -0.7),
    "skew_forward_kl": lambda t: t.exp() * (t.exp() / (0.1 * t.exp() + 0.9)).log(),
    "skew_reverse_kl": lambda t: -(0.1 + 0.9 * t.exp()).log(),
}


@pytest.mark.parametrize("d", [d for d in SHORT if d.name in NAIVE], ids=ids)
def test_the_accuracy_check_refutes_the_textbook_formula(d: Divergence) -> None:
    values = NAIVE[d.name](torch.tensor(GRID, dtype=torch.float64)).tolist()
    assert inaccurate(d, "generator", values, GRID)


@pytest.mark.parametrize("d", SHORT, ids=ids)
def test_the_accuracy_check_refutes_wrong_signs_and_one_part_in_1e12(d: Divergence) -> None:
    weight = torch.tensor(evaluate(d, "weight", GRID), dtype=torch.float64)
    assert inaccurate(d, "weight", (-weight).tolist(), GRID)
    assert inaccurate(d, "weight", (weight * (1 + 1e-12)).tolist(), GRID)
    assert inaccurate(d, "weight", torch.full_like(weight, math.nan).tolist(), GRID)


DIGITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
@pytest.mark.parametrize("d", some(MEMBERS, ids=map(ids, MEMBERS)))
def test_narrow_dtypes_are_rounded_once(d: Divergence, dtype: torch.dtype) -> None:
    span = 11.0 if dtype is torch.float16 else 87.0
    dense = torch.linspace(-span, span, 59, dtype=torch.float64)
    near = torch.linspace(-3, 3, 31, dtype=torch.float64)
    small = torch.tensor([s * 10.0**-k for k in (2, 3, 5, 7, 15, 30) for s in (-1, 1)], dtype=torch.float64)
    # Only numbers of the dtype itself: the error of rounding log u is the caller's.
    points = tuple(sorted(set(torch.cat([dense, near, small]).to(dtype).to(torch.float64).tolist())))
    info = torch.finfo(dtype)
    for form in FORMS:
        if form == "curvature" and d.name == "total_variation":
            continue
        for t, value, reference in zip(
            points, evaluate(d, form, points, dtype), references(d, points)[form], strict=True
        ):
            exact = mpmath.fabs(reference)
            if exact > info.max * (1 + 2.0 ** (-DIGITS[dtype] - 1)):
                assert math.isinf(value) and (value > 0) == (reference > 0), (form, t)
                continue
            exponent = max(
                math.frexp(float(exact))[1] - DIGITS[dtype], math.frexp(info.smallest_normal)[1] - DIGITS[dtype]
            )
            assert abs(value - float(reference)) <= 0.51 * 2.0**exponent or math.isinf(value) and exact >= info.max, (
                form,
                t,
            )


EXTREMES = tuple(
    s * x for x in (708.3, 709.6, 710.2, 712.0, 722.0, 745.0, 1417.0, 1e5, 1e151, 1.7e308) for s in (-1, 1)
)


@pytest.mark.parametrize("d", MEMBERS, ids=ids)
def test_beyond_the_range_of_exp_nothing_is_nan_and_values_stay_right(d: Divergence) -> None:
    for form in FORMS:
        assert not any(map(math.isnan, evaluate(d, form, (*EXTREMES, INF, -INF, 5e-324, -1e-310)))), form
    points = EXTREMES[:14]
    for form in FORMS[:3]:
        assert inaccurate(d, form, evaluate(d, form, points), points) == [], form


@pytest.mark.parametrize("value", (1e300, -1e300, 1e160, 1e-300, 5e-324, -5e-324))
def test_no_parameter_of_alpha_gives_nan(value: float) -> None:
    d = divergences.alpha(value)
    for form in FORMS:
        assert not any(map(math.isnan, evaluate(d, form, (*GRID, *EXTREMES, INF, -INF)))), form


def _limit(expression: sympy.Expr, at_infinity: bool) -> float:
    u = divergences.symbol()
    side = u > 1 if at_infinity else u < 1
    sign = 1 if at_infinity else -1
    smooth = expression.subs({sympy.Abs(u - 1): sign * (u - 1), sympy.sign(u - 1): sign})
    assert not smooth.has(sympy.Abs, sympy.sign), side
    return float(sympy.limit(smooth, u, sympy.oo if at_infinity else 0, "-" if at_infinity else "+"))


# sympy takes seconds for some limits with rational parameters; these exercise every branch.
LIMIT_MEMBERS = [
    *SHORT,
    *(divergence("alpha", alpha=a) for a in (-2.5, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0)),
    *(divergence("skew_jsd", beta=b) for b in (0.0, 0.7, 1.0)),
    *(divergence(name, lam=0.0) for name in ("skew_forward_kl", "skew_reverse_kl")),
    divergence("skew_reverse_kl", lam=0.999),
]


@pytest.mark.parametrize("d", some(LIMIT_MEMBERS, ids=map(ids, LIMIT_MEMBERS)))
def test_limits_match_sympy(d: Divergence) -> None:
    u = divergences.symbol()
    ends = torch.tensor([-INF, INF], dtype=torch.float64)
    for form in FORMS:
        expected = [_limit(symbolic(d)[form], False), _limit(symbolic(d)[form], True)]
        assert getattr(d, form)(ends).tolist() == pytest.approx(expected, rel=4e-16, abs=0), form
    assert d.at_zero == pytest.approx(_limit(d.expr, False), rel=4e-16, abs=0)
    slope = sympy.diff(d.expr, u)
    assert d.slope_at_infinity == pytest.approx(_limit(slope, True), rel=4e-16, abs=0)


@pytest.mark.parametrize("d", MEMBERS, ids=ids)
def test_limits_join_the_values(d: Divergence) -> None:
    # alpha within 1e-12 of 0 reaches its limits 1/alpha only beyond any log u that matters.
    if abs(d.parameters.get("alpha", 1.0)) < 1e-9:
        return
    for form in FORMS:
        near = evaluate(d, form, (-1e16, 1e16))
        far = evaluate(d, form, (-INF, INF))
        for a, b in zip(near, far, strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-300) or (math.isinf(b) and a * b >= 1e15 * abs(b)), form


def test_relations_between_members() -> None:
    t = AWAY
    assert torch.allclose(divergences.skew_jsd(0.5).generator(t), divergences.jsd.generator(t), rtol=1e-13, atol=0)
    assert torch.allclose(divergences.alpha(2.0).generator(t) * 2, divergences.chi2.generator(t), rtol=1e-13, atol=0)
    assert torch.allclose(divergences.alpha(-1.0).weight(t) * 2, divergences.neyman_chi2.weight(t), rtol=1e-13, atol=0)
    assert torch.equal(divergences.skew_forward_kl(0.0).generator(t), divergences.forward_kl.generator(t))
    for beta in (0.0, 1.0):
        assert not divergences.skew_jsd(beta).weight(t).any()


@pytest.mark.slow
@pytest.mark.parametrize("d", MEMBERS, ids=ids)
def test_float64_forms_match_mpmath_on_a_dense_grid(d: Divergence) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.rand(500, generator=generator, dtype=torch.float64) * 1400 - 700
    middle = torch.randn(700, generator=generator, dtype=torch.float64) * 3
    tiny = torch.sign(middle) * 10 ** (-300 * torch.rand(700, generator=generator, dtype=torch.float64)) * 0.9
    points = tuple(sorted(torch.cat([wide, middle, tiny[:200]]).tolist()))
    for form in FORMS:
        if form == "curvature" and d.name == "total_variation":
            continue
        assert inaccurate(d, form, evaluate(d, form, points), points) == [], form


def test_weights_of_the_alpha_family_at_the_ends() -> None:
    ends = torch.tensor([-INF, INF], dtype=torch.float64)
    limits = {0.0: [-INF, INF], 0.5: [-2.0, INF], -0.5: [-INF, 2.0], 1e-320: [-INF, INF], -1e-320: [-INF, INF]}
    for order, expected in limits.items():
        assert divergence("alpha", alpha=order).weight(ends).tolist() == expected
