"""Divergences made from expressions: numbers, kinks, unknown functions, and what is refused."""

from __future__ import annotations

import math

import mpmath
import pytest
import sympy
import torch
from sympy import log

from opdtheory.divergences import Divergence
from opdtheory.divergences.custom import number
from opdtheory.errors import InvalidArgumentError
from tests.divergences.members import AWAY, FORMS, GRID, INF, SHORT, ids
from tests.sparse import some


class TestFromExpr:
    u = sympy.Symbol("u")  # without assumptions, as a user writes it

    @pytest.mark.parametrize(
        "d",
        some(d for d in SHORT if d.name in ("jsd", "alpha", "total_variation", "le_cam", "skew_forward_kl")),
        ids=ids,
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


def test_numbers_may_be_infinite() -> None:
    assert [number(x) for x in (sympy.oo, -sympy.oo, log(2) / 2)] == [math.inf, -math.inf, math.log(2) / 2]
