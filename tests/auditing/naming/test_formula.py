"""The search for a formula: clamps, windows, and what fits on the grid alone."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import sympy
import torch

import opdtheory as opd
from opdtheory.auditing.naming.recover import RecoveredWeight, recover_weight
from opdtheory.auditing.naming.weight_form import describe
from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import implied_generator_values, symbol
from tests.auditing.naming.weights import GRID, evaluated, form_of, reward


def test_clamped_generator_is_the_integral_of_the_clamped_weight() -> None:
    for low, high in ((0.5, 1.5), (1.05, 6.0), (0.1, 0.9)):
        form = form_of(opd.estimator("opd_plus", "forward_kl", clip_weight=(low, high)))
        assert form.generator is not None
        edges = (math.log(low), math.log(high))
        integral = implied_generator_values(lambda t, a=low, b=high: t.exp().clamp(a, b), GRID, breaks=edges)  # type: ignore[misc]
        generator = sympy.sympify(form.generator, locals={"u": symbol()})
        np.testing.assert_allclose(evaluated(generator, GRID), integral.numpy(), atol=1e-11)
        assert form.genuine and "bounded for every pair" in form.second_moment


def test_a_bound_on_a_round_log_ratio() -> None:
    """No grid point lies on it, where rounding would decide on which side a token falls."""
    for bound in (0.5, 1.0, 2.0):
        recovered = recover_weight(opd.estimator("k2_loss", clip_log_ratio=bound), Scenario())
        assert recovered.depends_on_ratio_only
        form = describe(recovered)
        assert form.kind == "numeric" and form.label.startswith("reverse_kl for log u between")
        assert "constant outside with a jump" in form.label
        clamped = form_of(opd.estimator("opd_plus", "jsd", clip_log_ratio=bound))
        assert clamped.label == f"jsd of u with log u clamped to [-{bound:g}, {bound:g}]"


@pytest.mark.parametrize("bound", [4.5, 6.0, 10.0])
def test_a_bound_beyond_the_grid_is_named(bound: float) -> None:
    """Seen on |log u| <= 4 alone both are the reverse KL, as they are with a bound that no log-ratio seen reaches."""
    for loss, named in (
        (reward(lambda t: t.clamp(-bound, bound)), f"reverse_kl of u with log u clamped to [-{bound:g}, {bound:g}]"),
        (
            opd.estimator("k2_loss", clip_log_ratio=bound),
            f"reverse_kl for log u between -{bound:g} and {bound:g}, constant outside with a jump",
        ),
    ):
        recovered = recover_weight(loss, Scenario())
        assert describe(recovered).label == named
        none = torch.zeros(0, dtype=torch.float64)
        short = describe(dataclasses.replace(recovered, far_log_u=none, far_weight=none))
        assert (short.label, short.seen_to) == ("reverse_kl", 4.0)
    beyond = form_of(opd.estimator("k2_loss", clip_log_ratio=bound + 8.0))
    assert (beyond.label, beyond.seen_to) == ("reverse_kl", 12.0)


def test_a_clamp_of_the_value_ends_where_the_value_does() -> None:
    """0.5 log^2 u and u - 1 - log u held at 10 or below: no gradient beyond (OpenRLHF's k2, verl's k3)."""
    k2 = form_of(lambda r: r.token_sum((r.log_u.square() / 2).clamp(max=10.0)))
    assert k2.label == "reverse_kl for log u between -4.472 and 4.472, constant outside with a jump"
    assert math.sqrt(20.0) == pytest.approx(4.472, abs=5e-4) and not k2.genuine
    k3 = form_of(lambda r: r.token_sum((r.log_u.expm1() - r.log_u).clamp(-10.0, 10.0)))
    assert k3.label == "forward_kl for log u between -11 and 2.611, constant outside with a jump"
    assert math.exp(2.611) - 1.0 - 2.611 == pytest.approx(10.0, abs=0.01)


def test_what_fits_on_the_grid_alone_is_not_named() -> None:
    """A bend at 7, and a term too small to be seen on the grid."""
    for function in (lambda t: t + (t - 7.0).clamp(min=0.0), lambda t: t + 1e-12 * (2 * t).exp()):
        form = form_of(reward(function))
        assert form.kind == "numeric" and form.label.endswith("another function beyond")


def test_few_points_are_not_overfitted() -> None:
    """Seven points and three coefficients would fit anything nearly; nothing of the sort is tried."""
    log_u = torch.tensor([-4.0, -0.02, -0.01, 0.0, 0.01, 0.02, 4.0], dtype=torch.float64)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
        weight = a * log_u + b * log_u**2 + c * torch.sin(log_u)
        form = describe(RecoveredWeight(log_u, weight, 0.0, True, False, a + c))
        assert form.kind == "numeric"
