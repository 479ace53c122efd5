"""A divergence as a function of tensors: derivatives, transforms, shapes, copies, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from opdtheory import divergences
from opdtheory.divergences import Divergence, divergence
from opdtheory.errors import InvalidArgumentError
from tests.divergences.members import AWAY, FORMS, GRID, INF, MEMBERS, SHORT, ids
from tests.sparse import some


@pytest.mark.parametrize("d", some([*SHORT, divergence("alpha", alpha=-2.5), divergence("alpha", alpha=1.0)]), ids=ids)
def test_derivatives_by_gradcheck(d: Divergence) -> None:
    t = AWAY.clone().requires_grad_()
    for form in (d.generator, d.log_slope, d.weight, d.remainder, d.centred_weight):
        assert torch.autograd.gradcheck(form, t)
        assert torch.autograd.gradgradcheck(form, t)
    assert torch.autograd.gradcheck(d.curvature, t)


@pytest.mark.parametrize("d", MEMBERS, ids=ids)
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
@pytest.mark.parametrize("d", SHORT, ids=ids)
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
@pytest.mark.parametrize("d", SHORT, ids=ids)
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


def test_copies_and_pickles_are_equal() -> None:
    own = Divergence.from_expr(divergences.symbol() ** 2 - 1, name="own")
    for d in (*SHORT, own):
        for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
            assert twin == d and hash(twin) == hash(d)
            assert torch.equal(twin.weight(AWAY), d.weight(AWAY))


@pytest.mark.parametrize("d", SHORT, ids=ids)
def test_the_curvature_slopes_at_its_ends_as_it_grows(d: Divergence) -> None:
    ends = torch.tensor([-INF, INF], dtype=torch.float64, requires_grad=True)
    curvature = d.curvature(ends)
    (slope,) = torch.autograd.grad(curvature.sum(), ends)
    sides = zip((-INF, INF), curvature.tolist(), strict=True)
    assert slope.tolist() == [side if math.isinf(value) else 0.0 for side, value in sides]


def test_a_curvature_that_diverges_at_zero_slopes_down_from_there() -> None:
    # A member made here, not with the catalogue.
    end = torch.tensor(-INF, dtype=torch.float64, requires_grad=True)
    divergences.alpha(-2.25).curvature(end).backward()
    assert end.grad == -INF
