"""Implied generators by quadrature, against closed forms."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from sympy import Max, Min, exp, log

from opdtheory import divergences
from opdtheory.divergences import divergence, implied_generator, implied_generator_values
from opdtheory.errors import InvalidArgumentError

u = divergences.u
GRID = torch.linspace(-4.0, 4.0, 17, dtype=torch.float64)


def closed_form(expr: sympy.Expr) -> torch.Tensor:
    return torch.tensor(
        [float(expr.subs(u, exp(sympy.Float(t, 40))).evalf(30)) for t in GRID.tolist()], dtype=GRID.dtype
    )


@pytest.mark.parametrize("d", [divergence(name) for name in ("forward_kl", "jsd", "chi2", "hellinger")], ids=repr)
def test_quadrature_finds_the_generator_of_a_weight(d: divergences.Divergence) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    expected = d.generator(GRID) - d.log_slope(zero) * torch.expm1(GRID)
    values = implied_generator_values(d.weight, GRID)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(
        implied_generator_values(lambda t: d.weight(t) + 5.0, GRID), expected, rtol=1e-11, atol=0
    )
    assert not torch.allclose(implied_generator_values(lambda t: -d.generator(t), GRID), expected, rtol=1e-3)


def test_quadrature_of_clips_and_jumps_agrees_with_the_closed_form() -> None:
    clipped = implied_generator_values(lambda t: t.clamp(-1, 1), GRID, breaks=(-1.0, 1.0))
    torch.testing.assert_close(clipped, closed_form(implied_generator(Max(-1, Min(1, log(u))))), rtol=1e-11, atol=1e-14)
    jump = implied_generator_values(torch.sign, GRID)
    torch.testing.assert_close(jump, torch.expm1(GRID).abs(), rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_quadrature_where_sympy_finds_no_closed_form() -> None:
    with pytest.raises(InvalidArgumentError, match="implied_generator_values"):
        implied_generator(exp(-(u**3)) * log(1 + exp(u)))
    # The slope in log u is V + w - w(0); a central difference sees it.
    step = 1e-4
    values, above, below = (implied_generator_values(torch.atan, GRID + k * step) for k in (0, 1, -1))
    torch.testing.assert_close((above - below) / (2 * step), values + torch.atan(GRID), rtol=1e-6, atol=1e-8)
    # atan rises, so that the generator is convex: its slopes in u do too. Of -atan they fall.
    slopes = values.diff() / GRID.exp().diff()
    assert bool((slopes.diff() > 0).all())
    falling = implied_generator_values(lambda t: -torch.atan(t), GRID)
    assert bool(((falling.diff() / GRID.exp().diff()).diff() < 0).all())


def test_quadrature_keeps_shape_and_dtype() -> None:
    values = implied_generator_values(torch.tanh, torch.tensor([[0.5, -1.0], [0.0, 0.5]]))
    assert values.shape == (2, 2) and values.dtype == torch.float32
    assert values[1, 0] == 0 and values[0, 0] == values[1, 1]
    assert implied_generator_values(torch.tanh, torch.zeros(0)).shape == (0,)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("argument", "weight", "log_u"),
    [
        ("log_u", torch.tanh, torch.tensor([1])),
        ("log_u", torch.tanh, torch.tensor([float("inf")])),
        ("weight", torch.log, torch.tensor([1.0])),
        ("weight", torch.sum, torch.tensor([1.0])),
        ("weight", lambda t: torch.sin(1e5 * t), torch.tensor([3.0])),
    ],
)
def test_quadrature_refuses(argument: str, weight: object, log_u: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        implied_generator_values(weight, log_u)
    assert caught.value.argument == argument


def test_quadrature_where_the_integral_vanishes() -> None:
    values = implied_generator_values(lambda t: t.exp() * torch.sin(2 * math.pi * t), torch.tensor([1.0, 2.0, -1.0]))
    assert float(values.abs().max()) < 1e-12


def test_a_piece_far_from_one_is_met_inside() -> None:
    weight = Max(0, Min(1, u - 3))
    log_u = torch.tensor([3.25, 3.5, 3.9, 6.0, 20.0], dtype=torch.float64).log()
    closed = sympy.lambdify(u, implied_generator(weight), "mpmath")
    values = implied_generator_values(lambda t: (t.exp() - 3).clamp(0, 1), log_u, breaks=(math.log(3), math.log(4)))
    expected = [float(closed(x)) for x in log_u.exp().tolist()]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
