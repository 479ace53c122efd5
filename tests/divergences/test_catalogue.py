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
    dense = torch.linspace(-700, 700, 85, dtype=torch.float64).tolist()
    middle = torch.linspace(-4, 4, 65, dtype=torch.float64).tolist()
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


@pytest.mark.parametrize("d", [d for d in SHORT if d.name in NAIVE], ids=_ids)
def test_the_accuracy_check_refutes_the_textbook_formula(d: Divergence) -> None:
    values = NAIVE[d.name](torch.tensor(GRID, dtype=torch.float64)).tolist()
    assert inaccurate(d, "generator", values, GRID)


@pytest.mark.parametrize("d", SHORT, ids=_ids)
def test_the_accuracy_check_refutes_wrong_signs_and_one_part_in_1e12(d: Divergence) -> None:
    weight = torch.tensor(_evaluate(d, "weight", GRID), dtype=torch.float64)
    assert inaccurate(d, "weight", (-weight).tolist(), GRID)
    assert inaccurate(d, "weight", (weight * (1 + 1e-12)).tolist(), GRID)
    assert inaccurate(d, "weight", torch.full_like(weight, math.nan).tolist(), GRID)


DIGITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@pytest.mark.parametrize("dtype", DIGITS, ids=str)
@pytest.mark.parametrize("d", MEMBERS, ids=_ids)
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
            points, _evaluate(d, form, points, dtype), references(d, points)[form], strict=True
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


@pytest.mark.parametrize("d", MEMBERS, ids=_ids)
def test_beyond_the_range_of_exp_nothing_is_nan_and_values_stay_right(d: Divergence) -> None:
    for form in FORMS:
        assert not any(map(math.isnan, _evaluate(d, form, (*EXTREMES, INF, -INF, 5e-324, -1e-310)))), form
    points = EXTREMES[:14]
    for form in FORMS[:3]:
        assert inaccurate(d, form, _evaluate(d, form, points), points) == [], form


@pytest.mark.parametrize("value", (1e300, -1e300, 1e160, 1e-300, 5e-324, -5e-324))
def test_no_parameter_of_alpha_gives_nan(value: float) -> None:
    d = divergences.alpha(value)
    for form in FORMS:
        assert not any(map(math.isnan, _evaluate(d, form, (*GRID, *EXTREMES, INF, -INF)))), form


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


@pytest.mark.parametrize("d", LIMIT_MEMBERS, ids=_ids)
def test_limits_match_sympy(d: Divergence) -> None:
    u = divergences.symbol()
    ends = torch.tensor([-INF, INF], dtype=torch.float64)
    for form in FORMS:
        expected = [_limit(symbolic(d)[form], False), _limit(symbolic(d)[form], True)]
        assert getattr(d, form)(ends).tolist() == pytest.approx(expected, rel=4e-16, abs=0), form
    assert d.at_zero == pytest.approx(_limit(d.expr, False), rel=4e-16, abs=0)
    slope = sympy.diff(d.expr, u)
    assert d.slope_at_infinity == pytest.approx(_limit(slope, True), rel=4e-16, abs=0)


@pytest.mark.parametrize("d", MEMBERS, ids=_ids)
def test_limits_join_the_values(d: Divergence) -> None:
    # alpha within 1e-12 of 0 reaches its limits 1/alpha only beyond any log u that matters.
    if abs(d.parameters.get("alpha", 1.0)) < 1e-9:
        return
    for form in FORMS:
        near = _evaluate(d, form, (-1e16, 1e16))
        far = _evaluate(d, form, (-INF, INF))
        for a, b in zip(near, far, strict=True):
            assert a == pytest.approx(b, rel=1e-12, abs=1e-300) or (math.isinf(b) and a * b >= 1e15 * abs(b)), form


AWAY = torch.tensor([-3.1, -1.0, -0.4, -1e-3, 2e-3, 0.3, 1.0, 2.7], dtype=torch.float64)


@pytest.mark.parametrize("d", [*SHORT, divergence("alpha", alpha=-2.5), divergence("alpha", alpha=1.0)], ids=_ids)
def test_derivatives_by_gradcheck(d: Divergence) -> None:
    t = AWAY.clone().requires_grad_()
    for form in (d.generator, d.log_slope, d.weight):
        assert torch.autograd.gradcheck(form, t)
        assert torch.autograd.gradgradcheck(form, t)
    assert torch.autograd.gradcheck(d.curvature, t)


@pytest.mark.parametrize("d", MEMBERS, ids=_ids)
def test_derivatives_are_the_other_forms_exactly(d: Divergence) -> None:
    t = torch.tensor((*GRID, INF, -INF), dtype=torch.float64)
    expected = {
        "generator": d.log_slope(t),
        "weight": d.curvature(t),
        # Towards u = 0 the sum may be of opposite infinities; the slope rises there from minus infinity.
        "log_slope": (d.log_slope(t) + d.curvature(t)).nan_to_num(nan=INF, posinf=INF, neginf=-INF),
    }
    for form, value in expected.items():
        leaf = t.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(getattr(d, form)(leaf).sum(), leaf)
        assert torch.equal(gradient, value), form
        assert not gradient.isnan().any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize("d", SHORT, ids=_ids)
def test_function_transforms(d: Divergence) -> None:
    t = AWAY
    grad = torch.func.grad
    assert torch.equal(torch.func.vmap(d.weight)(t), d.weight(t))
    assert torch.equal(torch.func.vmap(grad(d.weight))(t), d.curvature(t))
    assert torch.allclose(torch.func.vmap(grad(grad(d.generator)))(t), d.log_slope(t) + d.curvature(t), rtol=1e-15)
    assert torch.equal(torch.func.jvp(d.generator, (t,), (torch.ones_like(t),))[1], d.log_slope(t))
    hessian = torch.func.hessian(lambda x: d.generator(x).sum())(t)
    assert torch.allclose(hessian.diagonal(), d.log_slope(t) + d.curvature(t), rtol=1e-15)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own forward mode uses it
@pytest.mark.parametrize("d", SHORT, ids=_ids)
def test_values_and_dual_numbers_agree_with_the_recorded_function(d: Divergence) -> None:
    recorded = d.weight(AWAY.clone().requires_grad_())
    assert recorded.requires_grad and not d.weight(AWAY).requires_grad
    with torch.no_grad():
        unrecorded = d.weight(AWAY.clone().requires_grad_())
    assert not unrecorded.requires_grad
    assert torch.equal(d.weight(AWAY), recorded) and torch.equal(unrecorded, recorded)
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        values, slope = forward_ad.unpack_dual(d.weight(forward_ad.make_dual(AWAY, torch.ones_like(AWAY))))
    assert torch.equal(values, recorded) and torch.equal(slope, d.curvature(AWAY))


def test_a_masked_infinity_gets_no_gradient() -> None:
    t = torch.tensor([0.5, INF, -INF], requires_grad=True)
    values = divergences.jeffreys.generator(t)
    torch.where(torch.isfinite(t), values, torch.zeros_like(values)).sum().backward()
    assert t.grad is not None and torch.isfinite(t.grad).all()


def test_derivatives_end_with_a_clear_error() -> None:
    t = AWAY.clone().requires_grad_()
    (slope,) = torch.autograd.grad(divergences.jsd.curvature(t).sum(), t, create_graph=True)
    with pytest.raises(NotImplementedError, match="jsd: derivatives end"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ((), (0,), (2, 3, 4)))
def test_shape_and_dtype_are_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for d in SHORT:
        for form in FORMS:
            value = getattr(d, form)(torch.zeros(shape, dtype=dtype))
            assert value.shape == shape and value.dtype == dtype


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "log_u", (torch.tensor([1, 2]), torch.tensor([True]), 0.5, [0.5], None, torch.tensor([0.0, math.nan]))
)
def test_bad_log_u_is_refused(log_u: object) -> None:
    for form in FORMS:
        with pytest.raises(InvalidArgumentError, match="^log_u: ") as caught:
            getattr(divergences.jsd, form)(log_u)
        assert caught.value.argument == "log_u"


def test_names_are_the_catalogue() -> None:
    assert names() == tuple(CATALOGUE_NAMES)
    for name in names():
        assert getattr(divergences, name) is not None


def test_lookup_by_name() -> None:
    assert divergence("jsd") is divergences.jsd
    assert divergence(divergences.jsd) is divergences.jsd
    assert divergence("alpha", alpha=0.5) == divergences.alpha(0.5)
    assert divergences.alpha(0.5) != divergences.alpha(0.25)
    assert hash(divergences.skew_jsd(0.1)) == hash(divergences.skew_jsd(0.1))
    assert repr(divergences.alpha(0.5)) == divergences.alpha(0.5).label == "alpha(alpha=0.5)"
    assert dict(divergences.skew_jsd(0.1).parameters) == {"beta": 0.1}
    assert divergences.jsd.label == "jsd"


@pytest.mark.parametrize(
    ("arguments", "parameters", "named", "says"),
    (
        (("jsdd",), {}, "divergence", "did you mean 'jsd'"),
        (("nothing like it",), {}, "divergence", "must be one of reverse_kl, forward_kl"),
        pytest.param((3,), {}, "divergence", "or a label, got 3", marks=pytest.mark.bad_input),
        (("alpha",), {}, "alpha", "must be given"),
        (("jsd",), {"beta": 0.5}, "beta", "takes no parameters"),
        (("skew_jsd",), {"beta": 0.5, "lam": 0.1}, "lam", "takes beta"),
        ((divergences.jsd,), {"beta": 0.5}, "beta", "takes no parameters"),
        (("skew_jsd",), {"beta": -0.1}, "beta", r"\[0, 1\]"),
        (("skew_jsd",), {"beta": 1.1}, "beta", r"\[0, 1\]"),
        (("skew_jsd",), {"beta": math.nan}, "beta", "nan"),
        pytest.param(("skew_jsd",), {"beta": "0.5"}, "beta", "'0.5'", marks=pytest.mark.bad_input),
        (("skew_forward_kl",), {"lam": 1.0}, "lam", r"\[0, 1\)"),
        (("skew_reverse_kl",), {"lam": -1e-9}, "lam", r"\[0, 1\)"),
        (("alpha",), {"alpha": INF}, "alpha", "finite"),
        (("alpha",), {"alpha": math.nan}, "alpha", "finite"),
        pytest.param(("alpha",), {"alpha": True}, "alpha", "True", marks=pytest.mark.bad_input),
    ),
)
def test_bad_names_and_parameters_are_refused(
    arguments: tuple[object], parameters: dict[str, object], named: str, says: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        divergence(*arguments, **parameters)
    assert caught.value.argument == named


def test_copies_and_pickles_are_equal() -> None:
    own = Divergence.from_expr(divergences.symbol() ** 2 - 1, name="own")
    for d in (*SHORT, own):
        for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert twin == d and hash(twin) == hash(d)
            assert torch.equal(twin.weight(AWAY), d.weight(AWAY))


def test_importing_the_package_leaves_sympy_and_mpmath_alone() -> None:
    code = "import sys, opdtheory.divergences; print([m for m in ('sympy', 'mpmath') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_relations_between_members() -> None:
    t = AWAY
    assert torch.allclose(divergences.skew_jsd(0.5).generator(t), divergences.jsd.generator(t), rtol=1e-13, atol=0)
    assert torch.allclose(divergences.alpha(2.0).generator(t) * 2, divergences.chi2.generator(t), rtol=1e-13, atol=0)
    assert torch.allclose(divergences.alpha(-1.0).weight(t) * 2, divergences.neyman_chi2.weight(t), rtol=1e-13, atol=0)
    assert torch.equal(divergences.skew_forward_kl(0.0).generator(t), divergences.forward_kl.generator(t))
    for beta in (0.0, 1.0):
        assert not divergences.skew_jsd(beta).weight(t).any()


class TestFromExpr:
    u = sympy.Symbol("u")  # without assumptions, as a user writes it

    @pytest.mark.parametrize(
        "d", [d for d in SHORT if d.name in ("jsd", "alpha", "total_variation", "le_cam", "skew_forward_kl")], ids=_ids
    )
    def test_agrees_with_the_catalogue(self, d: Divergence) -> None:
        mine = Divergence.from_expr(d.expr, name="mine")
        points = torch.tensor((*GRID[::4], 0.0, INF, -INF), dtype=torch.float64)
        for form in FORMS:
            expected = getattr(d, form)(points)
            torch.testing.assert_close(getattr(mine, form)(points), expected, rtol=2e-11, atol=1e-300, msg=form)
        assert mine.at_zero == pytest.approx(d.at_zero) and mine.slope_at_infinity == pytest.approx(d.slope_at_infinity)
        assert torch.autograd.gradcheck(mine.weight, AWAY.clone().requires_grad_())

    def test_kinks(self) -> None:
        hinge = Divergence.from_expr(sympy.Max(0, self.u - 2), name="hinge")
        t = torch.tensor([-1.0, 0.5, 1.0, 700.0, INF], dtype=torch.float64)
        assert hinge.weight(t).tolist() == pytest.approx([0, 0, 2, 2, 2])
        assert hinge.generator(t).tolist() == pytest.approx([0, 0, math.e - 2, math.exp(700), INF])

    def test_functions_that_torch_lacks_go_through_mpmath(self) -> None:
        d = Divergence.from_expr(sympy.besseli(0, self.u) - sympy.besseli(0, 1), name="bessel")
        assert d.generator(torch.zeros(1)).item() == 0
        assert d.generator(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(
            float(mpmath.besseli(0, mpmath.e) - mpmath.besseli(0, 1)), rel=1e-14
        )

    def test_equality_needs_the_same_expression(self) -> None:
        first, second = (Divergence.from_expr(e, name="d") for e in (self.u**2 - 1, self.u**3 - 1))
        assert first != second and first == Divergence.from_expr(self.u**2 - 1, name="d")

    @pytest.mark.parametrize(
        ("expr", "says"),
        (
            (u * sympy.log(u) + 1, r"f\(1\) = 0: f\(1\) = 1"),
            (-u * sympy.log(u), r"convexity on \(0, oo\): f''\(.*\) = -.* < 0"),
            (sympy.sqrt(u) - 1, "convexity"),
            (-sympy.Abs(u - 1), "convexity on .* f' falls by 2"),
            ((u - 1) ** 2 - sympy.Abs(u - 2) + 1, "f' falls by"),
            (u * sympy.Symbol("x"), "free symbols x"),
            ("u*log(u)", "must be a sympy expression in u, got str"),
            (None, "got NoneType"),
        ),
        ids=str,
    )
    def test_violations_are_named(self, expr: object, says: str) -> None:
        with pytest.raises(InvalidArgumentError, match=says) as caught:
            Divergence.from_expr(expr, name="bad")
        assert caught.value.argument == "expr"

    def test_an_empty_name_is_refused(self) -> None:
        with pytest.raises(InvalidArgumentError, match="^name: "):
            Divergence.from_expr(self.u - 1, name="")


@pytest.mark.slow
@pytest.mark.parametrize("d", MEMBERS, ids=_ids)
def test_float64_forms_match_mpmath_on_a_dense_grid(d: Divergence) -> None:
    generator = torch.Generator().manual_seed(2)
    wide = torch.rand(500, generator=generator, dtype=torch.float64) * 1400 - 700
    middle = torch.randn(700, generator=generator, dtype=torch.float64) * 3
    tiny = torch.sign(middle) * 10 ** (-300 * torch.rand(700, generator=generator, dtype=torch.float64)) * 0.9
    points = tuple(sorted(torch.cat([wide, middle, tiny[:200]]).tolist()))
    for form in FORMS:
        if form == "curvature" and d.name == "total_variation":
            continue
        assert inaccurate(d, form, _evaluate(d, form, points), points) == [], form


def test_families_are_the_names_that_take_a_parameter() -> None:
    assert divergences.families() == {name: key for name, (key, _) in _FAMILIES.items()}
    for name in divergences.names():
        if name in divergences.families():
            with pytest.raises(InvalidArgumentError, match="must be given"):
                divergences.divergence(name)


@pytest.mark.parametrize("d", SHORT, ids=_ids)
def test_the_curvature_slopes_at_its_ends_as_it_grows(d: Divergence) -> None:
    ends = torch.tensor([-INF, INF], dtype=torch.float64, requires_grad=True)
    curvature = d.curvature(ends)
    (slope,) = torch.autograd.grad(curvature.sum(), ends)
    sides = zip((-INF, INF), curvature.tolist(), strict=True)
    assert slope.tolist() == [side if math.isinf(value) else 0.0 for side, value in sides]


def test_weights_of_the_alpha_family_at_the_ends() -> None:
    ends = torch.tensor([-INF, INF], dtype=torch.float64)
    limits = {0.0: [-INF, INF], 0.5: [-2.0, INF], -0.5: [-INF, 2.0], 1e-320: [-INF, INF], -1e-320: [-INF, INF]}
    for order, expected in limits.items():
        assert divergence("alpha", alpha=order).weight(ends).tolist() == expected
